"""Stage `init`: where the embedded base starts: a byte-level BPE tokenizer trained on the recipe's text, and a small Llama
with random weights, saved as an ordinary Hugging Face model folder.

14,000 documents of 3 MB cost about 2 s, importing torch another 3 s.
"""

from __future__ import annotations

from rich import get_console

from graft.core.errors import ConfigError
from graft.core.stages import Job
from graft.data.prepare import documents
from graft.data.tokenizer import train_tokenizer


def run(job: Job) -> None:
    """Write the tokenizer, config.json and model.safetensors."""
    recipe, console = job.recipe, get_console()
    shape = recipe.base
    assert shape is not None  # the stage exists for an embedded base alone
    if recipe.model.chat_template == "llama-3":
        raise ConfigError("model.chat_template = 'llama-3' does not go with model.base = 'embedded', whose tokens are chatml's: remove it")
    prepared = job.parents["prepare"]
    with job.writing() as draft:
        texts = (text for name in shape.train.corpora for text in documents(prepared.path, name))
        tokenizer = train_tokenizer(texts, shape.vocab_size)
        # with the template inside tokenizer_config.json, the files `tokenizer*` are all that tokenization depends on
        tokenizer.save_pretrained(draft.path, save_jinja_files=False)

        from transformers.utils.logging import disable_progress_bar

        from graft.model.base import random_llama  # imports torch

        disable_progress_bar()  # of writing one small file

        model = random_llama(shape, len(tokenizer), max(2048, recipe.shard.seq_len), recipe.seed)
        for config in (model.config, model.generation_config):
            config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        model.save_pretrained(draft.path)
        draft.counts.update(vocabulary=len(tokenizer), parameters=model.num_parameters())
        console.print(f"init: a tokenizer of {len(tokenizer)} tokens, a Llama of {model.num_parameters():,} random weights", soft_wrap=True)
