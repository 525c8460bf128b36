"""What evaluate and serve ask of any engine: requests in, text out, adapters mixed in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from graft.core.errors import DataError, ServeError
from graft.model.images import ImageProcessor, Seen

Finish = Literal["stop", "length"]


class NotLoaded(DataError):
    """A request asks for an adapter that the engine does not have."""


class SlotsBusy(ServeError):
    """The engine has no room for another adapter: every one that it has is in use."""


@dataclass(frozen=True)
class Request:
    """One row. temperature 0 is greedy; `seed` alone decides what a sampled row draws; adapter None is the base."""

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int = 0
    adapter: str | None = None
    stop: tuple[str, ...] = ()  # texts that end the row; they are not part of it
    ends: tuple[int, ...] | None = None  # ids that end the answer; None: those of the engine's tokenizer
    whole: bool = False  # nobody reads it before it has ended: its chunks may come all at once
    logprobs: int | None = None  # how many of the likeliest tokens to tell beside each token's own; None: not even that
    images: tuple[Seen, ...] = ()  # in the order of their placeholder tokens in prompt_ids


class Scored(NamedTuple):
    """A text whose tokens from `first` ≥ 1 on are scored, each given all before it."""

    ids: list[int]
    first: int
    images: tuple[Seen, ...] = ()  # in the order of their placeholder tokens in ids


class Told(NamedTuple):
    """Of a token, in the model's own distribution: its logprob (nats), and the likeliest tokens with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What one step gave one row. `text` is whole characters and may be empty; the row's last chunk has a finish reason."""

    row: int  # what add() gave, or an index into the requests
    text: str
    tokens: tuple[int, ...]  # without the one that ended the turn, which is no part of the answer
    finish_reason: Finish | None = None
    told: tuple[Told, ...] = ()  # of each token, where it was asked for


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
    """One thread uses it at a time."""

    tokenizer: Any
    max_length: int  # prompt and answer together, in tokens
    processor: ImageProcessor | None  # of the images that it can be shown; None: of text alone

    @property
    def adapters(self) -> list[str]: ...

    def load(self, name: str, folder: Path, again: bool = False) -> str | None:
        """Have an adapter ready, read anew if `again`; the name of an idle one that had to go. ArtifactError where it does not fit, SlotsBusy."""
        ...

    def unload(self, name: str) -> None:
        """Take no more requests for it; those under way end as they would have."""
        ...

    def score(self, ids: list[int], first: int, adapter: str | None = None, images: tuple[Seen, ...] = ()) -> list[float]:
        """Log-probabilities (nats) of the tokens from `first` ≥ 1 on, each given all before it. DataError names what cannot be run."""
        ...

    def scores(self, asked: Sequence[Scored], adapter: str | None = None) -> list[list[float]]:
        """The same of many, in batches that the engine makes."""
        ...

    def add(self, request: Request) -> int:
        """Queue a row; its number. DataError names what cannot be run."""
        ...

    def step(self) -> list[Chunk]:
        """What the next iteration gave, of any rows; [] where there are none."""
        ...

    def drop(self, row: int) -> None:
        """Give a row up at the next step; none that has ended."""
        ...

    def wake(self) -> None:
        """A step that only waits returns at once. The one thing that another thread may call."""
        ...

    def close(self) -> None:
        """Give back what is held outside this process."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions, in the order of the requests."""
        ...

    def stream(self, requests: Sequence[Request], dropped: Callable[[int], bool] = ...) -> Iterator[list[Chunk]]:
        """The same, one list a step; a row whose `dropped(row)` turns true is given up at the next step."""
        ...
