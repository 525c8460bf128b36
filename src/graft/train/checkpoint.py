"""Sharded checkpoints that exist whole or not at all, written while training goes on, for any number of processes.

`step-N/` holds one safetensors file a rank, with the fp32 weights and moments of what that rank's ZeRO partition trains, by the
parameters' names and where in them a fragment starts; the cursor; and the SHA-256 of each file. Never the frozen base, and
nothing that would be unpickled. A rank copies its tensors to host memory while the next step's gradients are computed, a thread
writes them into a temporary directory, and when all ranks have written, rank 0 renames it, at the border of a later step. Only then
the oldest goes. Discovery takes the newest checkpoint whose every hash holds and says which it passed over and why.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graft.core.artifact import fsync_dir, fsync_file, sha256_file
from graft.core.errors import TrainError
from graft.train import fence, preempt

FORMAT = 3
CURSOR, SUMS = "cursor.json", "sha256.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


# ---- what an engine trains ----------------------------------------------------------------------------------------------
class Fragment(NamedTuple):
    """The part of a parameter that lies in this rank's partition, flat: its fp32 weights and its moments, views."""

    name: str
    start: int
    states: dict[str, Tensor]


def fragments(engine: Any) -> Iterator[Fragment]:
    """Of this rank, under DeepSpeed's ZeRO 1 or 2."""
    zero = engine.optimizer
    names = {id(p): name for name, p in engine.module.named_parameters()}
    for parameters, master in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        flat = {"fp32": master, **{key: _state(zero, master)[key] for key in MOMENTS}}
        for p in parameters:
            if p._hp_mapping is not None:
                where = p._hp_mapping.hp_fragment_address
                states = {key: tensor.detach().narrow(0, where.start, where.numel) for key, tensor in flat.items()}
                yield Fragment(names[id(p)], p._hp_mapping.lp_fragment_address.start, states)


def _state(zero: Any, master: Tensor) -> dict[str, Tensor]:
    """AdamW's of a partition, as its first step would make it."""
    state: dict[str, Tensor] = zero.optimizer.state[master]
    if not state:
        on_device = zero.optimizer.param_groups[0].get("fused")
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if on_device else "cpu")
        state |= {key: torch.zeros_like(master) for key in MOMENTS}
    return state


def prepared(zero: Any) -> None:
    """Give AdamW its moments before its first step; ZeRO looks for them after it, also where guard.py leaves that step out."""
    for master in zero.single_partition_of_fp32_groups:
        _state(zero, master)


