"""What became of the data: rows by class and source, what was dropped and why, images, tokens by source, lengths of the documents."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from graft.core.artifact import Artifact
from graft.core.errors import ArtifactError
from graft.core.rows import read_jsonl
from graft.core.shards import INDEX, ShardSet
from graft.report.flat import number
from graft.report.pictures import FOLDER, Album, images_of, in_marks, question
from graft.report.scrub import cut
from graft.report.tree import Histogram, Sample, Table

SPLITS = ("train", "validation")
BUCKETS = 32  # of a histogram
MOST = 30_000_000  # documents whose lengths are read: 0.1 GB
SAMPLES, LOOKED = 12, 500  # training images that are shown, rows of a source among which they are looked for
TEXT = 160  # code points of a sample's question or answer


def data_tables(found: dict[str, Artifact]) -> Iterator[Table]:
    """The tables of the stages that are complete, in their order; a stage without such counts has none."""
    if "augment" in found:
        yield from _augmented(found["augment"].counts)
    if "prepare" in found:
        yield from _prepared(found["prepare"].counts)
    shards = {name: a.counts for name, a in found.items() if name.startswith("shard-")}
    if shards:
        yield from _sharded(shards)
    if images := list(_images(found)):
        note = "different: one that several rows show counts once; shown: as often as rows show it"
        yield Table(
            "Images", ("stage", "what became of them", "count"), tuple((stage, what, number(n)) for stage, what, n in images), (2,), note=note
        )


def _augmented(c: dict[str, Any]) -> Iterator[Table]:
    if isinstance(rows := c.get("rows"), dict):
        stopped = c.get("stopped") if isinstance(c.get("stopped"), dict) else {}
        yield _counted("Rows made, by class", "class", rows, "rows", {label: str(why) for label, why in (stopped or {}).items()}, "ended by")
    if reasons := c.get("reasons"):
        note = ", ".join(f"{number(c[k])} {k}" for k in ("rewrites", "accepted", "rejected") if k in c)
        what = "answers" if "images" in c else "rewrites"
        yield _counted(f"{what.capitalize()} rejected, by reason", "reason", reasons, what, note=note)


def _prepared(c: dict[str, Any]) -> Iterator[Table]:
    if isinstance(rows := c.get("rows"), dict):
        splits = [s for s in (*SPLITS, "test") if isinstance(rows.get(s), dict)]
        labels = list(dict.fromkeys(label for s in splits for label in rows[s]))
        cells = tuple((s, *(number(rows[s].get(label, 0)) for label in labels), number(sum(rows[s].values()))) for s in splits)
        families = ", ".join(f"{number(n)} families in {split}" for split, n in (c.get("families") or {}).items())
        note = ", ".join(f"{number(rows[k])} {k}" for k in ("in", "kept") if k in rows) + (f"; {families}" if families else "")
        yield Table("Rows by split and class", ("split", *labels, "all"), cells, tuple(range(1, len(labels) + 2)), note=note)
        if rows.get("rejected"):
            yield _counted("Rows dropped, by reason", "reason", rows["rejected"], "rows")
    corpora = c.get("corpora") or {}
    if corpora:
        keys = ("layout", "files", "records", "documents", "characters")
        cells = tuple((name, *(number(corpus.get(k, "")) for k in keys), _reasons(corpus.get("rejected"))) for name, corpus in corpora.items())
        sizes = [float(corpus.get("characters", 0)) for corpus in corpora.values()]
        shares = tuple(size / (sum(sizes) or 1.0) for size in sizes)
        yield Table("Corpora", ("corpus", *keys, "dropped"), cells, (2, 3, 4, 5), shares, "the bar: share of the characters")


def _sharded(shards: dict[str, dict[str, Any]]) -> Iterator[Table]:
    cells, dropped, shares = [], [], []
    for name, c in shards.items():
        for split in (s for s in SPLITS if s in c):
            n = c[split]
            told = (*(number(n.get(k, "")) for k in ("documents", "bins", "tokens", "supervised_tokens")), f"{n['utilisation']:.1%}")
            cells.append((name.removeprefix("shard-"), split, *told))
            shares += [(name.removeprefix("shard-"), split, source, share) for source, share in n.get("shares", {}).items() if split == "train"]
        dropped += [(name.removeprefix("shard-"), reason, number(n)) for reason, n in (c.get("rejected") or {}).items()]
    columns = ("stage", "split", "documents", "bins", "tokens", "supervised", "used")
    yield Table(
        "Shards",
        columns,
        tuple(cells),
        (2, 3, 4, 5, 6),
        note="supervised: the tokens that the loss is of; used: of the bins' tokens, the rest is padding",
    )
    if shares:
        rows = tuple((stage, source, f"{share:.1%}") for stage, _, source, share in shares)
        yield Table("Training tokens by source", ("stage", "source", "share"), rows, (2,), tuple(s for *_, s in shares))
    if dropped:
        yield Table("Documents that were not packed", ("stage", "reason", "documents"), tuple(dropped), (2,))


def _reasons(rejected: dict[str, int] | None) -> str:
    return ", ".join(f"{reason} {number(n)}" for reason, n in (rejected or {}).items()) or "none"


def _counted(
    title: str, what: str, counts: dict[str, Any], unit: str, also: dict[str, str] | None = None, also_column: str = "", note: str = ""
) -> Table:
    """One row a name, with its number and its share."""
    numbers = {name: float(n) for name, n in counts.items() if isinstance(n, int | float)}
    total = sum(numbers.values()) or 1.0
    columns = (what, unit, "share", *((also_column,) if also else ()))
    rows = tuple((name, number(counts[name]), f"{n / total:.1%}", *((also.get(name, ""),) if also else ())) for name, n in numbers.items())
    return Table(title, columns, rows, (1, 2), tuple(n / total for n in numbers.values()), note)


# ---- images -----------------------------------------------------------------------------------------------------------
def kept_images(artifact: Artifact) -> int:
    """The different images that an artifact holds."""
    return sum(name.startswith(f"{FOLDER}/") for name in artifact.manifest["files"])


def _images(found: dict[str, Artifact]) -> Iterator[tuple[str, str, int]]:
    """(stage, what became of them, how many)."""
    if "augment" in found and isinstance(c := found["augment"].counts.get("images"), dict):
        yield from (("augment", what, c[key]) for key, what in (("in", "listed"), ("kept", "kept")) if key in c)
        yield from (("augment", f"rejected: {reason}", n) for reason, n in (c.get("rejected") or {}).items())
    if "prepare" in found and (kept := kept_images(found["prepare"])):
        c = found["prepare"].counts
        sources = [c.get("rows") or {}, *(c.get("corpora") or {}).values()]
        changed, rejected = Counter[str](), Counter[str]()
        for source in sources:
            for what, n in (source.get("changed") or {}).items():
                changed[what] += n if " " in what else 0  # a step that cleans texts has a name of one word
            for reason, n in (source.get("rejected") or {}).items():
                if reason.startswith("image "):
                    rejected[reason.removeprefix("image ").partition(":")[0]] += n
        yield "prepare", "kept, different ones", kept
        yield from (("prepare", f"changed: {what}", n) for what, n in changed.items() if n)
        yield from (("prepare", f"rows rejected: {reason}", n) for reason, n in rejected.items())
    if "questions" in found and (kept := kept_images(found["questions"])):
        yield "questions", "kept, different ones", kept
        tasks = ((task, c) for task, c in found["questions"].counts.items() if isinstance(c, dict))
        yield from (("questions", f"{task}, changed: {what}", n) for task, c in tasks for what, n in (c.get("changed") or {}).items())
    for name, artifact in found.items():
        if name.startswith("shard-"):
            shown = ((split, artifact.counts.get(split, {}).get("images")) for split in SPLITS)
            yield from ((name, f"shown in {split}", n) for split, n in shown if n)


def samples(found: dict[str, Artifact]) -> Iterator[Sample]:
    """The first training rows of each source that show an image, sources in turn, no image twice; none of a source that cannot be read."""
    if "prepare" not in found or not kept_images(found["prepare"]):
        return
    album, seen = Album(found["prepare"].path), set[str]()
    sources = deque(_conversations(found["prepare"], name) for name in ("", *(found["prepare"].counts.get("corpora") or {})))
    while sources and len(seen) < SAMPLES:
        source = sources.popleft()
        for name, messages in islice(source, 1):
            sources.append(source)
            if (first := str(images_of(messages)[0].get("file"))) not in seen:
                seen.add(first)
                said = (cut(text, TEXT) for text in (question(messages), in_marks(messages)[-1][1]))
                yield Sample(album.pictures(messages)[0], name or "augmented rows", *said)


def _conversations(prepared: Artifact, corpus: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Those of the first LOOKED rows of a corpus, of the augmented rows where it is "", that show an image; with the corpus."""
    try:
        for messages in _first(prepared, corpus):
            if isinstance(messages, list) and images_of(found := [m for m in messages if isinstance(m, dict)]):
                yield corpus, found
    except (OSError, ValueError):  # the stage that reads it says so
        return


