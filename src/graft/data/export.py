"""Rows of an artifact in the formats of other trainers: ms-swift, LLaMA-Factory (ShareGPT) and plain chat messages.

Both trainers mark an image's place by the text `<image>` and have no way to write that text itself, so where a row's own
text holds a tag that the trainer reads, a word joiner (U+2060) goes in after its `<`: it looks the same and is no tag.
Images are hard-linked, or copied across file systems, into `images/` beside the file; a row costs about 10 us, checking
the images 1 s a GB.

Formats as of ms-swift 4.6 (docs/source_en/Customization/Custom-dataset.md, swift/template/base.py) and LLaMA-Factory 0.9.5
(data/README.md, src/llamafactory/data/converter.py). ms-swift looks for relative paths in the folder that it runs in, or in
$ROOT_IMAGE_DIR; LLaMA-Factory in its `dataset_dir`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.core.artifact import Artifact, fsync_dir, sha256_file, write_text_atomic
from graft.core.errors import ArtifactError, ConfigError
from graft.core.rows import Row, read_jsonl

ROWS, IMAGES, DATASET_INFO = "rows.jsonl", "images", "dataset_info.json"
JOINER = "\u2060"
# What each trainer reads in a text; ms-swift also takes <img>path</img> for an image
_TAGS = {
    "ms-swift": re.compile(f"<(?={JOINER}*(?:image|video|audio|img|bbox|ref-object|cot-process|start-image)>)"),
    "llama-factory": re.compile(f"<(?={JOINER}*(?:image|video|audio)>)"),
}
_FROM = {"user": "human", "assistant": "gpt"}


@dataclass
class _Shape:
    """What the rows of a file have in common: each row gets the same columns, which loaders by column need."""

    rows: int = 0
    system: bool = False
    images: dict[str, None] = field(default_factory=dict)  # relative to the artifact, in order


def export(artifact_path: Path, format: str, out: Path) -> dict[str, int]:
    """Write the rows of an augment artifact to `out`, its images beside it; returns {"rows", "images", "escaped"}.

    format: a key of FORMATS. out: `.jsonl`, a row a line, or `.json`, one array; it appears whole or not at all, and with
    llama-factory only once dataset_info.json beside it names it by its stem. escaped: texts that got a word joiner.
    Raises ConfigError where `out` or a file it needs is there already or the format is unknown, ArtifactError where the
    artifact is damaged or holds no rows.
    """
    out = Path(out)
    if format not in FORMATS:
        raise ConfigError(f"unknown export format {format!r}: choose one of {', '.join(FORMATS)}")
    if out.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"{out} ends neither in .jsonl (a row a line) nor in .json (one array): name it so")
    if os.path.lexists(out):
        raise _taken(out)
    artifact = Artifact.open(Path(artifact_path))
    if ROWS not in artifact.manifest["files"]:
        raise ArtifactError(f"{artifact.path} holds no {ROWS}: give the artifact of stage augment")
    if out.resolve().is_relative_to(artifact.path.resolve()):
        raise ConfigError(f"{out} lies in the artifact itself: give a path outside of {artifact.path}")
    artifact.verify(ROWS)
    artifact.verify(f"{IMAGES}/*")
    shape = _shape(artifact)
    entry = _llama_factory_entry(out, shape) if format == "llama-factory" else None
    info = _dataset_info(out, entry) if entry else None
    escaped = [0]
    with _staging(out) as (staged, folder):
        rows = (FORMATS[format](row, shape, escaped) for row in read_jsonl(artifact.path / ROWS))
        _write(staged, rows, array=out.suffix == ".json")
        placed: list[Path] = []
        try:
            for name in shape.images:
                _place(artifact.path / name, out.parent / name, folder, placed)
            if info:
                write_text_atomic(out.parent / DATASET_INFO, info)
            _publish(staged, out)
        except BaseException:
            for path in placed:
                path.unlink(missing_ok=True)
            raise
    fsync_dir(out.parent)
    return {"rows": shape.rows, "images": len(shape.images), "escaped": escaped[0]}


# ---- formats ------------------------------------------------------------------------------------------------------------
def _ms_swift(row: Row, shape: _Shape, escaped: list[int]) -> Row:
    messages = [{"role": m["role"], "content": _tagged(m["content"], "ms-swift", escaped)} for m in row["messages"]]
    return {"messages": messages, **({"images": _images_of(row)} if shape.images else {})}


def _llama_factory(row: Row, shape: _Shape, escaped: list[int]) -> Row:
    texts = [(m["role"], _tagged(m["content"], "llama-factory", escaped)) for m in row["messages"]]
    system = next((text for role, text in texts if role == "system"), "")
    return {
        "conversations": [{"from": _FROM[role], "value": text} for role, text in texts if role != "system"],
        **({"system": system} if shape.system else {}),
        **({"images": _images_of(row)} if shape.images else {}),
    }


def _messages(row: Row, shape: _Shape, escaped: list[int]) -> Row:
    """Contents are strings, or all of them lists of parts where the file has images: a column has one type."""
    if not shape.images:
        return {"messages": row["messages"]}
    return {"messages": [{"role": m["role"], "content": [_part(p) for p in _parts(m["content"])]} for m in row["messages"]]}


FORMATS: dict[str, Callable[[Row, _Shape, list[int]], Row]] = {"ms-swift": _ms_swift, "llama-factory": _llama_factory, "messages": _messages}


def _part(part: Row) -> Row:
    return {"type": "image", "image": part["image"]} if part["type"] == "image" else {"type": "text", "text": part["text"]}


def _parts(content: Any) -> list[Row]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _tagged(content: Any, format: str, escaped: list[int]) -> str:
    """The content as one text, `<image>` where an image stands."""
    pieces = []
    for part in _parts(content):
        if part["type"] == "image":
            pieces.append("<image>")
        else:
            text, found = _TAGS[format].subn(f"<{JOINER}", part["text"])
            escaped[0] += bool(found)
            pieces.append(text)
    return "".join(pieces)


def _images_of(row: Row) -> list[str]:
    return [part["image"] for m in row["messages"] for part in _parts(m["content"]) if part["type"] == "image"]


def _shape(artifact: Artifact) -> _Shape:
    shape = _Shape()
    for row in read_jsonl(artifact.path / ROWS):
        shape.rows += 1
        shape.system |= row["messages"][0]["role"] == "system"
        for name in _images_of(row):
            if name not in artifact.manifest["files"]:
                raise ArtifactError(f"row {row['id']} of {artifact.path} shows {name}, which the artifact does not hold: run `graft run` again")
            shape.images[name] = None
    if not shape.rows:
        raise ArtifactError(f"{artifact.path / ROWS} is empty: there is nothing to export")
    return shape


# ---- LLaMA-Factory's list of data sets ------------------------------------------------------------------------------------
def _llama_factory_entry(out: Path, shape: _Shape) -> Row:
    columns = {"messages": "conversations", **({"system": "system"} if shape.system else {}), **({"images": "images"} if shape.images else {})}
    return {"file_name": out.name, "formatting": "sharegpt", "columns": columns}


def _dataset_info(out: Path, entry: Row) -> str:
    """The text of dataset_info.json with `entry` added; other entries stay as they are."""
    path = out.parent / DATASET_INFO
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = {}
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read ({e}): mend it, or export to another folder") from None
    if not isinstance(known, dict):
        raise ConfigError(f"{path} is no JSON object: mend it, or export to another folder")
    if known.get(out.stem, entry) != entry:
        raise ConfigError(f"{path} has another data set {out.stem!r}: give {out.name} another name, or remove that entry")
    return json.dumps({**known, out.stem: entry}, indent=2) + "\n"  # ASCII: LLaMA-Factory reads it in the locale's encoding


# ---- files --------------------------------------------------------------------------------------------------------------
@contextmanager
def _staging(out: Path) -> Iterator[tuple[Path, Path]]:
    """(where `out` is written first, its folder), beside `out` and gone afterwards."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.export-", dir=out.parent))
    except OSError as e:
        raise ConfigError(f"{out.parent} cannot be written ({e.strerror}): give another path") from None
    try:
        yield folder / "rows", folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, rows: Iterable[Row], array: bool) -> None:
    with path.open("wb") as f:
        f.write(b"[\n" if array else b"")
        for n, row in enumerate(rows):
            f.write(b"" if n == 0 else b",\n" if array else b"\n")
            f.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace"))  # a lone surrogate as a JSON escape
        f.write(b"\n]\n" if array else b"\n")
        f.flush()
        os.fsync(f.fileno())


def _place(source: Path, final: Path, folder: Path, placed: list[Path]) -> None:
    """Make `final` the same file as `source`, or a copy; one that is there already must hold the same bytes."""
    if final.exists():
        if sha256_file(final) != sha256_file(source):
            raise ConfigError(f"{final} exists and is another image: export to another folder")
        return
    try:
        final.parent.mkdir(exist_ok=True)
    except FileExistsError:
        raise _taken(final.parent) from None
    temporary = folder / final.name
    try:
        os.link(source, temporary)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, temporary)
    placed.append(final)
    os.rename(temporary, final)


def _publish(staged: Path, out: Path) -> None:
    """A link, unlike a rename, never replaces what someone else wrote there meanwhile."""
    try:
        os.link(staged, out)
    except FileExistsError:
        raise _taken(out) from None
    except OSError:  # a file system without links
        os.rename(staged, out)


def _taken(path: Path) -> ConfigError:
    return ConfigError(f"{path} exists: move it away, or export to another place")