# ---- writing ------------------------------------------------------------------------------------------------------------
class Writer:
    """The checkpoints of a run, from one rank. save(), border() and finish() are called by all ranks at once.

    Host memory: 12 bytes for each weight that this rank's partition trains, for the whole run; on a GPU pinned, which takes a second
    for some gigabytes, so it is done before the first step.
    """

    def __init__(self, engine: Any, run: Path, keep: int):
        self.run, self.keep, self.rank, self.world = run, keep, dist.get_rank(), dist.get_world_size()
        self.failure: str | None = None  # why the last one was not written
        self._thread: threading.Thread | None = None
        self._removal: threading.Thread | None = None  # of those that are no longer kept
        self._step: int | None = None  # of the one that is being written
        self._engine = engine
        if self.rank == 0:  # which holds the run's directory: what others left half written is nobody's
            _remove(list(run.glob(".step-*.writing")))
        self._copies = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None
        prepared(engine.optimizer)
        try:
            self._host = {key: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for key, t in self._tensors()}
        except RuntimeError as e:
            gib = sum(t.nbytes for _, t in self._tensors()) / 2**30
            raise TrainError(f"a checkpoint passes through {gib:.1f} GiB of host memory of each process, which cannot be had: {e}") from None
        if self._copies:
            engine.optimizer.optimizer.register_step_pre_hook(partial(_wait_for, self._copies))
        preempt.begins(run)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, _, states in fragments(self._engine):
            for key, tensor in states.items():
                yield f"{name}:{key}", tensor

    def save(self, cursor: dict[str, Any]) -> str | None:
        """Begin `run/step-N`, N = cursor["step"]. Returns why the one before could not be written."""
        before = self.finish()
        self._step = cursor["step"]
        zero = self._engine.optimizer
        taken = _state(zero, zero.single_partition_of_fp32_groups[0])["step"].item()
        # told now, for the steps to come change it
        told = json.dumps({"format": FORMAT, "processes": self.world, **cursor, "optimizer_step": taken}, indent=1)
        starts = {name: start for name, start, _ in fragments(self._engine)}
        if self._copies:
            self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):  # of None: as it is
            for key, tensor in self._tensors():
                self._host[key].copy_(tensor, non_blocking=True)
        copied = self._copies.record_event() if self._copies else None
        if self.rank == 0:
            self._attempt(self._make_room)
        dist.barrier()
        self._thread = threading.Thread(target=self._attempt, args=(self._write, starts, told, copied), daemon=True)
        self._thread.start()
        return before

    def _attempt(self, act: Any, *given: Any) -> None:
        try:
            act(*given)
        except OSError as e:
            self.failure = self.failure or f"the checkpoint of step {self._step} was not written: {e.strerror or e}"

    @property
    def _draft(self) -> Path:
        return self.run / f".step-{self._step:08d}.writing"

    def _make_room(self) -> None:
        shutil.rmtree(self._draft, ignore_errors=True)
        self._draft.mkdir(parents=True)

    def _write(self, starts: dict[str, int], cursor: str, copied: Any) -> None:
        if copied:
            copied.synchronize()
        own = self._draft / f"rank-{self.rank:05d}.safetensors"
        try:
            save_file(self._host, own, metadata={"starts": json.dumps(starts)})
        except SafetensorError as e:  # of a full disk too
            raise OSError(str(e)) from None
        fsync_file(own)
        written = [own]
        if self.rank == 0:
            (self._draft / CURSOR).write_text(cursor, encoding="utf-8")
            fsync_file(self._draft / CURSOR)
            written.append(self._draft / CURSOR)
        sums = own.with_suffix(".sums")
        sums.write_text(json.dumps({file.name: sha256_file(file) for file in written}), encoding="utf-8")

    @property
    def written(self) -> bool:
        """Whether this rank has written its part of the one that was begun, or failed to."""
        return self._step is not None and (self._thread is None or not self._thread.is_alive())

    def border(self, written: int, failed: int) -> str | None:
        """Between two steps: complete the checkpoint that all ranks have written. written, failed: how many ranks say so of themselves.

        Returns why one could not be written, on every rank the same; the ones before it stand.
        """
        if failed and (self._step is None or written == self.world):
            return self._settle()
        if self._step is not None and written == self.world:
            if self.rank == 0:
                self._attempt(self._commit)  # where that fails, the next border hears of it
            self._thread = self._step = None
        return None

    def finish(self) -> str | None:
        """Wait for the one that is being written, and complete it; returns as border()."""
        if self._thread:
            self._thread.join()
        why = self._settle()
        if self._removal:
            self._removal.join()
        return why

    def _settle(self) -> str | None:
        reasons = self._told()
        if not reasons and self._step is not None:
            if self.rank == 0:
                self._attempt(self._commit)
            reasons = self._told()
        if reasons and self._step is not None and self.rank == 0:
            shutil.rmtree(self._draft, ignore_errors=True)
        self._thread = self._step = self.failure = None
        return reasons[0] if reasons else None

    def _told(self) -> list[str]:
        told: list[str | None] = [None] * self.world
        dist.all_gather_object(told, self.failure)
        return [line for line in told if line]

    def _commit(self) -> None:
        draft = self._draft
        sums: dict[str, str] = {}
        for rank in range(self.world):
            own = draft / f"rank-{rank:05d}.sums"
            sums |= json.loads(own.read_text(encoding="utf-8"))
            own.unlink()
        (draft / SUMS).write_text(_canonical(sums), encoding="utf-8")
        fsync_file(draft / SUMS)
        fsync_dir(draft)
        fence.check(self.run)
        final = self.run / draft.name.removeprefix(".").removesuffix(".writing")
        shutil.rmtree(final, ignore_errors=True)  # only ever one that failed its check
        os.rename(draft, final)
        fsync_dir(self.run)
        # not here, between two steps: a file of 0.5 GB takes some 0.1 s to remove
        self._removal = threading.Thread(target=_remove, args=(steps(self.run)[: -self.keep],), daemon=True)
        self._removal.start()


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # what stays makes the disk fill up, and that is said


def _canonical(sums: dict[str, str]) -> str:
    return json.dumps(dict(sorted(sums.items())), indent=1)


def _wait_for(copies: torch.cuda.Stream, *_: Any) -> None:
    """What is copied does not change before the optimizer's next step, so a whole forward and backward hide the copying."""
    torch.cuda.current_stream().wait_stream(copies)


