"""Adapters as servers find them: `<root>/<name>/<version>/`, immutable, where the version is the first 12 digits of its content's SHA-256.

    <root>/<name>/<version>/        safetensors, JSON and the images of canaries alone, listed with their SHA-256 in version.json; files 0444, folders 0755
    <root>/<name>/<version>.json    notes, which may change: evaluation, override, withdrawn
    <root>/<name>/alias             the `name@version` that the plain name stands for, replaced atomically

Names are of one strict pattern, so none leaves the root, and nothing on the way to a file may be a symbolic link. Reading a version
hashes all of it: what was cut short, altered or put under another's name is refused by file. A store may be shared by many servers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.core.artifact import Artifact, digest_of, fsync_dir, fsync_tree, sha256_file, write_text_atomic
from graft.core.errors import ArtifactError, ConfigError, Unreadable

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
VERSION = re.compile(r"[0-9a-f]{12}")
ID = re.compile(f"{NAME.pattern}@{VERSION.pattern}")
WEIGHTS = "adapter_model.safetensors"
IMAGE = re.compile(r"[0-9a-f]{64}\.(png|jpg|webp)")  # named by its SHA-256
FILES = re.compile(
    r"adapter_model\.safetensors|adapter_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|chat_template\.jinja|probes\.json|parity\.json"
    rf"|preprocessor_config\.json|{IMAGE.pattern}"
)
LIST, ALIAS = "version.json", "alias"
MAX_BYTES, MAX_TENSORS, MAX_HEADER = 8 << 30, 20_000, 16 << 20
MAX_IMAGES, MAX_IMAGE_BYTES = 16, 128 << 20  # of all images of a version


class UnknownAdapter(ConfigError):
    """No adapter of that name, or version, is in the store."""


@dataclass(frozen=True)
class Version:
    """One version of an adapter."""

    name: str
    version: str
    folder: Path
    about: dict[str, Any]  # version.json: format, files, lineage, published_unix_s
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"


@contextmanager
def _reading() -> Iterator[None]:
    """An OSError, such as a stale handle of NFS, as Unreadable."""
    try:
        yield
    except OSError as e:
        raise Unreadable(f"the store cannot be read now: {e}") from None


class AdapterStore:
    """The adapters below `root`, which need not exist yet."""

    def __init__(self, root: Path):
        self.root = Path(root)

    # ---- writing --------------------------------------------------------------------------------------------------------
    def publish(self, name: str, artifact: Artifact) -> Version:
        """Copy a trained adapter in and let its name stand for it; one that is there already is left as it is, and so is what its name stands for."""
        for found in (self.get(model) for model in self.versions() if model.startswith(f"{name}@")):
            if found.about["lineage"].get("digest") == artifact.digest:
                if name not in self.names():  # it was cut short
                    self.alias(name, found.id)
                return found
        counts = {k: v for k, v in artifact.counts.items() if isinstance(v, int | float | str)}
        manifest = artifact.manifest
        lineage = {k: manifest.get(k) for k in ("kind", "fingerprint", "digest", "graft", "commit", "created_unix_s", "wall_s")}
        parents = {n: p["digest"][:12] for n, p in manifest.get("parents", {}).items()}
        return self.add(name, artifact.path, lineage | {"parents": parents, "counts": counts})

    def add(self, name: str, source: Path, lineage: dict[str, Any]) -> Version:
        """As publish(), of any folder that holds an adapter. ConfigError where the name is none, ArtifactError where the folder is."""
        _require(NAME, name, "name")
        files = sorted(f for f in source.iterdir() if FILES.fullmatch(f.name))
        if WEIGHTS not in [f.name for f in files]:
            raise ArtifactError(f"{source} holds no {WEIGHTS}: only LoRA adapters are published")
        home = self.root / name
        home.mkdir(parents=True, exist_ok=True)
        for folder in (self.root, home):
            folder.chmod(0o755)  # whatever the umask of who trains: servers run as others
        draft = home / f".draft-{os.getpid()}-{time.monotonic_ns()}"
        draft.mkdir(mode=0o755)
        try:
            for file in files:
                shutil.copyfile(file, draft / file.name)
            listed = {f.name: {"sha256": sha256_file(draft / f.name), "bytes": f.stat().st_size} for f in files}
            _check_images(source, listed)
            version = digest_of(listed)[:12]
            about = {"format": 1, "files": listed, "lineage": lineage, "published_unix_s": round(time.time(), 3)}
            (draft / LIST).write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
            for file in draft.iterdir():
                file.chmod(0o444)
            draft.chmod(0o755)
            _check_header(draft / WEIGHTS)
            if not (home / version).exists():
                fsync_tree(draft)
                os.rename(draft, home / version)
                fsync_dir(home)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self.alias(name, f"{name}@{version}")
        return self.get(f"{name}@{version}")

    def alias(self, name: str, target: str) -> None:
        """Let `name` stand for the version `target`, of this name or another; UnknownAdapter where that is not there."""
        _require(NAME, name, "name")
        found = self.get(target)
        home = self.root / name
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o755)
        write_text_atomic(home / ALIAS, found.id)
        (home / ALIAS).chmod(0o644)

    def note(self, model: str, **notes: Any) -> Version:
        """Keep something beside a version; None takes it away."""
        found = self.get(model)
        kept = {k: v for k, v in {**found.notes, **notes}.items() if v is not None}
        file = found.folder.with_name(f"{found.version}.json")
        write_text_atomic(file, json.dumps(kept, ensure_ascii=False, indent=1))
        file.chmod(0o644)
        return self.get(found.id)

    # ---- reading --------------------------------------------------------------------------------------------------------
    @_reading()
    def get(self, model: str) -> Version:
        """What `name` stands for, or the version `name@version`; UnknownAdapter where there is none, ArtifactError where it is damaged, Unreadable
        where it cannot be looked at. Hashes nothing."""
        name, at, version = model.partition("@")
        _require(NAME, name, "name")
        home = self._plain(self.root / name)
        if not at:
            try:
                target = (home / ALIAS).read_text(encoding="utf-8", errors="replace").strip()
            except (FileNotFoundError, NotADirectoryError):
                raise UnknownAdapter(f"the store {self.root} has no adapter {name!r}") from None
            if not ID.fullmatch(target):
                raise ArtifactError(f"{home / ALIAS} names no version: {target[:40]!r}")
            return self.get(target)
        _require(VERSION, version, "version")
        folder = self._plain(home / version)
        try:
            about = json.loads((folder / LIST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UnknownAdapter(f"the store {self.root} has no adapter {model!r}") from None
        except ValueError as e:
            raise ArtifactError(f"{folder / LIST} cannot be read ({e})") from None
        file = folder.with_name(f"{version}.json")
        try:
            notes = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as e:
            raise ArtifactError(f"{file} cannot be read ({e})") from None
        for path, tree in ((folder / LIST, about), (file, notes)):
            if not isinstance(tree, dict):
                raise ArtifactError(f"{path} cannot be read (it holds no object)")
        return Version(name, version, folder, about, notes)

    @_reading()
    def names(self) -> dict[str, str]:
        """{name: the version it stands for, as name@version}; what is no plain name, or stands for none that can be read, is left out."""
        found = {}
        for alias in sorted(self.root.glob(f"*/{ALIAS}")):
            with suppress(FileNotFoundError, IsADirectoryError, PermissionError):  # not what passes: a name would be gone until the next look
                if NAME.fullmatch(alias.parent.name) and not alias.is_symlink() and not alias.parent.is_symlink():
                    found[alias.parent.name] = alias.read_text(encoding="utf-8", errors="replace").strip()
        return {name: target for name, target in found.items() if ID.fullmatch(target)}

    @_reading()
    def versions(self) -> list[str]:
        """All as name@version, the oldest first."""
        found = [f for f in self.root.glob(f"*/*/{LIST}") if NAME.fullmatch(f.parts[-3]) and VERSION.fullmatch(f.parts[-2])]
        return [f"{f.parts[-3]}@{f.parts[-2]}" for f in sorted(found, key=lambda f: f.stat().st_mtime_ns)]

    @_reading()
    def verified(self, model: str) -> Version:
        """get(), and every file is as it was published; ArtifactError names the first that is not, Unreadable one that cannot be looked at. 1 s a GB."""
        found = self.get(model)
        listed = found.about.get("files", {})
        if digest_of(listed)[:12] != found.version:
            raise ArtifactError(f"{found.folder / LIST} lists other files than those that {found.id} was published with")
        for file in sorted(found.folder.iterdir()):
            if file.name not in (*listed, LIST):
                raise ArtifactError(f"{file} is no part of {found.id}: an adapter is safetensors, JSON and the images that it was published with")
        for name, entry in listed.items():
            file = self._plain(found.folder / name)
            if not FILES.fullmatch(name) or not file.is_file():
                raise ArtifactError(f"{file} is missing, or is no file of an adapter")
            if (size := file.stat().st_size) != entry["bytes"]:
                raise ArtifactError(f"{file} has {size} bytes, {found.id} was published with {entry['bytes']}")
            if sha256_file(file) != entry["sha256"]:
                raise ArtifactError(f"{file} was altered: its SHA-256 is not that of {found.id}")
        _check_images(found.folder, listed)
        _check_header(found.folder / WEIGHTS)
        return found

    def _plain(self, path: Path) -> Path:
        """The path; ArtifactError where it, or what it lies in below the root, is a symbolic link."""
        at = path
        while at != self.root:
            if at.is_symlink():
                raise ArtifactError(f"{at} is a symbolic link: adapters are read from the store itself")
            at = at.parent
        return path


def _require(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise UnknownAdapter(f"{text[:80]!r} is no {what} of an adapter: they are of the form {pattern.pattern}")


def _check_images(folder: Path, listed: dict[str, Any]) -> None:
    """ArtifactError where an image's name is not its SHA-256, or there are more than are taken."""
    images = {name: entry for name, entry in listed.items() if IMAGE.fullmatch(name)}
    for name, entry in images.items():
        if not name.startswith(entry["sha256"]):
            raise ArtifactError(f"{folder / name} was altered: its SHA-256 is not its name")
    size = sum(entry["bytes"] for entry in images.values())
    if len(images) > MAX_IMAGES or size > MAX_IMAGE_BYTES:
        raise ArtifactError(f"{folder} holds {len(images)} images in {size} bytes: at most {MAX_IMAGES} in {MAX_IMAGE_BYTES} are taken")


def _check_header(file: Path) -> None:
    """ArtifactError where a safetensors file is none, is cut short, or holds more than is taken; reads the header alone
    (https://github.com/huggingface/safetensors#format)."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ArtifactError(f"{file} is no safetensors file, or is cut short")
        try:
            header = json.loads(f.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ArtifactError(f"{file} is no safetensors file, or is cut short") from None
    if max(ends, default=0) != size - 8 - length:
        raise ArtifactError(f"{file} has {size} bytes, its header says {8 + length + max(ends, default=0)}")
    if size > MAX_BYTES or len(ends) > MAX_TENSORS:
        raise ArtifactError(f"{file} holds {len(ends)} tensors in {size} bytes: at most {MAX_TENSORS} in {MAX_BYTES} are taken")
