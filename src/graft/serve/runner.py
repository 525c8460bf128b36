"""One thread that owns the engine: requests wait in a queue, and what waits becomes the next batch.

A batch runs to its end before the next one starts; a request that comes in between waits for it. Loading happens in the
thread too, so the process answers while its model is still on the way.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.core.artifact import MANIFEST
from graft.core.errors import GraftError, ServeError
from graft.engine.protocol import Chunk, Engine, Request


@dataclass(frozen=True)
class ServeSpec:
    """What is served, and where. adapters: {model name: folder}; tokenizer: the folder whose chat template is used."""

    base: str
    revision: str | None
    precision: str
    adapters: dict[str, str]
    tokenizer: str
    base_name: str = "base"
    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 16

    def models(self) -> dict[str, str | None]:
        """{model name: its adapter, None for the base}, the adapters first."""
        return {**{name: name for name in self.adapters}, self.base_name: None}

    def fingerprint(self, model: str) -> str | None:
        """The fingerprint in the manifest of the artifact behind a model; a hub base is named by its revision."""
        manifest = Path(self.adapters.get(model, self.base)) / MANIFEST
        return json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"] if manifest.is_file() else self.revision

    @property
    def max_waiting(self) -> int:
        return 8 * self.max_batch


class Overloaded(ServeError):
    """More requests wait than the server will hold."""


class Ticket:
    """One submitted request, on the side of the event loop that waits for it."""

    def __init__(self, request: Request):
        self.request, self.dropped = request, False
        self.loop, self.chunks = asyncio.get_running_loop(), asyncio.Queue[Chunk | None]()

    def give(self, chunk: Chunk | None) -> None:
        """Called by the engine's thread; None says that the engine has ended."""
        try:
            self.loop.call_soon_threadsafe(self.chunks.put_nowait, chunk)
        except RuntimeError:  # the loop was closed, and the client with it
            self.dropped = True

    async def bursts(self, pause_s: float = 0.0) -> AsyncGenerator[list[Chunk], None]:
        """All chunks there are, then those of the next `pause_s`, and so on: few messages, the first one at once.

        A reader that leaves gives the row up at the next step. ServeError where the engine ends first.
        """
        try:
            while True:
                burst = [await self.chunks.get()]
                while not self.chunks.empty():
                    burst.append(self.chunks.get_nowait())
                if whole := [c for c in burst if c is not None]:
                    yield whole
                    if whole[-1].finish_reason:
                        return
                if None in burst:
                    raise ServeError("the engine stopped while it worked on this request: see the server's log")
                await asyncio.sleep(pause_s)
        finally:
            self.dropped = True


@dataclass
class Runner:
    """Starts loading at once. `state` is "loading", "ready", "stopping" or "failed"; `error` says why it failed."""

    spec: ServeSpec
    state: str = "loading"
    error: str | None = None
    tokenizer: Any = None  # for the event loop; the engine has its own, so that no two threads share one
    engine: Engine | None = None
    waiting: queue.SimpleQueue[Ticket | None] = field(default_factory=queue.SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def ready_engine(self) -> Engine:
        """The engine; ServeError while it cannot answer."""
        if self.engine is None or self.state != "ready":
            raise ServeError(f"the model is {self.state}: {self.error or 'try again soon'}")
        return self.engine

    def submit(self, request: Request) -> Ticket:
        """Queue a request; Overloaded or ServeError where it cannot be taken now."""
        with self.lock:  # or a ticket could slip in behind the thread's last look at the queue
            self.ready_engine()
            if self.waiting.qsize() >= self.spec.max_waiting:
                raise Overloaded(f"{self.spec.max_waiting} requests are waiting already, try again soon")
            ticket = Ticket(request)
            self.waiting.put(ticket)
            return ticket

    def stop(self) -> None:
        """Take no more requests, and end the thread after those that wait."""
        with self.lock:
            self.state = "stopping"
            self.waiting.put(None)

    def _run(self) -> None:
        batch: list[Ticket] = []
        try:
            engine = self._load()
            while (first := self.waiting.get()) is not None:
                batch = [first, *self._more()]
                _answer(engine, batch)
        except GraftError as e:
            self.error = str(e)
        finally:  # whatever ended the thread, nobody waits for ever
            with self.lock:
                self.state, self.error = "failed", self.error or "the engine stopped, see the server's log"
                for ticket in [*batch, *self._more(self.spec.max_waiting)]:
                    ticket.give(None)

    def _load(self) -> Engine:
        """Load the engine and let every model generate one token; only then is the server ready."""
        from graft.engine.hf import HFEngine  # imports torch: seconds in which the process already answers
        from graft.model.chat import load_tokenizer, render_prompt

        spec = self.spec
        folders = {name: Path(folder) for name, folder in spec.adapters.items()}
        engine = HFEngine(spec.base, spec.revision, spec.precision, folders, load_tokenizer(spec.tokenizer), max_batch=spec.max_batch)
        self.tokenizer = load_tokenizer(spec.tokenizer)
        hello = render_prompt(self.tokenizer, [{"role": "user", "content": "hello"}])
        engine.generate([Request(hello, 1, adapter=adapter) for adapter in spec.models().values()])
        with self.lock:
            self.engine, self.state = engine, "ready" if self.state == "loading" else self.state
        return engine

    def _more(self, most: int | None = None) -> list[Ticket]:
        """Tickets that wait now, at most `most`; by default the rest of a batch."""
        found: list[Ticket] = []
        while len(found) < (self.spec.max_batch - 1 if most is None else most):
            try:
                ticket = self.waiting.get_nowait()
            except queue.Empty:
                break
            if ticket is None:  # the sign to stop is always the last: leave it for the loop
                self.waiting.put(None)
                break
            found.append(ticket)
        return found


def _answer(engine: Engine, batch: list[Ticket]) -> None:
    for chunks in engine.stream([ticket.request for ticket in batch], dropped=lambda row: batch[row].dropped):
        for chunk in chunks:
            batch[chunk.row].give(chunk)
