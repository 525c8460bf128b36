"""One thread that owns the engine: it adds what was asked for, takes a step, hands the tokens out, and so on.

Loading happens in the thread too, so the process answers while its model is still on the way. Whatever else needs the engine, an adapter
that is loaded, is called between two steps.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from graft.core.errors import GraftError, ServeError
from graft.engine.protocol import Chunk, Engine, Request
from graft.model.images import ImageProcessor
from graft.serve.spec import ServeSpec

T = TypeVar("T")
IDLE_S = 1.0  # after which an engine that has nothing to do is asked for a step all the same: it says then that it has ended


class Overloaded(ServeError):
    """More requests are under way than the server will hold."""


class Ticket:
    """One request under way, on the side of the event loop that waits for it."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop, deadline: float):
        """deadline: in time.monotonic's seconds."""
        self.request, self.dropped, self.deadline, self.why = request, False, deadline, "the engine stopped while it worked on this request"
        self.counted = True  # among those that the runner was asked for
        self.loop, self.chunks = loop, asyncio.Queue[Chunk | None]()
        self.begun, self.first, self.tokens = time.monotonic(), 0.0, 0  # first: when the first chunk came; tokens: so far

    async def bursts(self, pause_s: float = 0.0) -> AsyncGenerator[list[Chunk], None]:
        """All chunks there are, then those of the next `pause_s`, and so on: few messages, the first one at once.

        A reader that leaves gives the row up at the next step. ServeError where the engine ends first, or the deadline comes.
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
                    raise ServeError(self.why)
                await asyncio.sleep(pause_s)
        finally:
            self.dropped = True


def hand_out(given: list[tuple[Ticket, Chunk | None]]) -> None:
    """Called by the engine's thread, once a step: each loop is woken once. None says that nothing follows, the ticket's `why` the reason."""
    now = time.monotonic()
    of: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Chunk | None]]] = {}
    for ticket, chunk in given:
        ticket.first = ticket.first or now
        ticket.tokens += len(chunk.tokens) if chunk else 0
        of.setdefault(ticket.loop, []).append((ticket, chunk))
    for loop, own in of.items():
        try:
            loop.call_soon_threadsafe(_put, own)
        except RuntimeError:  # the loop was closed, and its clients with it
            for ticket, _ in own:
                ticket.dropped = True


def _put(given: list[tuple[Ticket, Chunk | None]]) -> None:
    for ticket, chunk in given:
        ticket.chunks.put_nowait(chunk)


class Runner:
    """Starts loading at once. `state` is "loading", "ready", "stopping" or "failed"; `error` says why it failed."""

    state: str
    error: str | None

    def __init__(self, spec: ServeSpec):
        self.spec, self.state, self.error = spec, "loading", None
        self.tokenizer: Any = None  # for the event loop; the engine has its own, so that no two threads share one
        self.engine: Engine | None = None
        self.adapters: tuple[str, ...] = ()  # that are in memory
        self._calls: queue.SimpleQueue[tuple[Callable[[Any], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._asked = 0  # tickets, and those that are on their way to become one
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def ready_engine(self) -> Engine:
        """The engine; ServeError while it cannot answer."""
        if self.engine is None or self.state != "ready":
            raise ServeError(f"the model is {self.state}: {self.error or 'try again soon'}")
        return self.engine

    @property
    def processor(self) -> ImageProcessor | None:
        """Of the images that the engine can be shown; None where it sees none, or is not there yet."""
        return self.engine.processor if self.engine else None

    async def submit(self, request: Request, folder: Path | None = None) -> Ticket:
        """The request under way; folder: of its adapter, which is loaded if it is not in memory. Overloaded, SlotsBusy or ServeError where it cannot
        be taken now, the engine's DataError where it cannot be run."""
        with self._lock:
            self.ready_engine()
            if self._asked >= (most := self.spec.max_batch + self.spec.max_waiting):
                raise Overloaded(f"{most} requests are under way already, try again soon")
            self._asked += 1
        ticket = Ticket(request, asyncio.get_running_loop(), time.monotonic() + self.spec.deadline_s)

        def add(engine: Engine) -> None:
            if request.adapter and folder:
                engine.load(request.adapter, folder)
            self._tickets[engine.add(request)] = ticket

        try:
            await self.call(add)
        except BaseException:
            ticket.dropped = True  # the call may be made all the same
            self._give_back(ticket)
            raise
        return ticket

    async def call(self, act: Callable[[Engine], T]) -> T:
        """What act(engine) gives, called by the engine's thread between two steps."""
        future: Future[T] = Future()
        with self._lock:  # or it could slip in behind the thread's last look at the queue
            engine = self.ready_engine()
            self._calls.put((act, future))
        engine.wake()
        return await asyncio.wrap_future(future)

    @property
    def under_way(self) -> int:
        """Requests that run or wait."""
        return self._asked

    def stop(self) -> None:
        """Take no more requests, and end the thread after those under way."""
        with self._lock:
            if self.state != "failed":
                self.state = "stopping"
            self._calls.put(None)
        if self.engine:
            self.engine.wake()

    def _run(self) -> None:
        engine: Engine | None = None
        try:
            engine = self._load()
            stopping = False
            while not stopping or self._tickets:
                stopping = self._answer_calls(engine, wait=not self._tickets) or stopping
                self._step(engine)
        except GraftError as e:
            self.error = str(e)
        finally:  # whatever ended the thread, nobody waits for ever
            with self._lock:
                self.state, self.error = "failed", self.error or "the engine stopped, see the server's log"
                hand_out([(ticket, None) for ticket in self._tickets.values()])
                while not self._calls.empty():
                    if call := self._calls.get_nowait():
                        call[1].set_exception(ServeError(self.error))
            if engine:
                engine.close()

    def _step(self, engine: Engine) -> None:
        """Of the engine, its tokens handed out. Nothing of a request, such as its images, lives on here when the thread waits for the next."""
        now = time.monotonic()
        for row, ticket in list(self._tickets.items()):
            if ticket.dropped or now > ticket.deadline:
                ticket.why = f"the request took longer than {self.spec.deadline_s:g} s (serve.deadline_s)"
                hand_out([(ticket, None)])
                engine.drop(row)
                self._done(row)
        given = [(self._tickets[chunk.row], chunk) for chunk in engine.step() if chunk.row in self._tickets]
        hand_out([*given])
        for _, chunk in given:
            if chunk.finish_reason:
                self._done(chunk.row)

    def _done(self, row: int) -> None:
        self._give_back(self._tickets.pop(row))

    def _give_back(self, ticket: Ticket) -> None:
        """Its place; once, though a client that leaves while the engine takes its request is seen by both threads."""
        with self._lock:
            self._asked -= ticket.counted
            ticket.counted = False

    def _answer_calls(self, engine: Engine, wait: bool) -> bool:
        """Make the calls that wait, at least one that comes within IDLE_S if `wait`; whether the sign to stop was among them."""
        stop = False
        while wait or not self._calls.empty():
            try:
                call, wait = self._calls.get(timeout=IDLE_S), False
            except queue.Empty:
                break
            if call is None:
                stop = True
                continue
            act, future = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                found = act(engine)
                self.adapters = tuple(engine.adapters)
                future.set_result(found)
            except GraftError as e:
                future.set_exception(e)
            except BaseException as e:
                future.set_exception(ServeError(f"the engine failed: {type(e).__name__}"))
                raise
        return stop

    def _load(self) -> Engine:
        """Load the engine and let the base generate one token; only then is it ready."""
        from graft.engine.start import start
        from graft.model.chat import load_tokenizer, render_prompt  # imports torch: seconds in which the process already answers

        spec = self.spec
        engine = start(
            spec.engine,
            spec.base,
            spec.revision,
            spec.precision,
            load_tokenizer(spec.tokenizer),
            max_batch=spec.max_batch,
            max_adapters=spec.max_adapters if spec.store else 0,
            max_rank=spec.max_rank,
            kv_tokens=spec.kv_tokens,
            image_pixels=spec.image_pixels,
        )
        self.tokenizer = load_tokenizer(spec.tokenizer)
        engine.generate([Request(render_prompt(self.tokenizer, [{"role": "user", "content": "hello"}]), 1)])
        with self._lock:
            self.engine, self.state = engine, "ready" if self.state == "loading" else self.state
        return engine
