"""The corpora of a recipe as specifications of reading parts: which files, in which format and layout, cut how.

Looks at sizes, digests and the first records alone. Files of a MiB and more are cut into pieces of `shard.part_mib`;
smaller neighbours share a part, whose border depends on the file before it, so that an added file moves few borders.
What cannot be cut before it is read, as a compressed file, is one part here: its documents are cut (prepare.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from graft.core.errors import ConfigError
from graft.core.hub import HUB
from graft.core.sections import Corpus, EvalTask
from graft.core.stages import Plan
from graft.data.corpora import CHATS
from graft.data.parts import Spec
from graft.data.readers.files import Piece, find, format_of, pieces, sample
from graft.data.readers.hub import hub_files
from graft.data.readers.layouts import layout_of

SMALL = 1 << 20  # bytes; files below share parts
NEIGHBOURS = 16  # small files that share a part, on average


class Source(NamedTuple):
    """A corpus and the reading parts it takes."""

    name: str
    layout: str
    specs: list[Spec]
    files: int

    def __str__(self) -> str:
        return f"{self.name} ({self.layout}, {self.files} files)" if self.files else f"{self.name} (made here)"


def sources(plan: Plan) -> list[Source]:
    """Every corpus of the recipe in its order; ConfigError where a layout cannot be told."""
    return [_source(plan, name, corpus) for name, corpus in plan.recipe.corpora.items()]


def evaluation_sets(plan: Plan) -> list[Spec]:
    """Every evaluation set, and every task's questions, as a reading part would read it; none is cut."""
    named = [("decontaminate.sets", Corpus(path=name)) for name in plan.recipe.decontaminate.sets]
    named += [(f"evaluate.tasks.{name}", as_corpus(task)) for name, task in plan.recipe.evaluate.tasks.items()]
    found = []
    for key, corpus in named:
        if corpus.path is None:
            found.append(_made_here(plan, corpus))
            continue
        path = plan.beside(corpus.path)
        cut = pieces(path, piece_bytes=1 << 62)
        read = {"layout": _layout(key, corpus, sample(cut)), "pieces": [list(piece) for piece in cut], "digest": plan.digests([path])[path]}
        found.append({"corpus": corpus.model_dump(mode="json", include={"path", "images", "text", "mcq"}), **read, **_shown(plan, key, corpus)})
    return found


def _layout(key: str, corpus: Corpus, values: list[dict[str, Any]]) -> str:
    """Of an evaluation set that the recipe names at `key`, whose answers may be held back."""
    with suppress(ConfigError):
        return layout_of(corpus, values)
    try:
        return layout_of(corpus, values, answered=False)
    except ConfigError as e:
        raise ConfigError(f"{key}: {corpus.path}: {e}") from None


def as_corpus(task: EvalTask) -> Corpus:
    """How a task's file is read, or its drawings are made."""
    if task.path is None:
        return Corpus(kind="drawings", documents=task.drawings, seed=task.seed)
    return Corpus(path=task.path, images=task.images, layout=task.layout, text=task.text, mcq=task.mcq)


def _source(plan: Plan, name: str, corpus: Corpus) -> Source:
    if corpus.kind != "files":
        spec = _made_here(plan, corpus)
        return Source(name, spec["layout"], [spec], 0)
    keys = corpus.model_dump(mode="json", exclude={"format", "layout"})
    path = corpus.path or ""
    files = hub_files(path, plan.dataset_commit(path)) if path.startswith(HUB) else find(corpus, plan.beside)
    digests = plan.digests(files)
    cut = [piece for path in files for piece in pieces(path, format_of(path, corpus.format), plan.recipe.shard.part_mib << 20)]
    try:
        layout = layout_of(corpus, sample(cut))
    except ConfigError as e:
        raise ConfigError(f"corpora.{name}: {e}") from None
    keys["documents"] = None  # the limit counts what is left of all parts
    if corpus.images and layout == "text":
        raise ConfigError(f"corpora.{name}: images = {corpus.images!r}, and its records are texts: chats show images")
    shown = _shown(plan, f"corpora.{name}", corpus)
    specs = [
        shown | {"corpus": keys, "layout": layout, "pieces": [list(p) for p in some], "digest": [digests[Path(p.path)] for p in some]}
        for some in _together(cut)
    ]
    return Source(name, layout, specs, len(files))


def _made_here(plan: Plan, corpus: Corpus) -> Spec:
    keys, layout = corpus.model_dump(mode="json", exclude={"format", "layout"}), "messages" if corpus.kind in CHATS else "text"
    return {"corpus": keys, "layout": layout, "pieces": [], "digest": plan.external_input("machine")}


def _shown(plan: Plan, key: str, corpus: Corpus) -> Spec:
    """A corpus's folder of images, which the recipe names at `key`."""
    return {"images": {"path": str(plan.beside(corpus.images)), "digest": plan.images_digest(key, corpus.images)}} if corpus.images else {}


def _together(cut: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces by part: a large one alone, small ones until one whose name ends a group."""
    group: list[Piece] = []
    for piece in cut:
        if piece.start or Path(piece.path).stat().st_size >= SMALL:
            if group:
                yield group
                group = []
            yield [piece]
            continue
        group.append(piece)
        if len(group) == 4 * NEIGHBOURS or hashlib.sha256(os.fsencode(Path(piece.path).name)).digest()[0] % NEIGHBOURS == 0:
            yield group
            group = []
    if group:
        yield group
