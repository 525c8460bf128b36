"""Where a run goes on: the newest checkpoint that holds, chosen by rank 0.

A run's directory is named after its fingerprint, which the data are part of: over changed data a run begins anew, in another
directory. While one of the same recipe over other data is unfinished, that is asked about first.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from graft.core.artifact import MANIFEST, digest_of
from graft.core.errors import TrainError
from graft.core.stages import Job
from graft.train import checkpoint
from graft.train.best import FOLDER


class Start(NamedTuple):
    """Where a run goes on, on all ranks the same."""

    checkpoint: Path | None  # None: from the beginning
    same: dict[str, str]  # what a checkpoint of this run says of it
    changes: list[dict[str, Any]]  # of the data so far: {step, from, to}, the shards' digests

    @property
    def expected(self) -> dict[str, str]:
        """Cursor entries that must hold; a checkpoint over other data was asked for."""
        return {"but_data": self.same["but_data"]} if self.changes and self.changes[-1]["to"] == self.same["shards"] else self.same


def start_of(job: Job, allow_data_change: bool, total: int) -> Start | None:
    """Rank 0 chooses, all ranks go on from its choice; None where another process has completed the stage meanwhile.

    total: steps of the whole run over these data. TrainError where an unfinished run of this stage is of other data, unless that is
    allowed and some steps are left for them.
    """
    choice: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            choice = [None if job.artifact else _chosen(job, allow_data_change, total)]
        except TrainError as e:
            choice = [e]
    dist.broadcast_object_list(choice)
    if isinstance(choice[0], TrainError):
        raise choice[0]
    return Start(*choice[0]) if choice[0] else None


def _chosen(job: Job, allow_data_change: bool, total: int) -> Start:
    shards = f"shard-{job.stage.name}"
    parents = {name: parent["digest"] for name, parent in job.head["parents"].items() if name != shards}
    but_data = digest_of({**{key: job.head[key] for key in ("stage_version", "keys", "inputs")}, "parents": parents})
    same = {"shards": job.parents[shards].digest, "fingerprint": job.fingerprint, "but_data": but_data}
    run = job.run_directory
    folder, passed = checkpoint.newest(run)
    for line in passed:
        print(f"resume: {line}", flush=True)
    if folder:
        return Start(folder, same, checkpoint.cursor_of(folder)["data_changes"])
    other = _of_other_data(job, same)
    if other is None:
        return Start(None, same, [])
    cursor = checkpoint.cursor_of(other)
    if cursor["step"] >= total:
        raise TrainError(
            f"{job.stage.name}: {cursor['step']} steps are taken in {other.parent}, the new data make {total}: nothing to train; "
            f"delete it or raise {job.stage.name}.epochs, either of which starts over"
        )
    if not allow_data_change:
        raise TrainError(
            f"{job.stage.name}: the data changed since {other} (shards {cursor['shards'][:12]}, now {same['shards'][:12]}): go on from it over "
            f"the new data by --allow-data-change, or delete {other.parent} to start over"
        )
    for kept in ("metrics.jsonl", FOLDER):  # the run's history, and its best weights so far
        if (other.parent / kept).is_dir():
            shutil.copytree(other.parent / kept, run / kept, dirs_exist_ok=True)
        elif (other.parent / kept).is_file():
            shutil.copyfile(other.parent / kept, run / kept)
    print(f"resume: the data changed since {other}, which this run goes on from", flush=True)
    return Start(other, same, [*cursor["data_changes"], {"step": cursor["step"], "from": cursor["shards"], "to": same["shards"]}])


def _of_other_data(job: Job, same: dict[str, str]) -> Path | None:
    """The newest checkpoint of a run that was to make the same of other data, and has not ended."""
    stage, found = job.stage.name, []
    for run in job.run_directory.parent.glob(f"{stage}-*"):
        finished = (job.directory.parent / run.name.removeprefix(f"{stage}-") / MANIFEST).exists()
        if finished or run == job.run_directory or not any(_was_for(folder, same["but_data"]) for folder in checkpoint.steps(run)):
            continue  # before any of its files is hashed
        folder, _ = checkpoint.newest(run)
        if folder and _was_for(folder, same["but_data"]):
            found.append(folder)
    return max(found, key=lambda folder: (folder / checkpoint.CURSOR).stat().st_mtime, default=None)


def _was_for(folder: Path, but_data: str) -> bool:
    try:
        return bool(checkpoint.cursor_of(folder).get("but_data") == but_data)
    except (OSError, ValueError, AttributeError):  # it does not hold, and fault() would say so
        return False
