"""Tokenizer, chat template and assistant-only loss mask. Imports transformers inside functions and never torch.

A conversation is rendered to text once, by the tokenizer's own template, and tokenized once without added tokens: the ids
are those of `apply_chat_template`, with the BOS that the template writes and no second one. An answer's targets begin
where its generation prompt ends and end with the special token (or adjacent ones) behind its content, the end of turn; white
space behind that is no target, nor is a token that begins before the answer. Where the template marks its answers with {% generation %},
targets do not begin before the mark. What cannot be masked surely is a DataError, never a wrong mask.

A content may be a list of parts, of text and images: `render` gives each image as many placeholder tokens as it is told. Where the
template writes an image is found by stand-ins too, and the conversation with that markup as text must be what the template makes of the parts.

Templates may strip contents, drop the reasoning of earlier answers, move the system prompt, or write one of their own:
answers are found by rendering the conversation again with stand-ins for contents. This is the slow, obviously right way,
0.5 to 2 ms a row; `graft.data.tokens` is the fast one, and is held against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from graft.core.artifact import digest_of
from graft.core.errors import ConfigError, DataError
from graft.core.hub import model_folder
from graft.core.rows import in_texts, wrong_roles

Messages = list[dict[str, Any]]  # role, and content: a text, or a list of parts {"type": "text", "text"} and {"type": "image", …}
Span = tuple[int, int]  # of characters

# chatml as Qwen writes it; llama-3 as Meta's Llama-3 instruct models write it (the header's blank line included); alpaca as
# https://github.com/tatsu-lab/stanford_alpaca prompts without an input, a further turn behind a blank line
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% else %}Below is an instruction that describes a "
        "task. Write a response that appropriately completes the request.{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}{{ '\n\n' }}"
        "### Instruction:\n{{ m['content'] | trim }}{{ '\n\n' }}### Response:\n{% elif m['role'] == 'assistant' %}{{ m['content'] | trim }}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
# chatml for messages of parts, as Qwen2.5-VL writes it
WITH_IMAGES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE = "<|image_pad|>"  # the token that stands for a patch of an image
END_OF_TURN = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}  # alpaca's is the tokenizer's end of sequence

# Some templates tell the model today's date. Ids may not depend on the day, so it is always the one that Llama-3 falls back to.
_DATE = {"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri", "%H": "00", "%M": "00", "%S": "00"}
PINNED = "{%- macro strftime_now(format) -%}{{ format" + "".join(f" | replace('{k}', '{v}')" for k, v in _DATE.items()) + " }}{%- endmacro %}\n"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_PREFILL = re.compile(r"<think>\s*(?:</think>\s*)?\Z")  # a generation prompt that opens the reasoning


def in_chatml(messages: Messages) -> str:
    """A conversation as text in chatml markup, for corpora that teach a base the markup itself."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


@dataclass(frozen=True)
class Rendered:
    """ids and loss_mask, equally long; mask[i] = 1 where token i is a target."""

    ids: list[int]
    loss_mask: list[int]


def load_tokenizer(base: str, revision: str | None = None, chat_template: str = "tokenizer") -> Any:
    """The base's fast tokenizer with the recipe's template, whose date is pinned; ConfigError where it has none or lacks the template's tokens.

    chat_template: "tokenizer" for its own, one of TEMPLATES, or a template's text.
    """
    from transformers import AutoTokenizer

    folder = model_folder(base, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"model.base = {base!r}: no tokenizer can be loaded ({_first_line(e)}); name a Hugging Face model folder or hub id"
        ) from None
    if chat_template in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[chat_template]
        end = END_OF_TURN.get(chat_template, tokenizer.eos_token)
        if end is None or tokenizer.convert_tokens_to_ids(end) in (None, tokenizer.unk_token_id):
            raise ConfigError(
                f"model.chat_template = {chat_template!r} ends a turn with {end or 'an end of sequence'}, which the tokenizer of {base!r} does not have"
            )
    elif chat_template != "tokenizer":
        tokenizer.chat_template = chat_template
        _refuse_broken(tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, str) and "strftime_now" in template and not template.startswith(PINNED):
        tokenizer.chat_template = PINNED + template
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer of {base!r} has no fast version, which offsets need: convert it with transformers")
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what decides token ids: the tokenizer's own JSON and the chat template, but not how the last call padded and cut."""
    own = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return digest_of({"tokenizer": own, "chat_template": tokenizer.chat_template})


