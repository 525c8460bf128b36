"""One run's access to the API: requests in, answers in the same order out.

What the ledger knows is read from it; the rest goes through a Ray Data pipeline of caller actors. Requests are taken a
chunk at a time, so memory stays flat however many there are. Starting a chunk's actors costs about 2 s.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import json
import math
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from graft.core.errors import CredentialError, DataError, GraftError, ServeError
from graft.core.recipe import Recipe
from graft.core.stages import DATA, Plan
from graft.data.api.caller import UNANSWERED, Caller
from graft.data.api.client import Client, collect_rarely
from graft.data.api.keeper import keep
from graft.data.api.request import Answer, Request

CHUNK = 16_384  # requests of one Ray Data run
READ = 512  # answers read from the ledger at once
BLOCK = 64  # requests handed to an actor together
FEW = 16  # requests that are worth an actor
CALLER_CPUS = 0.5  # it mostly waits
START_S = 120  # within which all actors must be up
LEDGER, EMBEDDED = "ledger.sqlite", "embedded.sqlite"  # under data_shards/; the grammar's answers are no model's and cost nothing


def ledger_of(plan: Plan) -> Path:
    """Where the answers of the endpoint that this environment names are kept."""
    return plan.root / DATA / (LEDGER if plan.endpoint else EMBEDDED)


class Session:
    """Use as a context manager, inside a Ray cluster.

    watch: called about four times a second while requests are under way, with the broker's figures. embedded: base_url is graft's own.
    """

    def __init__(self, recipe: Recipe, ledger: Path, base_url: str, watch: Callable[[dict[str, Any]], None] | None = None, embedded: bool = False):
        self.recipe, self.ledger, self.base_url, self.embedded = recipe, ledger, base_url, embedded
        self.watch = watch or (lambda figures: None)
        limits = recipe.api.model_dump(
            include={"in_flight", "requests_per_minute", "tokens_per_minute", "budget_usd", "budget_tokens", "give_up_after_s"}
        )
        self.hello = {"session": uuid.uuid4().hex, "account": recipe.name, "endpoint": base_url, "model": recipe.api.model, "limits": limits}
        self.sent = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="graft-ledger", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._thresholds = gc.get_threshold()
        collect_rarely()
        try:
            self._keeper = asyncio.run_coroutine_threadsafe(keep(self.ledger), self._loop)
            self._client = self._do(self._connect())
            self.figures()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_client"):
            self._do(self._client.close())
        self._keeper.cancel()
        with suppress(BaseException):
            self._do(self._drained())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        gc.unfreeze()
        gc.set_threshold(*self._thresholds)

    def ask(self, requests: Iterable[Request], title: str = "") -> Iterator[Answer]:
        """An answer for every request, in order.

        Raises CredentialError or DataError in one line where the API refuses for good (key, quota, a server that is down);
        what was answered until then is in the ledger.
        """
        requests = iter(requests)
        while chunk := list(itertools.islice(requests, CHUNK)):
            known = self._raw(chunk)
            missing = {r.key: r for r in chunk if r.key not in known}
            outcomes, new = self._send(list(missing.values())) if missing else ({}, {})
            known |= new
            for request in chunk:
                yield _answer(request.key, known.get(request.key), outcomes.get(request.key))

    def known(self, requests: list[Request]) -> dict[str, Answer]:
        """The answers that the ledger has, by key; nothing is sent."""
        return {key: _answer(key, raw, None) for key, raw in self._raw(requests).items()}

    def figures(self) -> dict[str, Any]:
        """Spending, rates and requests under way, as the broker counts them."""
        self._alive()
        return self._do(self._client.ask(stats=self.hello["session"]))

    def history(self) -> list[tuple[str, str]]:
        """(request, raw response) of this recipe's last answers."""
        return [(a, b) for a, b in self._do(self._client.ask(usage=self.recipe.name))]

    def _send(self, requests: list[Request]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Ask all of `requests`; what became of each, and the raw answers, by key."""
        import ray

        api = self.recipe.api
        rows = [{"key": r.key, "body": _json(r.body), "files": json.dumps(r.files)} for r in requests]
        room = int(ray.cluster_resources().get("CPU", 1) / CALLER_CPUS)  # a machine may be gone since the last chunk
        actors = max(1, min(api.actors, math.ceil(len(rows) / FEW), room))
        outcomes: dict[str, dict[str, Any]] = {}
        stopped: dict[str, Any] | None = None
        blocks = max(actors, math.ceil(len(rows) / BLOCK))
        calls = math.ceil(api.in_flight / actors / BLOCK) + 4  # blocks at once in one actor: no lull between two
        ray.data.DataContext.get_current().wait_for_min_actors_s = START_S  # or the first that is up takes all the blocks
        pipeline = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            Caller,
            fn_constructor_args=(str(self.ledger), self.base_url, self.hello, api.model_dump(mode="json"), self.embedded),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=actors, max_concurrent_calls_per_actor=calls, max_tasks_in_flight_per_actor=2 * calls),
            num_cpus=CALLER_CPUS,
        )
        read = _Reader(self._client, self._loop)
        try:
            with _Watch(self):
                for row in pipeline.iter_rows():
                    outcomes[row["key"]] = row
                    if row["status"] == "answered":
                        read.add(row["key"])
                    elif row["status"] == "stopped":
                        stopped = stopped or row
        except ray.exceptions.GetTimeoutError:
            raise DataError(f"augment: Ray could not start {actors} callers within {START_S} s: free CPUs, or lower api.actors") from None
        self.sent += len(rows)
        if stopped:
            raise _error(stopped["kind"], f"augment: {stopped['error']}; every answer so far is in {self.ledger}, run again to go on")
        return outcomes, read.all()

    def _raw(self, requests: list[Request]) -> dict[str, str]:
        self._alive()
        read = _Reader(self._client, self._loop)
        for request in requests:
            read.add(request.key)
        return read.all()

    async def _connect(self) -> Client:
        return Client(self.ledger, self.hello)

    async def _drained(self) -> None:
        await asyncio.gather(*(t for t in asyncio.all_tasks() if t is not asyncio.current_task()), return_exceptions=True)

    def _alive(self) -> None:
        """A keeper that ended says why: a ledger that cannot be opened, a file system without locks."""
        if self._keeper.done() and not self._keeper.cancelled():
            self._keeper.result()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return future.result(timeout=0.5)
            except TimeoutError:
                if future.done():
                    raise
                self._alive()


def _json(body: dict[str, Any]) -> str:
    """Characters as they are; a lone surrogate, which an earlier answer may have held and UTF-8 cannot, makes escapes of all."""
    text = json.dumps(body, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(body)
    return text


class _Reader:
    """Reads answers from the ledger while others are still under way."""

    def __init__(self, client: Client, loop: asyncio.AbstractEventLoop):
        self.client, self.loop = client, loop
        self.keys: list[str] = []
        self.parts: list[concurrent.futures.Future[dict[str, str]]] = []

    def add(self, key: str) -> None:
        self.keys.append(key)
        if len(self.keys) == READ:
            self._ask()

    def all(self) -> dict[str, str]:
        """Raw answer by key, of those that have one."""
        self._ask()
        return {key: raw for part in self.parts for key, raw in part.result().items()}

    def _ask(self) -> None:
        if self.keys:
            self.parts.append(asyncio.run_coroutine_threadsafe(self.client.ask(answers=self.keys), self.loop))
            self.keys = []


class _Watch:
    """Calls the session's `watch` from a thread of its own while requests are under way."""

    def __init__(self, session: Session):
        self.session, self.over = session, threading.Event()
        self.thread = threading.Thread(target=self._run, name="graft-panel", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join(5)

    def _run(self) -> None:
        while not self.over.wait(0.25):
            with suppress(GraftError, TimeoutError):
                self.session.watch(self.session.figures())


def _answer(key: str, raw: str | None, outcome: dict[str, Any] | None) -> Answer:
    if raw is None:
        assert outcome is not None
        return Answer(key, error=outcome["error"], asked=outcome["status"] != "budget", unanswered=outcome["kind"] == UNANSWERED)
    try:
        response = json.loads(raw)
    except ValueError:
        return Answer(key, error="unreadable: the server's answer is no JSON")
    return Answer(key, response) if isinstance(response, dict) else Answer(key, error="unreadable: the server's answer is no JSON object")


def _error(kind: str, message: str) -> GraftError:
    return {"credential": CredentialError, "server": ServeError}.get(kind, DataError)(message)
