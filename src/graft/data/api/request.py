"""What is asked of the API and what comes back: the two types that every maker of rows shares with the session."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from graft.core.artifact import digest_of


@dataclass(frozen=True)
class Request:
    """One chat completion to ask for.

    body: the request as sent, JSON-ready, with `model`, `messages` and every parameter that changes the answer; asking the
        same words for another answer takes another `seed`. An image is a content part
        {"type": "image_url", "image_url": {"url": "sha256:<hex>"}} whose bytes lie in `files[hex]`.
    files: SHA-256 (hex) -> path of a JPEG, PNG or WebP file; read only when the request leaves.
    """

    body: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the whole body: the name under which the ledger keeps the answer."""
        return digest_of(self.body)


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    response: the server's JSON (`choices`, `usage`, …), None where there is none.
    error: one line saying why there is no response; None where there is one.
    asked: False where the budget ended before the request was sent; such a request may be asked again by a later run.
    unanswered: True where it was sent, again and again, and the server had no answer to it, for a reason that may pass.
    """

    key: str
    response: dict[str, Any] | None = None
    error: str | None = None
    asked: bool = True
    unanswered: bool = False
