"""Tokenizer, chat template and assistant-only loss mask. Imports transformers inside functions and never torch.

A conversation is rendered to text once by the tokenizer's own template; the assistant's spans are the text between the
prompt that ends in a generation header and the same conversation with the answer, end of turn included. Ids come from
one tokenization of the whole text, so they are what serving will see.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.core.errors import ConfigError, DataError
from graft.core.rows import wrong_roles

Messages = list[dict[str, str]]

# chatml as Qwen writes it; llama-3 as Meta's Llama-3 instruct models write it (the header's blank line included)
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}
END_OF_TURN = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}


def in_chatml(messages: Messages) -> str:
    """A conversation as text in chatml markup, for corpora that teach a base the markup itself."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


@dataclass(frozen=True)
class Rendered:
    """ids and loss_mask, equally long; mask[i] = 1 where token i is a target."""

    ids: list[int]
    loss_mask: list[int]


def load_tokenizer(base: str, revision: str | None = None, chat_template: str = "tokenizer") -> Any:
    """The base's fast tokenizer with the recipe's template; ConfigError where it has none or lacks the template's tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"model.base = {base!r}: no tokenizer can be loaded ({_first_line(e)}); name a Hugging Face model folder or hub id"
        ) from None
    if chat_template != "tokenizer":
        tokenizer.chat_template = TEMPLATES[chat_template]
        end = END_OF_TURN[chat_template]
        if tokenizer.convert_tokens_to_ids(end) in (None, tokenizer.unk_token_id):
            raise ConfigError(f"model.chat_template = {chat_template!r} ends a turn with {end}, which the tokenizer of {base!r} does not have")
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer of {base!r} has no fast version, which offsets need: convert it with transformers")
    return tokenizer


def render_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Ids of the conversation up to and with the assistant's header: what generation starts from."""
    text = _apply(tokenizer, messages, True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(tokenizer: Any, messages: Messages) -> Rendered:
    """Ids and assistant-only loss mask; DataError where the roles are unbalanced or the template is no prefix code."""
    if wrong := wrong_roles(messages):
        raise DataError(wrong)
    text = _apply(tokenizer, messages, False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = len(_apply(tokenizer, messages[:i], True)), len(_apply(tokenizer, messages[: i + 1], False))
        if not text.startswith(_apply(tokenizer, messages[:i], True)):
            raise DataError("the chat template does not render a prompt as a prefix of the conversation: no loss mask can be made")
        spans.append((start, start + len(text[start:end].rstrip())))  # white space behind the end of turn is no target
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(s <= a and b <= e for s, e in spans)) if b > a else 0 for a, b in encoded["offset_mapping"]]
    if not any(mask):
        raise DataError("no token of the assistant is left to learn")
    return Rendered(encoded["input_ids"], mask)


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Ids that end a generation: the end of sequence, and the token with which the template closes a turn."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    done = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    last = max(i for i, m in enumerate(done.loss_mask) if m)
    if done.ids[last] in tokenizer.all_special_ids or done.ids[last] in tokenizer.added_tokens_decoder:
        ids.add(done.ids[last])
    return sorted(ids)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # one file decides ids and template, and digests cover it


def _apply(tokenizer: Any, messages: Messages, generation: bool) -> str:
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template: set model.chat_template to 'chatml' or 'llama-3'")
    if not messages:  # a template may refuse an empty list; a conversation never starts with the assistant
        return ""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160]
