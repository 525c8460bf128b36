"""Reading comprehension with options: a record (article, question, options, answer) to a prompt and its reply, by the recipe's templates.

The answer is the option's number from 1, its letter, or its text. One that can be read in two ways that disagree is
refused, and so is 0: a data set that counts from 0 is not guessed at.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from graft.core.errors import ConfigError
from graft.core.rows import is_unicode
from graft.core.sections import Mcq

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARK = re.compile(r"[(\[]?([A-Za-z]|[0-9]{1,2})[)\].:、]?")  # A, (A), A., 1)


class Refused(Exception):
    """Why a record cannot be used: a short text without the record's content."""


def text_of(value: dict[str, Any], key: str) -> str:
    """The text under a key; Refused where it is missing, null, no text, blank, or holds a lone surrogate."""
    found = value.get(key)
    if found is None:
        raise Refused(f'"{key}" is null' if key in value else f'no "{key}"')
    if not isinstance(found, str):
        raise Refused(f'"{key}" is no text')
    if not found.strip():
        raise Refused(f'"{key}" is empty')
    if not is_unicode(found):
        raise Refused("lone surrogate")
    return found


def check(mcq: Mcq) -> None:
    """ConfigError where a template cannot be filled or leaves out what it must hold, or there are no two to 26 options.

    A prompt lists the options, but where the reply is an option's bare text, which may be what follows the prompt.
    """
    if not 2 <= len(mcq.options) <= len(LETTERS):
        raise ConfigError(f"mcq.options names {len(mcq.options)} keys: name 2 to {len(LETTERS)}")
    samples = {"article": "\0a", "question": "\0q", "options": "\0o", "letter": "\0l", "text": "\0t", "number": "\0n"}
    rules = (
        ("prompt", mcq.prompt, ("article", "question", "options"), ("question",) if mcq.reply == "{text}" else ("question", "options")),
        ("option", mcq.option, ("letter", "number", "text"), ("text",)),
        ("reply", mcq.reply, ("letter", "number", "text"), ()),
    )
    for name, template, known, needed in rules:
        fields = " ".join(f"{{{field}}}" for field in known)
        try:
            filled = template.format_map({field: samples[field] for field in known})
        except (KeyError, IndexError, ValueError, AttributeError, TypeError):
            raise ConfigError(f"mcq.{name} = {template!r} cannot be filled: it may hold {fields}, and a brace is written {{{{ or }}}}") from None
        if missing := [field for field in needed if samples[field] not in filled]:
            raise ConfigError(f"mcq.{name} = {template!r} leaves out {{{missing[0]}}}: it may hold {fields}")
        if "\0" not in filled:
            raise ConfigError(f"mcq.{name} = {template!r} is the same for every record: it may hold {fields}")


def render(value: dict[str, Any], mcq: Mcq) -> tuple[str, str]:
    """(prompt, reply) of a record; Refused where a text is missing or the answer names no option."""
    prompt, replies, _, right = choices(value, mcq)
    return prompt, replies[right]


def choices(value: dict[str, Any], mcq: Mcq) -> tuple[str, list[str], list[str], int]:
    """(prompt, the reply that each option would be, the options, which is right from 0) of a record; Refused as above."""
    prompt, replies, options = asked(value, mcq)
    return prompt, replies, options, answer_index(value, mcq.answer, options)


def asked(value: dict[str, Any], mcq: Mcq) -> tuple[str, list[str], list[str]]:
    """(prompt, the reply that each option would be, the options) of a record, which may lack its answer; Refused as above."""
    options = [_plain(value, key) for key in mcq.options]
    marks = [{"letter": LETTERS[i], "number": str(i + 1), "text": text} for i, text in enumerate(options)]
    listed = "\n".join(mcq.option.format_map(mark) for mark in marks)
    prompt = mcq.prompt.format_map({"article": text_of(value, mcq.article), "question": text_of(value, mcq.question), "options": listed})
    return prompt, [mcq.reply.format_map(mark) for mark in marks], options


def texts(value: dict[str, Any], mcq: Mcq) -> list[str]:
    """Article, question and options of a record, which may lack its answer, without the template; Refused as above."""
    return [text_of(value, mcq.article), text_of(value, mcq.question), *(_plain(value, key) for key in mcq.options)]


def answer_index(value: dict[str, Any], key: str, options: list[str]) -> int:
    """Which option is right, from 0."""
    text = _plain(value, key).strip()
    named = {i for i, option in enumerate(options) if option.strip() == text}
    if mark := _MARK.fullmatch(unicodedata.normalize("NFKC", text)):
        index = int(mark[1]) - 1 if mark[1].isdigit() else LETTERS.index(mark[1].upper())
        named |= {index} & set(range(len(options)))
    if not named and text == "0":
        raise Refused("the answer is 0, options count from 1")
    if len(named) != 1:
        raise Refused("the answer names two options" if named else "the answer names no option")
    return named.pop()


def _plain(value: dict[str, Any], key: str) -> str:
    """A text, or a number as text; a table has whole numbers as floats beside a null."""
    found = value.get(key)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    return str(found) if isinstance(found, int | float) and not isinstance(found, bool) else text_of(value, key)
