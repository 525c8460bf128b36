"""A byte-level BPE tokenizer with chatml tokens and template, trained on text: of embedded and of random bases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graft.model.chat import IMAGE, TEMPLATES, WITH_IMAGES

END_OF_TEXT, START, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
VISION = ["<|vision_start|>", "<|vision_end|>", IMAGE]


def train_tokenizer(texts: Iterable[str], vocab_size: int, images: bool = False) -> Any:
    """A byte-level BPE tokenizer with chatml tokens and template; the same texts give the same one.

    vocab_size: at most this many tokens, special ones included; little text gives fewer. images: with the tokens and the template of Qwen2.5-VL's.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    more = VISION if images else []
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    # a token a Han character: words that share one share it in every context, which a small model learns from
    isolated = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([isolated, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START, END, PAD, *more],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, extra_special_tokens=[END_OF_TEXT, START, *more], clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = WITH_IMAGES if images else TEMPLATES["chatml"]
    return tokenizer
