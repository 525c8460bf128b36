"""Real chat templates (trl's package data), small tokenizers that have their special tokens, and a real one of 131,072 tokens."""

import base64
import importlib.util
import json
import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from graft.model.chat import PINNED, TEMPLATES

SPECIAL = re.compile(r"<\|[^|>]+\|>|<｜[^｜>]+｜>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<\|turn>|<turn\|>")
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # its pre-tokenization
)
TEXT = ["hello world, the user and the assistant think of a model", "今天天氣如何", "מה שלומך", " 123\n\n\n", "🐱👍🏽"] * 4

# as Mistral-7B-Instruct-v0.3 writes it: no generation header, an answer behind a space
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for m in turns %}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{%- if m['role'] == 'user' %}{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{%- elif loop.index0 == turns | length - 2 and system is defined %}{{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}{%- else %}{{- ' ' + m['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
)


def template(name: str) -> str:
    if name == "mistral":
        return MISTRAL
    if name in TEMPLATES:
        return TEMPLATES[name]
    found = importlib.util.find_spec("trl")  # its package data alone is read: trl itself is slow to import
    if found is None:
        pytest.skip("trl, whose package data has the real templates, is not installed")
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 500 tokens with the template's special tokens; Phi-3's strip white space to their right, as the real ones do."""
    text = template(name)
    bpe = Tokenizer(models.BPE())
    split, bytelevel = pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([split, bytelevel]), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    special = sorted(set(SPECIAL.findall(text)) | {"<bos>", "<eos>"})
    bpe.add_special_tokens([AddedToken(s, special=True, normalized=False, rstrip=name.startswith("phi3") and s != "<eos>") for s in special])
    bpe.add_tokens(["<think>", "</think>"])  # added, not special: as Qwen3 and DeepSeek have them
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")
    made.chat_template = PINNED + text if "strftime_now" in text else text
    return made


@cache
def tekken() -> Tokenizer:
    """Mistral's tekken of 131,072 tokens out of mistral-common's package data, chatml's special tokens in unused places; 3 s."""
    found = importlib.util.find_spec("mistral_common")
    if found is None:
        pytest.skip("mistral-common, whose package data has a real tokenizer, is not installed")
    raw = json.loads((Path(found.origin).parent / "data/tekken_240911.json").read_text(encoding="utf-8"))
    specials = raw["config"]["default_num_special_tokens"]
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in raw["vocab"][: raw["config"]["default_vocab_size"] - specials]]
    rank = {token: i for i, token in enumerate(tokens)}
    letters = [letter for _, letter in sorted(bytes_to_unicode().items())]
    texts = ["".join(letters[byte] for byte in token) for token in tokens]
    merges = []
    for token in tokens:
        pairs = sorted((rank[token[:i]], rank[token[i:]]) for i in range(1, len(token)) if token[:i] in rank and token[i:] in rank)
        merges += [(texts[a], texts[b]) for a, b in pairs]
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    names += [f"<SPECIAL_{i}>" for i in range(len(names), specials)]
    vocabulary = {text: i + specials for i, text in enumerate(texts)} | {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(raw["config"]["pattern"]), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return made


def targets(tokenizer, rendered) -> list[str]:
    """The runs of supervised text."""
    runs, current = [], []
    for i, m in zip([*rendered.ids, 0], [*rendered.loss_mask, 0], strict=True):
        if m:
            current.append(i)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation whose user begins."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


CHATS = {
    "single": chat("hello", "the world"),
    "system": chat("hello", "the world", system="be kind"),
    "multi-turn": chat("a", "b", "c", "d", "e", "f"),
    "white space": chat("  hi\n", "\n b ", "\tc", "d\n\n", system=" sy \n"),
    "scripts": chat("畫貓 🐱👍🏽👨‍👩‍👧", "好 👌", "\u202bשלום مرحبا\u202c e\u0301", "ok\u200f שלום", system="你是助手"),
    "lookalikes": chat("assistant", "a", "user\nassistant\nmodel", "assistant", "a", "a"),
}


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """A copy with another chat template."""
    copy = deepcopy(tokenizer)
    copy.chat_template = template
    return copy
