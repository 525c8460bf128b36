"""Stage `init`: where the embedded base starts: a byte-level BPE tokenizer trained on the recipe's text, and a small Llama, or
with [base.vision] a small Qwen2.5-VL, with random weights, saved as an ordinary Hugging Face model folder.

14,000 documents of 3 MB cost about 2 s, importing torch another 3 s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich import get_console

from graft.core.artifact import Artifact
from graft.core.errors import ConfigError
from graft.core.rows import in_texts
from graft.core.stages import Job
from graft.data.prepare import documents
from graft.data.tokenizer import VISION, train_tokenizer
from graft.model.images import write_config


def run(job: Job) -> None:
    """Write the tokenizer, config.json and model.safetensors."""
    recipe, console = job.recipe, get_console()
    shape = recipe.base
    assert shape is not None  # the stage exists for an embedded base alone
    if recipe.model.chat_template == "llama-3":
        raise ConfigError("model.chat_template = 'llama-3' does not go with model.base = 'embedded', whose tokens are chatml's: remove it")
    prepared = job.parents["prepare"]
    with job.writing() as draft:
        texts = (text for name in shape.train.corpora for text in _texts(prepared, name))
        tokenizer = train_tokenizer(texts, shape.vocab_size, images=shape.vision is not None)
        # with the template inside tokenizer_config.json, the files `tokenizer*` are all that tokenization depends on
        tokenizer.save_pretrained(draft.path, save_jinja_files=False)

        from transformers.utils.logging import disable_progress_bar

        from graft.model.base import random_llama, random_qwen_vl  # imports torch

        disable_progress_bar()  # of writing one small file

        longest = max(2048, recipe.shard.seq_len)
        if shape.vision:
            images = {token: tokenizer.convert_tokens_to_ids(token) for token in VISION}
            model = random_qwen_vl(shape, shape.vision, len(tokenizer), longest, recipe.seed, images)
            write_config(draft.path)
        else:
            model = random_llama(shape, len(tokenizer), longest, recipe.seed)
        for config in (model.config, model.generation_config):
            config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        model.save_pretrained(draft.path)
        draft.counts.update(vocabulary=len(tokenizer), parameters=model.num_parameters())
        console.print(
            f"init: a tokenizer of {len(tokenizer)} tokens, a {'Qwen2.5-VL' if shape.vision else 'Llama'} of {model.num_parameters():,} random weights",
            soft_wrap=True,
        )


def _texts(prepared: Artifact, corpus: str) -> Iterator[str]:
    """The texts of a corpus, or what is said in its chats."""
    found = documents(prepared.path, corpus)
    if prepared.counts["corpora"][corpus]["layout"] == "text":
        yield from found
    else:
        yield from (m["content"] for messages in map(json.loads, found) for m in in_texts(messages))
