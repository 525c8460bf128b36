"""Chat templates compiled by the shape of a conversation, so that jinja and offsets are not needed a row.

The shape is the roles and the white space around each content. The template is rendered once a shape with stand-ins for
the contents: what stays is literals between contents. Where special tokens frame an answer, the mask follows from the ids
alone: the content holds no special token (a row that does is left to `render`, which refuses it), so the n-th special
token of a row is the n-th of its literals. Templates without them (alpaca) need offsets, at the speed of `tokenizers`; so do
rows where a header and an answer share a token.

A shape counts as compiled only where three conversations of it give what `graft.model.chat.render` gives. Rows whose text
the template may look into ("</think>") are not compiled: those that hold one of the template's own string constants.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from graft.core.errors import DataError
from graft.data.encoding import PROBES, Flat
from graft.model.chat import PINNED, Messages, Stand, answer_spans, around, conversation, special_tokens

Shape = tuple[tuple[str, str, str], ...]  # role, white space before and behind the content


class Frame(NamedTuple):
    """Where one answer's targets begin and end."""

    opening: int  # number, among the row's special tokens, of the last one before the answer; -1: there is none to hold on to
    header: np.ndarray  # ids between it and the answer
    closing: int  # number of the end of turn
    start: tuple[int, int]  # the same in characters: number of a literal, characters into it
    end: tuple[int, int]


class Structure(NamedTuple):
    literals: list[str]  # before, between and behind the contents
    order: list[int]  # the messages in the order in which their contents come
    specials: int  # special tokens in the literals
    frames: list[Frame]

    def text(self, cores: list[str]) -> str:
        """The conversation of these contents, white space around them taken off."""
        pieces = [""] * (2 * len(self.order) + 1)
        pieces[::2] = self.literals
        pieces[1::2] = [cores[i] for i in self.order]
        return "".join(pieces)

    @property
    def anchored(self) -> bool:
        return all(frame.opening >= 0 for frame in self.frames)


def compile_structure(tokenizer: Any, shape: Shape) -> Structure | None:
    """The structure of conversations of this shape; None where the template refuses it or its answers cannot be found surely."""
    special = special_tokens(tokenizer)
    stand = Stand([{"role": role, "content": f"{before}x{after}"} for role, before, after in shape])
    try:
        text = conversation(tokenizer, stand.messages)
        spans = answer_spans(tokenizer, stand.messages, text)
    except DataError:
        return None
    parts = stand.split(text)
    found = list(special.pattern.finditer(text))
    holes = list(stand.pattern.finditer(text))
    begins = [0, *(hole.end() for hole in holes)]  # of the literals
    ends = [found_.end() for found_ in found]

    def place(at: int) -> tuple[int, int]:
        k = bisect_left(begins, at + 1) - 1
        return k, at - begins[k]

    frames = []
    for start, end in spans:
        literal, _ = place(start)
        opening = bisect_left(ends, start + 1) - 1
        if opening < 0 or (begin := found[opening].start()) < begins[literal]:
            frames.append(Frame(-1, np.array([], np.int32), -1, place(start), place(end)))
            continue
        # what follows decides how the header is cut, so a little of it is encoded too
        encoded = tokenizer(text[begin : holes[literal].end()], add_special_tokens=False, return_offsets_mapping=True)
        header = [(i, b) for i, (_, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True) if b <= start - begin]
        if header[-1:] and header[-1][1] == start - begin:
            frames.append(Frame(opening, np.array([i for i, _ in header[1:]], np.int32), ends.index(end), place(start), place(end)))
        else:  # the header's last token reaches into the answer
            frames.append(Frame(-1, np.array([], np.int32), -1, place(start), place(end)))
    return Structure(parts[::2], [int(i) for i in parts[1::2]], len(found), frames)


def probes(shape: Shape) -> list[Messages]:
    """Conversations of a shape that its structure is tried on."""
    texts = [text.strip() for text in PROBES[:8]]
    return [[{"role": r, "content": b + texts[(k * 3 + i) % len(texts)] + a} for i, (r, b, a) in enumerate(shape)] for k in range(3)]


def shape_of(messages: Messages) -> tuple[Shape, list[str]]:
    """The shape of a conversation and its contents without the white space around them."""
    shape, cores = [], []
    for message in messages:
        content = message["content"]
        core = content.strip()
        before, after = around(content) if len(core) != len(content) else ("", "")
        shape.append((message["role"], before, after))
        cores.append(core)
    return tuple(shape), cores


def constants(tokenizer: Any) -> list[str]:
    """String constants of the template that could be what it looks for in a content, none inside another.

    Not those of special tokens (no content holds one), nor prose, words and short marks: messages, roles, keys, punctuation.
    """
    import jinja2

    template = tokenizer.chat_template.removeprefix(PINNED)
    tokens = jinja2.Environment().lex(template)
    texts = {value[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape").strip() for _, kind, value in tokens if kind == "string"}
    texts |= {mark for mark in ("<think>", "</think>") if mark in template}  # the generation prompt may open a reasoning
    pattern = special_tokens(tokenizer).pattern
    texts = {t for t in texts if len(t) > 3 and len(t.split()) == 1 and not t.isidentifier() and not pattern.search(t)}
    return sorted(t for t in texts if not any(other in t for other in texts - {t}))


def masks(flat: Flat, structure: Structure, rows: np.ndarray, special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mask of all of flat.ids by an anchored structure of `rows`, and which of them it fits (bool [rows]).

    special: bool [vocabulary], True for a special token's id.
    """
    at = np.flatnonzero(special[flat.ids])
    first = np.searchsorted(at, flat.ends[rows])
    fits = np.searchsorted(at, flat.ends[rows + 1]) - first == structure.specials
    if not fits.any():
        return np.zeros(len(flat.ids), np.uint8), fits
    borders = []
    for frame in structure.frames:
        begin = at[np.minimum(first + frame.opening, len(at) - 1)] + 1
        close = at[np.minimum(first + frame.closing, len(at) - 1)]
        for i, wanted in enumerate(frame.header):
            fits &= (begin + i < close) & (flat.ids[np.minimum(begin + i, len(flat.ids) - 1)] == wanted)
        fits &= begin + len(frame.header) < close
        borders.append((begin + len(frame.header), close))
    edges = np.zeros(len(flat.ids) + 1, np.int8)
    for begin, close in borders:
        edges[begin[fits]] += 1
        edges[close[fits] + 1] -= 1
    return np.cumsum(edges[:-1], dtype=np.int8).view(np.uint8), fits


def mask_by_offsets(encoding: Any, structure: Structure, cores: list[str]) -> np.ndarray | None:
    """Mask of one conversation by the offsets of its tokens; None where a border lies in no token."""
    lengths = [
        0,
        *accumulate(
            len(literal) + (len(cores[structure.order[k]]) if k < len(structure.order) else 0) for k, literal in enumerate(structure.literals)
        ),
    ]
    mask = np.zeros(len(encoding), np.uint8)
    for frame in structure.frames:
        start, end = (lengths[k] + offset for k, offset in (frame.start, frame.end))
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None:
            return None
        first += encoding.token_to_chars(first)[0] < start  # begins before the answer
        mask[first : last + 1] = 1
    return mask
