"""What `graft inspect` says of a shard or prepare artifact, gathered for the terminal and for the page alike.

A section is a table whose rows may have a measure, drawn as a bar. Reads the manifest, the index, the documents' lengths
(4 bytes each) and the rejected rows, a line at a time; of the tokens only the bins that are shown. No Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from graft.core.artifact import MANIFEST, Artifact
from graft.core.errors import ArtifactError, ConfigError
from graft.core.rows import read_jsonl
from graft.core.shards import INDEX, ShardSet
from graft.data.inspect_bin import RenderedBin, render_bins

SPLITS = ("train", "validation")
REASONS = 20  # rows of the table of reasons; the others are one row
EXCERPT = 60  # characters of an example
CLUSTERS = 10  # the largest are shown
MEMBERS = 6  # of a cluster
BUCKETS = 20  # of a histogram


class Section(NamedTuple):
    """A table: `measure` is one number a row, drawn as a bar; `note` is said under it."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    measure: Sequence[float] | None = None
    note: str = ""

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers or ranges of them, which stand at the right."""
        return not any(row[column].strip("0123456789,.–-+e%") for row in self.rows)


class Report(NamedTuple):
    title: str
    sections: list[Section]
    bins: list[RenderedBin]


# ---- what is there ----------------------------------------------------------------------------------------------------
def gather(given: Path, bin: int | None, bins: int) -> Report:
    """The report of `given` with its bin number `bin`, or the first `bins` of them where that is None.

    given: a shard or prepare artifact, or a folder with an index.json. Raises ArtifactError and ConfigError, see `inspect`.
    """
    path = given.resolve()
    if path.name == INDEX or path.name == MANIFEST:
        path = path.parent
    if not path.is_dir():
        raise ArtifactError(f"{given} is no folder: give a shard or prepare artifact, such as data_shards/NAME/shard-sft/current")
    if (path / INDEX).is_file():
        artifact = Artifact.open(path.parent) if (path.parent / MANIFEST).is_file() else None
        return _of_shards(path, artifact, [path.name], bin, bins)
    artifact = Artifact.open(path)
    kind = str(artifact.manifest["kind"])
    if kind.startswith("shard-"):
        return _of_shards(path / SPLITS[0], artifact, [s for s in SPLITS if (path / s / INDEX).is_file()], bin, bins)
    if kind == "prepare":
        if bin is not None:
            raise ConfigError(f"--bin {bin}: {given} is a prepare artifact, which has no bins; give a shard artifact")
        sections = [*_counts(artifact.counts), _rejected(path / "rejected.jsonl"), *_clusters(path / "clusters.parquet")]
        return Report(f"prepare {artifact.path}", sections, [])
    raise ArtifactError(f"{given} is a {kind!r} artifact: `graft inspect` shows shards and what prepare made")


def _of_shards(folder: Path, artifact: Artifact | None, splits: list[str], bin: int | None, bins: int) -> Report:
    held = ShardSet.open(folder, verify=False)
    if bin is not None and not 0 <= bin < len(held):
        raise ConfigError(f"--bin {bin}: {folder} has {len(held)} bins, 0 to {len(held) - 1}")
    sections = [_splits({s: ShardSet.open(folder.parent / s, verify=False).index for s in splits}), _sources(held), _lengths(held)]
    sections += [
        _spread("Bins by tokens used", held.used() / held.seq_len, "of the bin", ".1%", 1.0),
        _spread("Bins by attention cost", held.costs(), "Σ l²", ",.0f"),
    ]
    if artifact:
        sections.append(_rejected(artifact.path / "rejected.jsonl"))
    chosen = range(min(bins, len(held))) if bin is None else [bin]
    return Report(f"shards {folder}", sections, render_bins(held, chosen, artifact))


def _splits(indexes: dict[str, dict[str, Any]]) -> Section:
    columns = ("split", "shards", "bins", "documents", "tokens", "supervised", "used", "Σ l²", "bytes")
    rows = []
    for name, index in indexes.items():
        numbers = (len(index["shards"]), *(index[k] for k in ("bins", "documents", "tokens", "supervised_tokens")))
        size = sum(s["bytes"] for s in index["shards"])
        rows.append((name, *(f"{n:,}" for n in numbers), f"{index['utilisation']:.3%}", f"{index['cost']:.3g}", f"{size:,}"))
    return Section("Counts", columns, rows, note="; ".join(f"{k} {v}" for k, v in _heading(next(iter(indexes.values()))).items()))


def _heading(index: dict[str, Any]) -> dict[str, Any]:
    return {"seq_len": index["seq_len"], "pad id": index["pad_id"], "tokenizer": index["tokenizer"][:12], "format": index["format"]}


def _sources(held: ShardSet) -> Section:
    found = held.index["sources"]
    total = max(1, sum(s["tokens"] for s in found))
    rows = [(s["name"], f"{s['documents']:,}", f"{s['tokens']:,}", f"{s['tokens'] / total:.2%}") for s in found]
    return Section("Shares by source", ("source", "documents", "tokens", "share"), rows, [s["tokens"] / total for s in found])


def _lengths(held: ShardSet) -> Section:
    """Documents by length, in powers of two."""
    lens = held.doc_lens()
    counts = np.bincount(np.frexp(lens)[1]) if lens.size else np.zeros(1, np.int64)  # frexp's exponent: 2^(e - 1) <= length < 2^e
    first = int(np.argmax(counts > 0))
    rows = [(f"{1 << e >> 1}–{(1 << e) - 1}" if e > 1 else "1", f"{n:,}", f"{n / max(1, lens.size):.1%}") for e, n in enumerate(counts)]
    note = f"mean {lens.mean():.1f}, median {np.median(lens):.0f}, longest {lens.max()}" if lens.size else ""
    return Section("Documents by length", ("tokens", "documents", "share"), rows[first:], counts[first:].tolist(), note)


def _spread(title: str, values: np.ndarray, unit: str, form: str, top: float | None = None) -> Section:
    """A histogram of a number a bin, written in the format `form`, up to `top` or the largest."""
    if not values.size:
        return Section(title, (unit, "bins"), [])
    low, high = float(values.min()), float(values.max()) if top is None else top
    counts, edges = np.histogram(values, bins=min(BUCKETS, values.size), range=(low, high if high > low else low + max(1.0, abs(low))))
    some = np.flatnonzero(counts)
    counts, edges = counts[some[0] : some[-1] + 1], edges[some[0] : some[-1] + 2]
    rows = [(f"{a:{form}}–{b:{form}}", f"{n:,}") for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    return Section(
        title, (unit, "bins"), rows, counts.tolist(), f"smallest {values.min():{form}}, mean {values.mean():{form}}, largest {values.max():{form}}"
    )


# ---- what prepare made, and what was rejected --------------------------------------------------------------------------
def _counts(counts: dict[str, Any]) -> Iterator[Section]:
    """The manifest's counts: the corpora side by side, then all else by its dotted name."""
    corpora = counts.get("corpora") or {}
    if corpora and all(isinstance(c, dict) for c in corpora.values()):
        columns = tuple(dict.fromkeys(k for c in corpora.values() for k in c if not isinstance(c[k], dict)))
        rows = [(name, *(_said(c.get(k, "")) for k in columns)) for name, c in corpora.items()]
        sizes = [float(c.get("characters", c.get("documents", 0))) for c in corpora.values()]
        yield Section("Corpora", ("corpus", *columns), rows, [s / max(1.0, sum(sizes)) for s in sizes])
        changed = [(name, step, f"{n:,}") for name, c in corpora.items() for step, n in c.get("changed", {}).items()]
        if changed:
            yield Section("Documents changed by cleaning", ("corpus", "step", "documents"), changed)
    rest = list(_flat({k: v for k, v in counts.items() if k != "corpora"}))
    if rest:
        yield Section("Counts", ("what", "how many"), rest)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _said(value)


