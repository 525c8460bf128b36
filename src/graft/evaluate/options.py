"""The log-likelihood of each option of a question: of the reply that it would be, as it would be trained, or of plain text behind plain text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from graft.engine.prompt import sight, tokens_of
from graft.engine.protocol import Engine, Scored
from graft.model.chat import render
from graft.model.images import ImageProcessor, Seen


class Reply(NamedTuple):
    """A conversation, or a text, that ends with an option."""

    ids: list[int]
    first: int  # token that is a target
    mask: list[int]  # from there on, 1 of each that is
    characters: int
    images: tuple[Seen, ...] = ()  # that all of a row's show


def replies(tokenizer: Any, row: dict[str, Any], processor: ImageProcessor | None = None, images: Sequence[Any] = ()) -> list[Reply]:
    """Of a row's `messages` with each of its `replies`; DataError where one cannot be rendered surely. processor, images: as for engine/prompt.py."""
    seen = sight(processor, images)
    found = []
    for text in row["replies"]:
        done = render(tokenizer, [*row["messages"], {"role": "assistant", "content": text}], tokens_of(processor, seen))
        first = done.loss_mask.index(1)
        found.append(Reply(done.ids, first, done.loss_mask[first:], max(len(text), 1), seen))
    return found


def behind(tokenizer: Any, row: dict[str, Any], most: int) -> list[Reply]:
    """A row's `text` with each of its `replies` behind it, the text's begin left out where both are more than `most` tokens; a token that holds some of
    both is the reply's."""
    found = []
    for text in row["replies"]:
        encoded = tokenizer(row["text"] + text, return_offsets_mapping=True)
        ids = encoded["input_ids"][-most:]
        first = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(row["text"]))
        first = max(1, first - (len(encoded["input_ids"]) - len(ids)))
        found.append(Reply(ids, first, [1] * (len(ids) - first), max(len(text), 1)))
    return found


def likelihoods(engine: Engine, asked: Sequence[Sequence[Reply]], adapter: str | None) -> list[list[tuple[float, float]]]:
    """Of each question's replies: nats, and nats a character. All are scored at once; a reply's do not depend on the others."""
    every = [reply for own in asked for reply in own]
    scores = engine.scores([Scored(reply.ids, reply.first, reply.images) for reply in every], adapter)
    nats = [sum(s for s, supervised in zip(own, reply.mask, strict=True) if supervised) for own, reply in zip(scores, every, strict=True)]
    told = iter((own, own / reply.characters) for own, reply in zip(nats, every, strict=True))
    return [list(islice(told, len(own))) for own in asked]


def best(values: Sequence[float]) -> int:
    """The largest one's place; the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)