# ---- reading ------------------------------------------------------------------------------------------------------------
def newest(run: Path) -> tuple[Path | None, list[str]]:
    """(newest checkpoint whose files hold, one line for each newer one that was passed over)."""
    passed: list[str] = []
    for folder in reversed(steps(run)):
        reason = fault(folder)
        if reason is None:
            return folder, passed
        passed.append(f"{folder.name} is passed over: {reason}")
    return None, passed


def steps(run: Path) -> list[Path]:
    """A run's checkpoints, the oldest first, whole or not."""
    return sorted(run.glob("step-????????"))


def described(run: Path) -> list[tuple[str, bool]]:
    """(a line on each checkpoint of a run, whether it holds), the oldest first; TrainError where there are none."""
    if not (found := steps(run)):
        raise TrainError(f"{run} holds no checkpoint: a run's directory is checkpoints/NAME/runs/STAGE-…")
    lines = []
    for folder in found:
        size_mib = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
        reason = fault(folder)
        by = "" if reason else f", written by {cursor_of(folder)['processes']} processes"
        lines.append((f"{folder.name}  {size_mib:,.1f} MiB  {reason or 'verified'}{by}", reason is None))
    return lines


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None where every file has its recorded SHA-256."""
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
        sums = json.loads(text)
        if _canonical(sums) != text:
            return f"{SUMS} was altered"
    except (OSError, ValueError, TypeError, AttributeError) as e:
        return f"{SUMS} cannot be read ({e})"
    if not {CURSOR, "rank-00000.safetensors"} <= sums.keys():
        return f"{SUMS} names no {CURSOR} or no tensors: it is of another format than {FORMAT}"
    for name, expected in sums.items():
        file = folder / Path(name).name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if sha256_file(file) != expected:
                return f"{name} was altered"
        except OSError as e:
            return f"{name} cannot be read ({e.strerror or e})"
    try:
        form = cursor_of(folder).get("format")
        if form != FORMAT:
            return f"it is of format {form}, this graft reads {FORMAT}"
        for file in _files(folder):
            _starts(file)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as e:
        return f"what it holds cannot be read ({e})"
    return None


def _files(folder: Path) -> list[Any]:
    return [safe_open(file, "pt") for file in sorted(folder.glob("rank-*.safetensors"))]


def _starts(file: Any) -> dict[str, int]:
    return dict(json.loads((file.metadata() or {})["starts"]))


def cursor_of(folder: Path) -> dict[str, Any]:
    """Where the run stood that wrote this checkpoint."""
    return dict(json.loads((folder / CURSOR).read_text(encoding="utf-8")))


def load(engine: Any, folder: Path, expect: dict[str, Any]) -> dict[str, Any]:
    """Restore weights and optimizer on every rank, whatever the number of ranks that wrote them, and return the cursor.

    expect: cursor entries that must be equal, such as the shards' digest. TrainError where one is not, or a tensor is missing.
    """
    cursor = cursor_of(folder)
    for key, value in expect.items():
        if cursor.get(key) != value:
            raise TrainError(
                f"{folder} was written with {key} = {cursor.get(key)!r}, this run has {value!r}: use the same, or delete the checkpoint to start over"
            )
    files = _files(folder)
    starts = [_starts(file) for file in files]
    for name, start, states in fragments(engine):
        for key, tensor in states.items():
            found = 0
            for file, own in zip(files, starts, strict=True):
                if name in own:
                    found += _copy_overlap(tensor, start, file.get_slice(f"{name}:{key}"), own[name])
            if found != tensor.numel():
                raise TrainError(f"{folder} holds {found} of {tensor.numel()} numbers of {name} ({key}): it belongs to another model")
    zero = engine.optimizer
    for master in zero.single_partition_of_fp32_groups:
        _state(zero, master)["step"].fill_(cursor["optimizer_step"])
    zero.update_lp_params()
    return cursor


def _copy_overlap(tensor: Tensor, start: int, held: Any, held_start: int) -> int:
    """Copy what `held` has of tensor, both flat parts of one parameter that begin at their starts; returns the count of numbers."""
    first = max(start, held_start)
    last = min(start + tensor.numel(), held_start + held.get_shape()[0])
    if last <= first:
        return 0
    tensor[first - start : last - start].copy_(held[first - held_start : last - held_start])
    return last - first