def render_prompt(tokenizer: Any, messages: Messages, image_tokens: Sequence[int] = ()) -> list[int]:
    """Ids of the conversation up to and with the assistant's header: what generation starts from. image_tokens: as render() takes them.

    Raises DataError where the images that are shown are not those that are given, ConfigError where the template shows none.
    """
    shown = any(isinstance(m["content"], list) for m in messages)
    text = _apply(tokenizer, _flat(tokenizer, messages) if shown else messages, True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _expanded(tokenizer, ids, ids, image_tokens)[0] if shown else ids


def render(tokenizer: Any, messages: Messages, image_tokens: Sequence[int] = ()) -> Rendered:
    """Ids and assistant-only loss mask. image_tokens: how many tokens stand for each image of the conversation, in order.

    Raises DataError where roles are unbalanced, a content holds a special token's text (which would become that token), the
    template refuses the conversation, or its answers cannot be found surely. ConfigError: the tokenizer has no template.
    """
    texts = in_texts(messages)
    if wrong := wrong_roles(texts):
        raise DataError(wrong)
    special = special_tokens(tokenizer)
    for message in texts:
        if found := special.pattern.search(message["content"]):
            raise DataError(f"a message holds the text of the special token {found[0]}")
    shown = any(isinstance(m["content"], list) for m in messages)
    if shown:
        given, messages = messages, _flat(tokenizer, messages)
    text = conversation(tokenizer, messages)
    if shown and conversation(tokenizer, given) != text:
        raise DataError("the chat template writes an image otherwise in this conversation")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if sum(i in special.ids for i in ids) != len(special.pattern.findall(text)):
        raise DataError("the text of a message becomes a special token")
    mask = [0] * len(ids)
    for start, end in answer_spans(tokenizer, messages, text):
        first = min((i for i, (a, b) in enumerate(offsets) if start <= a < b), default=len(ids))
        last = max((i for i, (a, b) in enumerate(offsets) if a < end <= b), default=-1)
        if first >= last or ids[last] not in special.ids:
            raise DataError("no token of an answer is left to learn")
        mask[first : last + 1] = [1] * (last + 1 - first)
    return Rendered(*_expanded(tokenizer, ids, mask, image_tokens)) if shown else Rendered(ids, mask)


# ---- images ----------------------------------------------------------------------------------------------------------------
def image_parts(messages: Messages) -> list[dict[str, Any]]:
    """The parts {"type": "image", …} of a conversation, in order."""
    return [part for m in messages if isinstance(m["content"], list) for part in m["content"] if part["type"] == "image"]


def files_of(messages: Messages) -> list[str]:
    """The files of the images that a conversation shows, in order."""
    return [part["file"] for part in image_parts(messages)]


def _flat(tokenizer: Any, messages: Messages) -> Messages:
    """Messages whose contents are texts, an image as the template writes it."""
    found = []
    for m in messages:
        if isinstance(m["content"], list):
            if m["role"] != "user":
                raise DataError("an image that is not the user's")
            m = {**m, "content": "".join(_markup(tokenizer) if part["type"] == "image" else part["text"] for part in m["content"])}
        found.append(m)
    return found


@lru_cache(maxsize=8)
def _markup(tokenizer: Any) -> str:
    """What the template writes for an image; ConfigError where it writes none."""
    before, after = "\ue0f1", "\ue0f2"
    parts = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    try:
        text = conversation(tokenizer, [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}])
    except (DataError, TypeError):  # a template of texts adds a list to one
        text = ""
    found = text.partition(before)[2].partition(after)[0]
    if found.count(IMAGE) != 1:
        raise ConfigError(f"the chat template of the base writes no {IMAGE} for an image: name a Qwen2.5-VL model, with its own template")
    return found


