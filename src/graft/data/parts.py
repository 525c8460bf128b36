"""Work cut into parts, each made once: a part is a function of its specification, written to a directory of its own.

`make` runs the parts that are missing as one Ray Data execution, as many at a time as the cluster has CPUs. A part's
directory is named by the digest of (function, version, specification), written to a temporary sibling and renamed, so
after a kill of the driver or of a worker only unfinished parts are made again, and what does not depend on the number of
workers cannot. Directories must lie on a file system that all nodes see. A part costs about 10 ms besides its work.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from graft.core.artifact import digest_of, fsync_tree
from graft.core.errors import DataError

REPORT = "part.json"
MEMORY = 3 << 29  # bytes a part needs at most: Ray starts no more of them at once than the nodes' memory holds

Spec = dict[str, Any]  # JSON-ready; all that decides the result, the digests of the files that are read included


class Part(NamedTuple):
    path: Path  # the finished directory
    report: dict[str, Any]  # what the function returned


def make(work: Callable[[Spec, Path], dict[str, Any]], version: int, specs: Iterable[Spec], store: Path) -> list[Part]:
    """The finished part of every specification, in their order; made in Ray where missing, inside a running cluster.

    work: a module-level function of (specification, empty directory to fill) that returns a JSON-ready report and has no
    other effect. version: raised when the same specification would give another result. store: the folder of the parts.
    Raises DataError in one line where a part raises one, or where the disk is full.
    """
    import ray

    store.mkdir(parents=True, exist_ok=True)
    specs = list(specs)
    paths = [
        store / digest_of({"work": f"{work.__module__}.{work.__qualname__}", "version": version, "spec": _decisive(spec)})[:24] for spec in specs
    ]
    missing = {path.name: spec for spec, path in zip(specs, paths, strict=True) if not path.exists()}
    if missing:
        for abandoned in store.glob(".*"):  # by a worker that was killed; a recipe has one writer at a time
            shutil.rmtree(abandoned, ignore_errors=True)
        rows = [{"name": name, "spec": json.dumps(spec, ensure_ascii=True)} for name, spec in missing.items()]
        run = partial(_make_one, work=work, store=store)
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run, num_cpus=1, memory=MEMORY)
        for row in done.iter_rows():
            if row["error"]:
                raise DataError(row["error"])
    return [Part(path, json.loads((path / REPORT).read_text(encoding="utf-8"))) for path in paths]


def _decisive(value: Any) -> Any:
    """A specification without the "path" of a file whose "digest" stands beside it: where it lies decides nothing."""
    if isinstance(value, dict):
        return {key: _decisive(v) for key, v in value.items() if key != "path" or "digest" not in value}
    return [_decisive(v) for v in value] if isinstance(value, list | tuple) else value


def _make_one(row: dict[str, str], work: Callable[[Spec, Path], dict[str, Any]], store: Path) -> dict[str, str]:
    final = store / row["name"]
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=store))
    try:
        report = work(json.loads(row["spec"]), draft)
        (draft / REPORT).write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
        fsync_tree(draft)
        os.rename(draft, final)
    except DataError as e:
        return {"error": str(e)}
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            return {"error": f"no space left on the disk of {store}: free some and run again, finished parts are kept"}
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another worker finished the same part first: its result is ours
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return {"error": ""}


def sweep(store: Path, keep: Iterable[Part]) -> None:
    """Remove every part that is not in `keep`, and the drafts of killed workers."""
    kept = {part.path.name for part in keep}
    for path in store.iterdir() if store.is_dir() else ():
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
