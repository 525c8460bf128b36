"""Bases that would train as another model than they are, by their config alone. Imports no torch: `graft check` asks too.

A packed bin is trained under one mask, in which a token sees all of its document before it, and its loss is taken from the head's
weight alone (model/packed.py). What a config asks for beyond that would be passed over in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.core.errors import ConfigError
from graft.core.shards import ShardSet

SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier", "final_logit_softcapping", "attn_logit_softcapping")
KINDS = {"full_attention", "sliding_attention"}


def refuse_unlike(config: Mapping[str, Any], name: str) -> None:
    """ConfigError where logits or attention scores are scaled or capped, or layers do not attend to a whole document.

    config: of the model's text part, as in config.json or with transformers' defaults filled in. name: of the base, for people.
    """
    for key in SCALES:
        if config.get(key) not in (None, 1):
            raise ConfigError(f"{name} has {key} = {config[key]}, which graft does not compute: it would train as another model; name another base")
    if other := sorted(set(config.get("layer_types") or ()) - KINDS):
        raise ConfigError(f"{name} has layers of {other[0]!r}, which do not see whole documents, packed as they are: name another base")


def window(config: Mapping[str, Any]) -> int | None:
    """How many tokens a layer sees, the one at hand among them; None where all see the whole document. Arguments as in refuse_unlike()."""
    if config.get("use_sliding_window") is False:
        return None
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if kinds is None and layers and (config.get("max_window_layers") or 0) >= layers:  # Qwen's first layers, which have none, are all
        return None
    return config.get("sliding_window") if kinds is None or "sliding_attention" in kinds else None


def refuse_long(shards: ShardSet, where: object, config: Mapping[str, Any], name: str) -> None:
    """ConfigError where a document is longer than the base's layers see. where: the shards lie; else as in refuse_unlike()."""
    longest, seen = int(shards.doc_lens().max(initial=0)), window(config)
    if seen and longest > seen:
        raise ConfigError(
            f"{where} has a document of {longest} tokens, {name} sliding_window = {seen}, which graft does not compute: "
            f"set shard.seq_len to {seen} at most"
        )
