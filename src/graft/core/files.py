"""Which files a path of a recipe stands for: what a fingerprint counts and what a reader reads are the same files, in the same order."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

from graft.core.errors import ConfigError, DataError


def files_at(path: Path) -> list[Path]:
    """The files of a corpus, sorted: a file, a folder with all below it, or a pattern of files and folders; none where nothing is there.

    Of what `Dataset.save_to_disk` wrote, the Arrow files. Below a folder hidden files and folders are left out, and a linked folder is read,
    once. ConfigError for a link to nothing, DataError where a `datasets` folder lacks its files.
    """
    places = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
    seen: set[str] = set()
    found = sorted({file for place in sorted(places, key=_links_last) for file in (_below(place, seen) if place.is_dir() else [place])})
    if lost := next((file for file in found if not file.exists()), None):
        raise ConfigError(f"{lost} is a link to nothing: mend or remove it")
    return [file for file in found if file.is_file()]


def _below(folder: Path, seen: set[str]) -> Iterator[Path]:
    """seen: the folders that were read, as a link may lead back."""
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=lambda name: _links_last(Path(place, name)))
        if {"state.json", "dataset_info.json"} <= set(names):
            yield from _saved(Path(place))
        elif "dataset_dict.json" not in names:  # beside that stand the splits, each a folder
            yield from (Path(place, name) for name in names if not name.startswith("."))


def _links_last(path: Path) -> tuple[bool, Path]:
    """What is in the place itself goes by its own name, not by a link's."""
    return path.is_symlink(), path


def _saved(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        found = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{folder / 'state.json'} cannot be read ({e!r}): save the dataset again") from None
    if missing := [file for file in found if not file.is_file()]:
        raise DataError(f"{missing[0]} is missing, which state.json beside it names: save the dataset again")
    return found