def _said(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _rejected(path: Path) -> Section:
    """Rejected rows by source and reason, each with its first example."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for row in read_jsonl(path) if path.is_file() else ():
        key = str(row.get("source", row.get("file", ""))), str(row.get("reason", ""))
        counts[key] += 1
        examples.setdefault(key, str(row.get("text", row.get("id", ""))))
    most = counts.most_common(REASONS)
    rows = [(source, reason, f"{n:,}", examples[source, reason][:EXCERPT]) for (source, reason), n in most]
    if left := counts.total() - sum(n for _, n in most):
        rows.append(("", f"{len(counts) - REASONS} other reasons", f"{left:,}", ""))
    measure = [float(n) for _, n in most] + ([float(left)] if left else [])
    return Section("Rejected", ("source", "reason", "rows", "first"), rows, measure, f"{counts.total():,} rows")


def _clusters(path: Path) -> Iterator[Section]:
    """Documents left out as duplicates, and the largest clusters with the document that each keeps."""
    if not path.is_file():
        return
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    kinds = table.group_by("kind").aggregate([("document", "count"), ("similarity", "mean")]).sort_by("kind").to_pylist()
    rows = [(str(k["kind"]), f"{k['document_count']:,}", f"{k['similarity_mean']:.3f}") for k in kinds]
    yield Section("Duplicates", ("kind", "documents", "mean similarity"), rows, [float(k["document_count"]) for k in kinds])
    sizes = table.group_by("cluster").aggregate([("document", "count")]).sort_by([("document_count", "descending"), ("cluster", "ascending")])
    rows = []
    for cluster, size in zip(*(sizes.slice(0, CLUSTERS)[c].to_pylist() for c in ("cluster", "document_count")), strict=True):
        dropped = table.filter(pc.equal(table["cluster"], cluster)).slice(0, MEMBERS).to_pylist()
        said = ", ".join(f"{d['file']}:{d['row']} ({d['similarity']:.2f})" for d in dropped) + (", …" if size > MEMBERS else "")
        rows.append((f"{dropped[0]['of_file']}:{dropped[0]['of_row']}", f"{size:,}", said))
    yield Section("Largest clusters of duplicates", ("kept file:row", "dropped", "file:row (similarity)"), rows)
