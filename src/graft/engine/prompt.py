"""A conversation, with the images that it shows, as an engine is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graft.core.errors import DataError
from graft.model.chat import Messages, render_prompt
from graft.model.images import ImageProcessor, Seen


def prompt(tokenizer: Any, messages: Messages, processor: ImageProcessor | None, images: Sequence[Any] = ()) -> tuple[list[int], tuple[Seen, ...]]:
    """(prompt_ids, images) of a Request. images: RGB images of PIL, or Seen, one for each part {"type": "image"} of the messages, in order.

    DataError where a base of text alone is shown one, or more or fewer are given than are shown. An image of 1 MP takes 60 ms of a core.
    """
    seen = sight(processor, images)
    return render_prompt(tokenizer, messages, tokens_of(processor, seen)), seen


def sight(processor: ImageProcessor | None, images: Sequence[Any]) -> tuple[Seen, ...]:
    """The images as the tower takes them; DataError where there is none."""
    if images and processor is None:
        raise DataError("the conversation shows images, and the model sees none")
    return tuple(i if isinstance(i, Seen) else processor.seen(i) for i in images) if processor else ()


def tokens_of(processor: ImageProcessor | None, seen: Sequence[Seen]) -> list[int]:
    """How many tokens stand for each."""
    return [processor.tokens(s.grid) for s in seen] if processor else []
