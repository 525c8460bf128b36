"""The models of one replica: the base, and the adapters of the store that belong to it. The store says what there is; this says what is ready.

A version is examined and judged (gate.py) before it first answers, whether a request or the store's news asked for it. Slots are fewer than
adapters may be: an idle one goes when another comes, and is loaded again when it is asked for, without a new verdict.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from graft.core.errors import GraftError, ServeError, Unreadable
from graft.core.store import AdapterStore, Version
from graft.engine.protocol import SlotsBusy
from graft.model.chat import end_of_turn_ids
from graft.model.images import Seen
from graft.serve.canaries import seen
from graft.serve.gate import Candidate, Refused, Verdict, examined, judged, unexamined
from graft.serve.runner import Runner

T = TypeVar("T")
SLOT_WAIT_S = 10.0  # for an adapter that is not in memory, until another one is idle
# what an adapter's JSON may raise; DataError too, of a canary longer than the engine holds
MALFORMED = (AttributeError, LookupError, TypeError, ValueError)
POLL_S = 1.0  # how soon what was published elsewhere is seen


class UnknownModel(ServeError):
    """No model of that name is served."""


@dataclass
class Entry:
    """One version under one override or none, with why it is refused, or what was found of it."""

    version: Version
    refused: str | None = None
    candidate: Candidate | None = None
    verdict: Verdict | None = None
    load_s: float | None = None


@dataclass(frozen=True)
class Model:
    """What a request is answered with. folder: of an adapter, which has the engine's name `id`; None for the base."""

    id: str
    folder: Path | None
    tokenizer: Any
    ends: tuple[int, ...]


