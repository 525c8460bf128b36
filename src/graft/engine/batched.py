"""What every engine does alike, over its own add, step and drop: whole batches, and the refusal of what cannot be run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from graft.core.errors import DataError
from graft.engine.protocol import Chunk, Completion, Finish, NotLoaded, Request, Scored
from graft.model.images import ImageProcessor, Seen


class Batched(ABC):
    """Half an Engine (protocol.py)."""

    max_length: int
    processor: ImageProcessor | None = None

    @property
    @abstractmethod
    def adapters(self) -> list[str]: ...

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a row waits or is under way."""

    @abstractmethod
    def add(self, request: Request) -> int: ...

    @abstractmethod
    def step(self) -> list[Chunk]: ...

    @abstractmethod
    def drop(self, row: int) -> None: ...

    @abstractmethod
    def scores(self, asked: Sequence[Scored], adapter: str | None = None) -> list[list[float]]: ...

    def score(self, ids: list[int], first: int, adapter: str | None = None, images: tuple[Seen, ...] = ()) -> list[float]:
        """Log-probabilities (nats) of ids[first:], first ≥ 1, each given all before it."""
        return self.scores([Scored(ids, first, images)], adapter)[0]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions, in the order of the requests. DataError names a request that cannot be run."""
        text = [""] * len(requests)
        tokens: list[list[int]] = [[] for _ in requests]
        reason: dict[int, Finish] = {}
        for chunks in self.stream(requests):
            for chunk in chunks:
                text[chunk.row] += chunk.text
                tokens[chunk.row] += chunk.tokens
                if chunk.finish_reason:
                    reason[chunk.row] = chunk.finish_reason
        return [Completion(text[i], tokens[i], reason[i], len(r.prompt_ids)) for i, r in enumerate(requests)]

    def stream(self, requests: Sequence[Request], dropped: Callable[[int], bool] = lambda row: False) -> Iterator[list[Chunk]]:
        """Yield a list of chunks a step. Prompts of about one length join together, so little is padded."""
        for row, request in enumerate(requests):
            self.check(row, request)
        of = {self.add(requests[row]): row for row in sorted(range(len(requests)), key=lambda row: len(requests[row].prompt_ids))}
        while self.busy:
            if chunks := [replace(c, row=of[c.row]) for c in self.step()]:
                yield chunks
            for number, row in of.items():
                if dropped(row):
                    self.drop(number)

    def check(self, row: int, request: Request) -> None:
        """DataError says why a request cannot be run."""
        if request.adapter is not None and request.adapter not in self.adapters:
            raise NotLoaded(f"request {row} asks for adapter {request.adapter!r}: the engine has {self.adapters or 'the base alone'}")
        if not request.prompt_ids or request.max_new_tokens < 1:
            raise DataError(
                f"request {row} has {len(request.prompt_ids)} prompt tokens and asks for {request.max_new_tokens}: both must be at least 1"
            )
        if request.images and self.processor is None:
            raise DataError(f"request {row} shows images, and this engine shows none to its model")
        if (total := len(request.prompt_ids) + request.max_new_tokens) > self.max_length:
            raise DataError(
                f"request {row} has {len(request.prompt_ids)} prompt tokens and asks for {request.max_new_tokens}, together {total}: "
                f"the model holds {self.max_length}; shorten either"
            )
