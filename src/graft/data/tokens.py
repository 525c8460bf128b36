"""Texts and chats to token ids and loss masks, a batch at a time: what the sharding parts call.

Ids and masks are those of `graft.model.chat.render`; here jinja runs once a shape of conversation and masks are made for
a whole batch (see structures.py), ids come from the faster of two engines (see encoding.py). Every 256th row of a batch is
held against `render`; at the first difference the whole batch is rendered. One thread; with 131,072 tokens a GSM8K row costs
40 µs of a busy core, 300 by `tokenizers` alone and 900 by `apply_chat_template` with its mask.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from graft.core.errors import DataError
from graft.core.rows import in_texts, is_unicode, wrong_roles
from graft.data.encoding import Encoder
from graft.data.structures import Shape, Structure, compile_structure, constants, mask_by_offsets, masks, probes, shape_of
from graft.model.chat import Messages, conversation, load_tokenizer, render, special_tokens

Source = tuple[str, str | None, str]  # base, revision, chat template: what a worker loads the tokenizer by

OFTEN = 8  # rows of a batch with the same white space around their contents, from which on compiling it costs less than rendering them
SAMPLE = 256  # rows to one that is rendered as well
LONG = 1 << 20  # characters; a longer conversation is measured before it is rendered with offsets, 100 bytes a token
TOO_LONG, NOT_UNICODE, EMPTY = "longer than shard.seq_len", "no Unicode text", "no tokens"

Made = tuple[np.ndarray, np.ndarray]  # ids int32, mask uint8


class Tokens(NamedTuple):
    """A batch: row i is ids[ends[i] : ends[i + 1]] with its mask; a rejected row has a reason and no tokens."""

    ids: np.ndarray  # int32 [total]
    mask: np.ndarray  # uint8 [total], 1 where the token is a target
    ends: np.ndarray  # int64 [rows + 1], from 0
    reasons: list[str]  # "" where the row is usable
    counts: dict[str, int]  # rendered: rows that the template itself had to render; differed: batches where a faster way gave other ids


def joined(batches: Sequence[Tokens]) -> Tokens:
    """The rows of one or more batches as one; of a single one nothing is copied."""
    if len(batches) == 1:
        return batches[0]
    starts = np.cumsum([0, *(len(b.ids) for b in batches[:-1])])
    ends = [np.zeros(1, np.int64), *(b.ends[1:] + start for b, start in zip(batches, starts, strict=True))]
    ids, mask = (np.concatenate(arrays) for arrays in ([b.ids for b in batches], [b.mask for b in batches]))
    counts = sum((Counter(b.counts) for b in batches), Counter[str]())
    return Tokens(ids, mask, np.concatenate(ends), [reason for b in batches for reason in b.reasons], dict(counts))


def tokenize_texts(source: Source, texts: list[str]) -> Tokens:
    """Documents, each supervised whole and ended by <|endoftext|>, else the end of sequence, where the tokenizer has one."""
    kit = _kit(source)
    before = kit.encoder.differed
    usable = [is_unicode(text) for text in texts]
    ids, ends = kit.encoder.encode([text if good else "" for text, good in zip(texts, usable, strict=True)])
    filled = ends[1:] > ends[:-1]
    if kit.tail is not None:
        ids = np.insert(ids, ends[1:][filled], kit.tail)
        ends = ends + np.concatenate([[0], np.cumsum(filled)])
    reasons = ["" if full else EMPTY if good else NOT_UNICODE for full, good in zip(filled.tolist(), usable, strict=True)]
    return Tokens(ids.astype(np.int32, copy=False), np.ones(len(ids), np.uint8), ends, reasons, {"differed": kit.encoder.differed - before})


def tokenize_chats(source: Source, conversations: list[Messages], seq_len: int, image_tokens: Sequence[Sequence[int]] | None = None) -> Tokens:
    """Conversations with assistant-only masks; one that `render` refuses, or of more than `seq_len` tokens, is rejected, never cut.

    image_tokens: of each conversation, how many tokens stand for each of its images; those with images are rendered one by one.
    """
    kit = _kit(source)
    before = kit.encoder.differed
    made = kit.compiled(conversations)
    shown = image_tokens or [()] * len(conversations)
    differed = kit.encoder.differed > before
    sampled = [i for i in range(0, len(conversations), SAMPLE) if made[i] is not None and len(made[i][0]) <= seq_len]  # type: ignore[index]
    if not all(_same(made[i], kit.rendered(conversations[i], seq_len)) for i in sampled):
        made, differed = [None] * len(conversations), True
    found: list[Made | str] = [m if m is not None else kit.rendered(c, seq_len, n) for m, c, n in zip(made, conversations, shown, strict=True)]
    found = [TOO_LONG if not isinstance(m, str) and len(m[0]) > seq_len else m for m in found]
    pieces = [_NOTHING if isinstance(m, str) else m for m in found]
    return Tokens(
        np.concatenate([_NOTHING[0], *(ids for ids, _ in pieces)]),
        np.concatenate([_NOTHING[1], *(mask for _, mask in pieces)]),
        np.cumsum([0, *(len(ids) for ids, _ in pieces)], dtype=np.int64),
        [m if isinstance(m, str) else "" for m in found],
        {"rendered": made.count(None), "differed": int(differed)},
    )


_NOTHING: Made = (np.array([], np.int32), np.array([], np.uint8))


@cache
def _kit(source: Source) -> _Kit:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray's workers are the parallelism
    return _Kit(load_tokenizer(*source))


class _Kit:
    """A tokenizer and what was compiled for it, once a process."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.encoder = tokenizer, Encoder(tokenizer)
        self.tail = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
        self.structures: dict[Shape, Structure | None] = {}
        self.special = np.zeros(max(len(tokenizer), *tokenizer.get_vocab().values()) + 1, bool)
        self.special[sorted(special_tokens(tokenizer).ids)] = True
        self.constants = constants(tokenizer) if tokenizer.chat_template else []

    def compiled(self, conversations: list[Messages]) -> list[Made | None]:
        """Ids and masks by structures; None for a row that has to be rendered."""
        shapes = {i: found for i, messages in enumerate(conversations) if (found := self._shape(messages))}
        often = Counter(shape for shape, _ in shapes.values())
        structures = {shape: self._structure(shape) for shape, n in often.items() if n >= OFTEN or not any(b or a for _, b, a in shape)}
        return self._encoded(len(conversations), {i: (s, cores) for i, (shape, cores) in shapes.items() if (s := structures.get(shape))})

    def rendered(self, messages: Messages, seq_len: int, image_tokens: Sequence[int] = ()) -> Made | str:
        """Ids and mask as `render` makes them, or the reason why there are none."""
        try:
            texts = in_texts(messages)
            if wrong := wrong_roles(texts):
                return wrong
            if not all(is_unicode(m["content"]) for m in texts):
                return NOT_UNICODE
            if sum(len(m["content"]) for m in texts) > LONG and len(self.encoder.encode([conversation(self.tokenizer, messages)]).ids) > seq_len:
                return TOO_LONG
            done = render(self.tokenizer, messages, image_tokens)
        except DataError as e:
            return str(e)
        return np.array(done.ids, np.int32), np.array(done.loss_mask, np.uint8)

    def _shape(self, messages: Messages) -> tuple[Shape, list[str]] | None:
        """The shape of a conversation and its contents; None where it has to be rendered, if only to be refused."""
        try:
            if not all(len(m) == 2 for m in messages):  # a template may look at further keys
                return None
            shape, cores = shape_of(messages)
        except (AttributeError, KeyError, TypeError):
            return None
        contents = "\0".join(cores)
        return (shape, cores) if all(cores) and is_unicode(contents) and not any(c in contents for c in self.constants) else None

    def _structure(self, shape: Shape) -> Structure | None:
        if shape not in self.structures:
            if wrong_roles([{"role": role, "content": "x"} for role, _, _ in shape]):
                return None
            structure = compile_structure(self.tokenizer, shape)
            if structure:
                tried = probes(shape)
                plans = {i: (structure, shape_of(messages)[1]) for i, messages in enumerate(tried)}
                found = self._encoded(len(tried), plans)
                if None in found or not all(_same(m, self.rendered(c, LONG)) for m, c in zip(found, tried, strict=True)):
                    structure = None
            self.structures[shape] = structure
        return self.structures[shape]

    def _encoded(self, count: int, plans: dict[int, tuple[Structure, list[str]]]) -> list[Made | None]:
        found: list[Made | None] = [None] * count
        anchored = [i for i, (structure, _) in plans.items() if structure.anchored]
        flat = self.encoder.encode([plans[i][0].text(plans[i][1]) for i in anchored])
        groups: dict[int, tuple[Structure, list[int]]] = {}
        for row, i in enumerate(anchored):
            groups.setdefault(id(plans[i][0]), (plans[i][0], []))[1].append(row)
        for structure, members in groups.values():
            masked, fits = masks(flat, structure, np.array(members), self.special)
            for row, fit in zip(members, fits.tolist(), strict=True):
                a, b = flat.ends[row], flat.ends[row + 1]
                found[anchored[row]] = (flat.ids[a:b], masked[a:b]) if fit else None
        for i, (structure, cores) in plans.items():
            if not structure.anchored:
                encoding = self.encoder.reference.encode(structure.text(cores), add_special_tokens=False)
                ids = np.array(encoding.ids, np.int32)
                mask = mask_by_offsets(encoding, structure, cores) if self.special[ids].sum() == structure.specials else None
                found[i] = None if mask is None else (ids, mask)
        return found


def _same(made: Made | None, rendered: Made | str) -> bool:
    return made is None or (not isinstance(rendered, str) and all(map(np.array_equal, made, rendered)))