class Catalog:
    """Lives on the event loop. run() is its task; until it has loaded what the server must have, `started` is false, `error` may say why, and `failed`
    whether that stays so until somebody acts."""

    error: str | None

    def __init__(self, runner: Runner):
        self.runner, self.spec = runner, runner.spec
        self.store = AdapterStore(Path(self.spec.store)) if self.spec.store else None
        self.names: dict[str, str] = {}  # name -> version's id, of this base alone
        self.entries: dict[str, Entry] = {}
        self.withdrawn: frozenset[str] = frozenset()  # names and ids
        self.started, self.failed, self.error = False, False, None
        self._locks: dict[str, asyncio.Lock] = {}
        self._base: Model | None = None

    # ---- what there is --------------------------------------------------------------------------------------------------
    async def refresh(self) -> None:
        """Read the store's names and versions, with their notes; those of other bases are not of this server."""
        if self.store is None:
            return
        try:
            named, versions = await asyncio.to_thread(self._read, self.store)
        except Unreadable:  # it changes underfoot, or is gone: what is known stays until the next look
            return
        for version in versions:
            known = self.entries.get(version.id)
            if known and known.version.notes.get("override") == version.notes.get("override"):
                known.version = version
            else:  # a verdict under another override says nothing, nor does one that is on its way
                other = _base_of(version) not in (None, self.spec.identity)
                self.entries[version.id] = Entry(version, "it was trained on another base" if other else None)
        gone = {i for i, entry in self.entries.items() if entry.version.notes.get("withdrawn")}
        self.withdrawn = frozenset(gone | {name for name, i in named.items() if i in gone})
        self.names = {name: i for name, i in named.items() if i in self.entries and i not in gone and name != self.spec.base_name}

    @staticmethod
    def _read(store: AdapterStore) -> tuple[dict[str, str], list[Version]]:
        """({name: version's id}, the versions that can be read)."""
        versions = []
        for identity in store.versions():
            with suppress(GraftError):
                versions.append(store.get(identity))
        return store.names(), versions

    def listed(self) -> dict[str, Entry | None]:
        """{model id: its entry, None for the base}: names first, the adapters that answer."""
        found: dict[str, Entry | None] = {name: self.entries[i] for name, i in self.names.items() if not self.entries[i].refused}
        return found | {self.spec.base_name: None}

    def state(self, entry: Entry) -> str:
        """One of "ready" (in memory), "cold" and "refused"."""
        return "refused" if entry.refused else "ready" if entry.verdict and entry.version.id in self.runner.adapters else "cold"

    # ---- what is asked for ----------------------------------------------------------------------------------------------
    async def ready(self, model: str) -> Model:
        """The model, which passed the gate; whether it is in memory is seen when it is asked. UnknownModel, Refused, SlotsBusy."""
        if model == self.spec.base_name:
            return self._base_model()
        entry = self.entry(model)
        if entry.refused or entry.verdict is None:
            entry = await self.load(entry.version.id)
        candidate = entry.candidate
        assert candidate
        return Model(entry.version.id, entry.version.folder, candidate.tokenizer, candidate.ends)

    def _base_model(self) -> Model:
        if self._base is None:
            self.runner.ready_engine()
            tokenizer = self.runner.tokenizer
            self._base = Model(self.spec.base_name, None, tokenizer, tuple(end_of_turn_ids(tokenizer)))
        return self._base

    def entry(self, model: str) -> Entry:
        identity = self.names.get(model, model)
        if "@" in identity and identity not in self.entries and self.store:
            try:
                version = self.store.get(identity)
                if not version.notes.get("withdrawn"):
                    self.entries[identity] = Entry(version)
            except Unreadable as e:
                raise ServeError(str(e)) from None
            except GraftError:
                pass
        if identity not in self.entries or self.entries[identity].version.notes.get("withdrawn"):
            raise UnknownModel(f"the model {model!r} does not exist: this server has {', '.join(self.listed())}")
        return self.entries[identity]

    async def load(self, identity: str, again: bool = False) -> Entry:
        """Have a version in memory. again: examined and judged anew, whatever was found before; Refused where it must not answer, another
        ServeError where that cannot be seen now."""
        async with self._locks.setdefault(identity, asyncio.Lock()):
            entry = self.entries[identity]
            if entry.refused and not again:
                raise Refused(entry.refused)
            if entry.verdict and identity in self.runner.adapters and not again:
                return entry
            began = time.perf_counter()
            override = entry.version.notes.get("override")
            try:
                if again or entry.candidate is None:
                    entry.candidate = await self._examine(identity, override)
                candidate = entry.candidate
                verdict = await self._into_the_engine(candidate, None if again else entry.verdict, bool(override), again)
            except (OSError, Unreadable) as e:
                raise ServeError(f"{identity}: {e}") from None
            except GraftError as e:
                if isinstance(e, ServeError) and not isinstance(e, Refused):
                    raise  # an engine that stops, or whose slots are all in use
                entry.refused = str(e)
                raise Refused(str(e)) from None
            entry.verdict, entry.refused = verdict, None
            entry.load_s = time.perf_counter() - began
            return entry

    async def _examine(self, identity: str, override: str | None) -> Candidate:
        processor = self.runner.ready_engine().processor
        assert self.store
        try:
            return await asyncio.to_thread(examined, self.store, identity, self.spec, self.runner.tokenizer, processor)
        except Refused as e:
            fault = str(e)
        except MALFORMED as e:
            fault = f"{identity}: its parity.json or probes.json is not as training writes it ({type(e).__name__}: {e})"
        if not override:
            raise Refused(fault)
        return unexamined(self.store, identity, self.runner.tokenizer, fault)

    async def _into_the_engine(self, candidate: Candidate, known: Verdict | None, override: bool, again: bool) -> Verdict:
        """In memory, and judged canary by canary, so that others are answered meanwhile; Refused, or SlotsBusy where no slot is idle for long."""
        name, folder = candidate.version.id, candidate.version.folder

        async def ask(act: Callable[[Any], T]) -> T:
            """act(engine), with the adapter in memory, which another may have taken the slot of since."""
            return await patient(lambda: self.runner.call(lambda engine: (engine.load(name, folder), act(engine))[1]))

        await patient(lambda: self.runner.call(lambda engine: engine.load(name, folder, again)))
        if known:
            return known
        scores = []
        try:
            for canary in candidate.parity.get("canaries", []) if not candidate.fault else []:
                images = await asyncio.to_thread(seen, candidate.version, canary, self.runner.ready_engine().processor)
                asked = partial(_score, canary["ids"], min(canary["at"]), images)
                scores.append((await ask(partial(asked, name)), await ask(partial(asked, None))))
            verdict = judged(candidate, self.spec.precision, scores)
        except MALFORMED as e:
            verdict = Verdict(0.0, 0.0, 0.0, False, f"{name}: its canaries cannot be asked here ({type(e).__name__}: {e})")
        if not verdict.passed and not override:
            await self.unload(name)
            raise Refused(verdict.reason or "")
        return verdict

    async def unload(self, identity: str) -> None:
        """Out of memory; what is under way with it ends as it would have."""
        await self.runner.call(lambda engine: engine.unload(identity))

    # ---- its task -------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Load what the server must have, then follow the store: a new version is loaded as it is published, while slots are free."""
        while self.runner.state == "loading":
            await asyncio.sleep(0.02)
        await self.refresh()
        while True:
            if not self.started:
                await self.begin()
            await self.follow()
            await asyncio.sleep(POLL_S)

    async def begin(self) -> None:
        """Load what the server must have; what somebody has withdrawn it does without, as before it was started anew."""
        try:
            for name in self.spec.ready:
                if name not in self.withdrawn:
                    await self.ready(name)
            self.started, self.failed, self.error = True, False, None
        except Refused as e:
            self.failed, self.error = True, f"{e} (`graft serve RECIPE --override WHY` has it answer all the same)"
        except ServeError as e:
            self.failed, self.error = isinstance(e, UnknownModel), str(e)

    async def follow(self) -> None:
        """Once: what is new in the store, and what was withdrawn."""
        await self.refresh()
        wanted = set(self.names.values())
        for identity, entry in list(self.entries.items()):
            try:
                state = self.state(entry)
                if state == "ready" and entry.version.notes.get("withdrawn"):
                    await self.unload(identity)
                elif state == "cold" and identity in wanted and entry.verdict is None and len(self.runner.adapters) < self.spec.max_adapters:
                    await self.load(identity)
            except ServeError:  # it stands in the entry, or the engine has ended
                continue


def _base_of(version: Version) -> str | None:
    try:
        found: str = json.loads((version.folder / "parity.json").read_text(encoding="utf-8"))["base"]
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the gate will say what is wrong with it


def _score(ids: list[int], first: int, images: tuple[Seen, ...], adapter: str | None, engine: Any) -> list[float]:
    found: list[float] = engine.score(ids, first, adapter, images)
    return found


async def patient(act: Callable[[], Awaitable[T]]) -> T:
    """act(), again while every slot is in use; SlotsBusy where that lasts."""
    deadline = time.monotonic() + SLOT_WAIT_S
    while True:
        try:
            return await act()
        except SlotsBusy:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.005)
