"""Artifacts: a directory with a `manifest.json` that exists whole or not at all.

`with writing(final, ...) as draft:` fills a temporary sibling; on a clean exit every file is hashed and fsynced, the
manifest is written and the directory renamed into place. SHA-256 costs about 1 s a GB.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import graft
from graft.core.errors import ArtifactError

FORMAT = 1
MANIFEST = "manifest.json"


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-ready value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")).hexdigest()


def fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())


def fsync_tree(root: Path) -> None:
    for path in [*root.rglob("*"), root]:
        if path.is_dir():
            fsync_dir(path)
        elif path.is_file():
            fsync_file(path)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read the manifest and check that every file is there at its size; ArtifactError names the first that is not."""
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(f"{path} holds no {MANIFEST}: it is no graft artifact, or was never completed; run `graft run` again") from None
        except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as e:
            raise ArtifactError(f"{path / MANIFEST} cannot be read ({e}): delete {path} and run `graft run` again") from None
        for name, entry in manifest["files"].items():
            file = path / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, the manifest says {entry['bytes']}"
                raise ArtifactError(f"{file} {found}: delete {path} and run `graft run` again")
        return cls(path, manifest)

    @property
    def digest(self) -> str:
        return self.manifest["digest"]

    @property
    def counts(self) -> dict[str, Any]:
        return self.manifest["counts"]

    def digest_of_files(self, pattern: str) -> str:
        return digest_of({n: e["sha256"] for n, e in self.manifest["files"].items() if fnmatch(n, pattern)})

    def verify(self, pattern: str = "*") -> None:
        """Hash the files that match `pattern` and compare; ArtifactError names the first that differs."""
        for name, entry in self.manifest["files"].items():
            if fnmatch(name, pattern) and sha256_file(self.path / name) != entry["sha256"]:
                raise ArtifactError(
                    f"{self.path / name} was altered: its SHA-256 is not the manifest's; delete {self.path} and run `graft run` again"
                )


@dataclass
class Draft:
    """An artifact being written: put files under `path`, numbers into `counts`."""

    path: Path
    counts: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)


@contextmanager
def writing(final: Path, *, kind: str, fingerprint: str, head: dict[str, Any]) -> Iterator[Draft]:
    """Yield a draft; publish it at `final` on a clean exit, leave nothing behind on an exception.

    head: what else the manifest records (recipe, keys, inputs, parents), JSON-ready. A draft of a killed process is swept
    by the next writer of the same artifact; callers hold the recipe's lock, so no two write one artifact at once.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(f".{final.name}.draft-*"):
        shutil.rmtree(stale)
    path = final.parent / f".{final.name}.draft-{os.getpid()}"
    path.mkdir()
    started = time.time()
    try:
        draft = Draft(path)
        yield draft
        files = {
            p.relative_to(path).as_posix(): {"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in sorted(path.rglob("*")) if p.is_file()
        }
        manifest = {
            "kind": kind,
            "format": FORMAT,
            "fingerprint": fingerprint,
            "digest": digest_of({n: e["sha256"] for n, e in files.items()}),
            **head,
            "counts": draft.counts,
            "cost": draft.cost,
            "files": files,
            "graft": graft.__version__,
            "commit": commit(),
            "created_unix_s": round(started, 3),
            "wall_s": round(time.time() - started, 3),
        }
        # a name of a file that is no UTF-8 becomes escapes, which JSON reads back
        (path / MANIFEST).write_bytes(json.dumps(manifest, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace"))
        fsync_tree(path)
        os.rename(path, final)
        fsync_dir(final.parent)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def point(link: Path, target: Path) -> None:
    """Make the symbolic link `link` name its sibling `target`, atomically."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


@cache
def commit() -> str | None:
    """The git commit of graft's own source tree, None where it was installed without one."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