def _first(prepared: Artifact, corpus: str) -> Iterator[Any]:
    if not corpus:
        path = prepared.path / "rows" / "train.jsonl"
        yield from (row.get("messages") for row in islice(read_jsonl(path), LOOKED)) if path.is_file() else ()
    elif prepared.counts["corpora"][corpus].get("layout") != "text":
        for path in sorted((prepared.path / "corpora" / corpus).glob("*.parquet"))[:1]:
            with pq.ParquetFile(path) as file:
                for batch in islice(file.iter_batches(LOOKED, columns=["text"]), 1):
                    yield from map(json.loads, batch["text"].to_pylist())


# ---- lengths ----------------------------------------------------------------------------------------------------------
def lengths(found: dict[str, Artifact]) -> Iterator[Histogram]:
    """Tokens a document of each training set; none of one that cannot be read or has too many documents."""
    for name, artifact in found.items():
        folder = artifact.path / "train"
        if not name.startswith("shard-") or not (folder / INDEX).is_file() or artifact.counts.get("train", {}).get("documents", 0) > MOST:
            continue
        try:
            lens = ShardSet.open(folder, verify=False).doc_lens()
        except ArtifactError:  # the stage that reads it says so; the page has the rest
            continue
        yield _histogram(name.removeprefix("shard-"), lens)


def _histogram(stage: str, lens: np.ndarray) -> Histogram:
    """Whole numbers of tokens a bucket, so that no bucket holds more lengths than another."""
    if not lens.size:
        return Histogram(f"{stage}: documents by length", "tokens", (0.0, 1.0), (0,), "no documents")
    low, high = int(lens.min()), int(lens.max()) + 1
    step = -(-(high - low) // BUCKETS)
    edges = np.arange(low, high + step, step)
    edges = edges[: np.searchsorted(edges, high) + 1]
    counts, _ = np.histogram(lens, edges)
    note = f"{lens.size:,} documents: mean {lens.mean():.1f}, median {np.median(lens):.0f}, longest {high - 1:,} tokens"
    return Histogram(f"{stage}: documents by length", "tokens", tuple(map(float, edges)), tuple(map(int, counts)), note)
