"""Shards that were not made for the base are refused before a weight of it is read: 0.1 to 1 s for the tokenizer, 0.1 s a GB of shards.

A shard folder may come from elsewhere, and a base may be exchanged: ids of another tokenizer would train in silence, and an
id beyond the embedding is an index error inside a kernel. So is a base refused that would train as another model (alike.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from graft.core.errors import ConfigError
from graft.core.shards import ShardSet
from graft.core.stages import Plan
from graft.model.base import read_config, sees_images
from graft.model.chat import load_tokenizer, tokenizer_digest
from graft.train.alike import SCALES, refuse_long, refuse_unlike


def refuse_misfits(splits: Iterable[tuple[Path, ShardSet]], plan: Plan, stage: str) -> None:
    """ConfigError where a split's bins, documents, ids or tokenizer do not fit the recipe and the base that `stage` is to train on them.

    A document, not a bin, may be as long as the base has positions: each begins at position 0.
    """
    base, revision = plan.base_model(stage)
    whole, name = read_config(base, revision), f"model.base = {base!r}"
    config = whole.get_text_config()
    known = config.to_dict() | {key: getattr(config, key, None) for key in SCALES}  # which some configs compute
    refuse_unlike(known, name)
    digest = tokenizer_digest(load_tokenizer(base, revision, plan.chat_template))
    positions = getattr(config, "max_position_embeddings", None)
    again = "make the shards again with `graft run`"
    for folder, shards in splits:
        if shards.seq_len != plan.recipe.shard.seq_len:
            raise ConfigError(f"{folder} has bins of {shards.seq_len} tokens, the recipe shard.seq_len = {plan.recipe.shard.seq_len}: {again}")
        longest, largest, theirs = int(shards.doc_lens().max(initial=0)), shards.largest_id(), shards.index["tokenizer"]
        if positions is not None and longest > positions:
            raise ConfigError(
                f"{folder} has a document of {longest} tokens, {name} max_position_embeddings = {positions}: set shard.seq_len to {positions} at most"
            )
        refuse_long(shards, folder, known, name)
        if shards.of_images and not sees_images(whole):
            raise ConfigError(f"{folder} has rows with images, and {name} sees none: name a Qwen2.5-VL model")
        if theirs != digest:
            raise ConfigError(
                f"{folder} was made with another tokenizer or chat template ({theirs[:12]}) than {name} has ({digest[:12]}): {again}, or name their base"
            )
        if largest >= config.vocab_size:
            raise ConfigError(
                f"{folder} has the token id {largest}, {name} only {config.vocab_size} embeddings: name a base with more, or mend its tokenizer"
            )
