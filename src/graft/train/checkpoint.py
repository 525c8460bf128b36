"""Sharded checkpoints that exist whole or not at all.

DeepSpeed writes the payload (each rank its optimizer shard, never the frozen base) into a temporary directory; rank 0
adds the cursor, hashes every file, fsyncs, renames, and only then drops the oldest. Discovery takes the newest
checkpoint whose every hash holds and says which it passed over and why.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from graft.core.artifact import fsync_dir, fsync_tree, sha256_file
from graft.core.errors import TrainError

PAYLOAD, CURSOR, SUMS = "payload", "cursor.json", "sha256.json"


def save(engine: Any, run: Path, cursor: dict[str, Any], keep: int) -> None:
    """Write `run/step-N` from all ranks, N = cursor["step"], and keep the newest `keep` checkpoints."""
    final = run / f"step-{cursor['step']:08d}"
    temporary = run / f".{final.name}.writing"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(temporary), tag=PAYLOAD, save_latest=False, exclude_frozen_parameters=True)
    dist.barrier()
    if rank == 0:
        (temporary / CURSOR).write_text(json.dumps(cursor, indent=1))
        sums = {p.relative_to(temporary).as_posix(): sha256_file(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
        (temporary / SUMS).write_text(json.dumps(sums, indent=1))
        fsync_tree(temporary)
        shutil.rmtree(final, ignore_errors=True)  # only ever one that failed its check
        os.rename(temporary, final)
        fsync_dir(run)
        for old in _steps(run)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """(newest checkpoint whose files hold, one line for each newer one that was passed over)."""
    passed: list[str] = []
    for folder in reversed(_steps(run)):
        reason = fault(folder)
        if reason is None:
            return folder, passed
        passed.append(f"{folder.name} is passed over: {reason}")
    return None, passed


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None where every file has its recorded SHA-256."""
    try:
        sums = json.loads((folder / SUMS).read_text())
    except (OSError, ValueError) as e:
        return f"{SUMS} cannot be read ({e})"
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256_file(file) != expected:
            return f"{name} was altered"
    return None


def cursor_of(folder: Path) -> dict[str, Any]:
    """Where the run stood that wrote this checkpoint."""
    return dict(json.loads((folder / CURSOR).read_text()))


def load(engine: Any, folder: Path, expect: dict[str, Any]) -> dict[str, Any]:
    """Restore weights and optimizer on every rank and return the cursor; TrainError where it belongs to another setup.

    expect: cursor entries that must be equal, such as the number of processes and the shards' digest.
    """
    cursor = cursor_of(folder)
    for key, value in expect.items():
        if cursor.get(key) != value:
            raise TrainError(
                f"{folder} was written with {key} = {cursor.get(key)!r}, this run has {value!r}: use the same, or delete the checkpoint to start over"
            )
    where, _ = engine.load_checkpoint(str(folder), tag=PAYLOAD, load_module_strict=False, load_lr_scheduler_states=False)
    if where is None:
        raise TrainError(f"{folder} holds no payload that DeepSpeed can load: delete it to start from an older one")
    return cursor


def _steps(run: Path) -> list[Path]:
    return sorted(run.glob("step-????????"))