def _expanded(tokenizer: Any, ids: list[int], mask: list[int], image_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Each image's token as often as it stands for the image; masks of 0."""
    image, counts = tokenizer.convert_tokens_to_ids(IMAGE), iter(image_tokens)
    if ids.count(image) != len(image_tokens):
        raise DataError(f"{ids.count(image)} images in the conversation, {len(image_tokens)} are given")
    times = [next(counts) if i == image else 1 for i in ids]
    return [i for i, n in zip(ids, times, strict=True) for _ in range(n)], [m for m, n in zip(mask, times, strict=True) for _ in range(n)]


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Ids that end a generation: the end of sequence, and the token with which the template closes a turn."""
    done = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    closing = max(i for i, m in enumerate(done.loss_mask) if m)
    return sorted({done.ids[closing]} | ({tokenizer.eos_token_id} - {None}))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # one file decides ids and template, and digests cover it


def conversation(tokenizer: Any, messages: Messages, generation: bool = False) -> str:
    """The conversation as the template writes it; DataError where it refuses."""
    from jinja2 import TemplateError

    try:
        return _apply(tokenizer, messages, generation)
    except TemplateError as e:
        raise DataError(f"the chat template refuses the conversation: {_first_line(e)}") from None


def _refuse_broken(tokenizer: Any) -> None:
    """ConfigError where the template is none; one that only refuses a conversation may suit the rows."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        _apply(tokenizer, [{"role": "user", "content": "a"}], True)
    except TemplateSyntaxError as e:
        raise ConfigError(f"model.chat_template is no Jinja template: line {e.lineno}: {_first_line(e)}") from None
    except TemplateError:
        pass


def _apply(tokenizer: Any, messages: Messages, generation: bool) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer has no chat template: set model.chat_template to one of {', '.join(map(repr, TEMPLATES))}, or to a .jinja file"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)


# ---- special tokens --------------------------------------------------------------------------------------------------------
class Special(NamedTuple):
    pattern: re.Pattern[str]  # finds the text of a special token
    ids: frozenset[int]  # without that of unknown text, which needs no special token to appear


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> Special:
    """The tokenizer's special tokens, as they are at the first call."""
    texts = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content}
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    return Special(pattern, frozenset(texts.values()) - {tokenizer.unk_token_id})


# ---- where the answers are ---------------------------------------------------------------------------------------------------
class Stand:
    """Conversations with a stand-in for each content: text that no content holds, with the white space around the content kept."""

    def __init__(self, messages: Messages):
        contents = "".join(m["content"] for m in messages)
        salt = next(n for n in count() if f"\ue0f1{n}\ue0f2" not in contents)
        self.pattern = re.compile(f"\ue0f1{salt}\ue0f2(\\d+)\ue0f1")
        self.messages = []
        for i, m in enumerate(messages):
            before, after = around(m["content"])
            self.messages.append({**m, "content": f"{before}\ue0f1{salt}\ue0f2{i}\ue0f1{after}"})

    def split(self, text: str) -> list[str]:
        """Literal, number of a message, literal, number, …, literal."""
        return self.pattern.split(text)


def around(content: str) -> tuple[str, str]:
    """The white space before and behind a content."""
    return content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]


