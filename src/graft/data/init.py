"""Stage `init`: where the embedded base starts: a byte-level BPE tokenizer trained on the recipe's text, and a small Llama
with random weights, saved as an ordinary Hugging Face model folder.

14,000 documents of 3 MB cost about 2 s, importing torch another 3 s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import get_console

from graft.core.errors import ConfigError
from graft.core.stages import Job
from graft.data.prepare import documents
from graft.model.chat import TEMPLATES

END_OF_TEXT, START, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"


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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with chatml tokens and template; the same texts give the same one.

    vocab_size: at most this many tokens, special ones included; little text gives fewer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    # a token a Han character: words that share one share it in every context, which a small model learns from
    isolated = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([isolated, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START, END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, extra_special_tokens=[END_OF_TEXT, START], clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATES["chatml"]
    return tokenizer
