"""What evaluate and serve ask of any engine: requests in, text out, adapters mixed in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One row of a batch. temperature 0 is greedy; `seed` alone decides what a sampled row draws; adapter None is the base."""

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    adapter: str | None = None
    stop: tuple[str, ...] = ()  # texts that end the row; they are not part of it


@dataclass(frozen=True)
class Chunk:
    """What one step gave one row. `text` is whole characters and may be empty; the row's last chunk has a finish reason."""

    row: int  # index into the requests
    text: str
    token: int | None  # None: the token ended the turn and is no part of the answer
    finish_reason: Finish | None = None


@dataclass(frozen=True)
class Completion:
    text: str
    token_ids: list[int]
    finish_reason: Finish
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        """Generated tokens, the end of turn not counted."""
        return len(self.token_ids)


class Engine(Protocol):
    tokenizer: Any
    adapters: list[str]
    max_length: int  # prompt and answer together, in tokens

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions, in the order of the requests."""
        ...

    def stream(self, requests: Sequence[Request], dropped: Callable[[int], bool] = ...) -> Iterator[list[Chunk]]:
        """The same, one list a step; a row whose `dropped(row)` turns true is given up at the next step."""
        ...