def answer_spans(tokenizer: Any, messages: Messages, text: str) -> list[Span]:
    """Where the targets of each answer lie in `text`, the rendered conversation: from the end of the generation prompt to the end of turn.

    All but the answers must be the text of the conversation with stand-ins, the contents put in: so each answer's place is sure.
    """
    stand, special = Stand(messages), special_tokens(tokenizer)
    parts = stand.split(conversation(tokenizer, [m if m["role"] == "assistant" else s for m, s in zip(messages, stand.messages, strict=True)]))
    whole = parts[:1]
    starts = {}  # of the literal behind a message
    for number, literal in zip(parts[1::2], parts[2::2], strict=True):
        whole.append(messages[int(number)]["content"].strip())
        starts[int(number)] = sum(map(len, whole))
        whole.append(literal)
    if "".join(whole) != text:
        raise DataError("the chat template changes the text of a message")
    skeleton = stand.split(conversation(tokenizer, stand.messages))
    final = _behind(skeleton, len(messages) - 1)
    spans = []
    for i in (n for n, m in enumerate(messages) if m["role"] == "assistant"):
        prompt = _behind(stand.split(conversation(tokenizer, stand.messages[:i], True)), i - 1)
        turn, closing = _behind(parts, i - 1), _behind(skeleton, i)
        first, last = _begin(prompt, turn), len(turn) - len(closing)
        if last <= first or not turn.endswith(closing):
            raise DataError("the chat template changes the text of a message")
        _check_content(messages[i]["content"], turn[:last], i == len(messages) - 1)
        spans.append((starts[i - 1] + first, starts[i - 1] + last + _end(closing, final, special.pattern)))
    return _marked(tokenizer, messages, spans) if _GENERATION.search(tokenizer.chat_template) else spans


def _behind(parts: list[str], message: int) -> str:
    """The literal behind the content of a message; DataError where that content is not there exactly once."""
    if parts[1::2].count(str(message)) != 1:
        raise DataError("the chat template drops or repeats a message")
    return parts[2 * parts[1::2].index(str(message)) + 2]


def _begin(prompt: str, turn: str) -> int:
    """Length of the generation prompt at the begin of a turn. A reasoning that it opens may be absent: templates cut it."""
    for header in (prompt, _PREFILL.sub("", prompt)):
        if turn.startswith(header):
            return len(header)
    raise DataError("the chat template's generation prompt is not how it begins an answer")


def _end(closing: str, final: str, special: re.Pattern[str]) -> int:
    """Length of the end of turn: the first special token behind an answer, and those adjacent that also close the conversation."""
    found, last = special.search(closing), special.search(final)
    if not found or not last:
        raise DataError("the chat template closes an answer with no special token, so its end cannot be learned")
    begin, end = found.start(), found.end()
    while (found := special.match(closing, end)) and final.startswith(closing[begin : found.end()], last.start()):
        end = found.end()
    return end


def _check_content(content: str, turn: str, is_last: bool) -> None:
    """DataError where an answer as rendered lacks some of its content, white space aside; only an earlier one may lose its reasoning."""
    wanted, found = "".join(content.split()), "".join(turn.split())
    if wanted in found:
        return
    if "</think>" not in wanted or wanted.rsplit("</think>", 1)[1] not in found:
        raise DataError("the chat template changes the text of a message")
    if is_last:
        raise DataError("the chat template drops the reasoning of the last answer")


def _marked(tokenizer: Any, messages: Messages, spans: list[Span]) -> list[Span]:
    """The spans, none beginning before the {% generation %} block that it overlaps."""
    from transformers.utils.chat_template_utils import render_jinja_template

    known: dict[str, Any] = {"chat_template": tokenizer.chat_template, "return_assistant_tokens_mask": True, **tokenizer.special_tokens_map}
    marks: Any = render_jinja_template([messages], **known)[1]
    blocks: list[Span] = [(a, b) for a, b in marks[0] if b > a]
    found = []
    for start, end in spans:
        block = next((b for b in blocks if b[0] < end and b[1] > start), None)
        if block is None:
            raise DataError("the chat template's {% generation %} blocks are not its answers")
        found.append((max(start, block[0]), end))
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160]
