"""The function call in an assistant's answer: `call("generate_image", {"prompt": "..."})`.

A recursive-descent reader over Python's own JSON decoder: spacing, quote style, full-width punctuation and key order
are free; anything else that starts like a call is malformed.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["call", "text", "malformed"]
_LOOKS_LIKE_CALL = re.compile(r"\bcall\s*[(（\"'{]", re.IGNORECASE)
_OPEN, _CLOSE, _COMMA = "(（", ")）", ",，"


@dataclass(frozen=True)
class Answer:
    """What an answer is: a well-formed call (name and arguments), plain text, or a malformed call (with the reason)."""

    kind: Kind
    name: str | None = None
    arguments: dict[str, Any] | None = None
    reason: str | None = None


def parse_answer(text: str, function: str, argument: str) -> Answer:
    """Classify `text`: a call of `function` with a non-empty string `argument`, text, or malformed.

    The call must be the whole answer but for white space and a final full stop or semicolon.
    """
    if not _LOOKS_LIKE_CALL.search(text):
        return Answer("text")
    try:
        name, arguments = _Reader(text.strip()).call()
    except ValueError as e:
        return Answer("malformed", reason=str(e))
    if name != function:
        return Answer("malformed", name, arguments, f"the function is {name!r}, expected {function!r}")
    value = arguments.get(argument)
    if not isinstance(value, str) or not value.strip():
        return Answer("malformed", name, arguments, f"the argument {argument!r} is missing or no text")
    return Answer("call", name, arguments)


def format_call(function: str, argument: str, value: str) -> str:
    return f"call({json.dumps(function)}, {json.dumps({argument: value}, ensure_ascii=False)})"


class _Reader:
    def __init__(self, text: str):
        self.text, self.at = text, 0

    def call(self) -> tuple[str, dict[str, Any]]:
        self._skip()
        if self.text[self.at : self.at + 4].lower() != "call":
            raise ValueError("text stands before the call")
        self.at += 4
        self._take(_OPEN, "an opening bracket")
        name = self._string()
        self._take(_COMMA, "a comma")
        arguments = self._object()
        self._take(_CLOSE, "the closing bracket")
        self._skip()
        if self.text[self.at :].strip("；;。. \n\t"):
            raise ValueError("text stands behind the call")
        return name, arguments

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def _take(self, any_of: str, what: str) -> None:
        self._skip()
        if self.at >= len(self.text) or self.text[self.at] not in any_of:
            raise ValueError(f"{what} is missing at character {self.at}")
        self.at += 1

    def _string(self) -> str:
        self._skip()
        quote = self.text[self.at : self.at + 1]
        if quote not in ('"', "'"):
            raise ValueError(f"a quoted name is missing at character {self.at}")
        end = self.at + 1
        while end < len(self.text) and self.text[end] != quote:
            end += 2 if self.text[end] == "\\" else 1
        if end >= len(self.text):
            raise ValueError("a quote is not closed")
        raw, self.at = self.text[self.at : end + 1], end + 1
        try:
            return ast.literal_eval(raw)
        except (SyntaxError, ValueError):
            raise ValueError(f"the text {raw[:40]} is not readable") from None

    def _object(self) -> dict[str, Any]:
        self._take("{", "an opening brace")
        found: dict[str, Any] = {}
        while True:
            self._skip()
            if self.text[self.at : self.at + 1] == "}":
                self.at += 1
                return found
            if found:
                self._take(_COMMA, "a comma between arguments")
                self._skip()
            key = self._string()
            self._take(":：", "a colon")
            self._skip()
            if self.text[self.at : self.at + 1] in ('"', "'"):
                found[key] = self._string()
            else:
                try:
                    found[key], self.at = json.JSONDecoder().raw_decode(self.text, self.at)
                except json.JSONDecodeError:
                    raise ValueError(f"the value of {key!r} is not readable") from None
