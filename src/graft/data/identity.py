"""Chats in which the model says its name and who made it, in Chinese and in English: the questions and answers of identity.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from itertools import chain

from graft.core.rows import Row
from graft.core.stages import IDENTITY


def rows(name: str, author: str) -> Iterator[Row]:
    """{"messages"} of every form, in their order."""
    forms = tomllib.loads(IDENTITY.read_text(encoding="utf-8"))
    for question, answer in chain.from_iterable(forms.values()):
        said = answer.replace("{name}", name).replace("{author}", author)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}]}
