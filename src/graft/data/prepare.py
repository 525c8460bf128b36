"""Stage `prepare`: rows and corpora become clean, deduplicated, decontaminated documents, split by seed family, and the images they show.

The test split is settled first: a share of each class's seed families, so no test row descends from a training seed. Its
sentences and the recipe's evaluation sets are what no other row or document may hold. Corpora are read in parts that are
kept across kills (reading.py) and compared with each other (dedup.py); what is left is written out, in files of about
`shard.part_mib` of text where a corpus's file could not be cut before it was read. Everything is ordered by recipe, file
and record; the number of workers decides nothing. The driver holds the augmented rows, never documents.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich import get_console

from graft.core.errors import DataError
from graft.core.recipe import Recipe
from graft.core.rows import LABELS, Row, read_jsonl, write_jsonl
from graft.core.stages import DATA, Job
from graft.data import parts
from graft.data.cluster import ray_cluster
from graft.data.decontaminate import Gate
from graft.data.dedup import EXACT, KEPT, NEAR, Result, deduplicate, mask_of, packed
from graft.data.parts import Part, Spec
from graft.data.pictures import FOLDER
from graft.data.reading import COLUMNS, DOCUMENTS, EXCERPT, PARQUET, REJECTED, TEXTS, VERSION, read_pieces, runs, write_evaluation_texts
from graft.data.seed_rows import OF_IMAGES, families_held_out, of_images, select, told_by
from graft.data.sources import Source, evaluation_sets, sources
from graft.model.chat import files_of

CLUSTERS = "clusters.parquet"
REASONS = {EXACT: "duplicate", NEAR: "near duplicate"}


def run(job: Job) -> None:
    """Write rows/{train,validation,test}.jsonl, corpora/<name>/*.parquet, images/, rejected.jsonl and clusters.parquet."""
    recipe, console = job.recipe, get_console()
    rows = list(read_jsonl(job.parents["augment"].path / "rows.jsonl")) if recipe.augment else []
    if recipe.augment and recipe.augment.images:
        rows = [of_images(row, job.parents["augment"].path) for row in rows]
    test = families_held_out(rows, recipe.prepare.test_families, recipe.seed) if rows else set()
    store = job.plan.home(DATA) / "parts" / "prepare"
    found = sources(job.plan)
    with job.writing() as draft, ray_cluster():
        console.print(f"prepare: {len(rows)} rows; corpora: {', '.join(map(str, found)) or 'none'}", soft_wrap=True)
        held_out = [text for row in rows if row["family"] in test for text in told_by(row, recipe.prepare, recipe.task)]
        sent = recipe.augment.images.model_dump(include={"max_side", "max_bytes"}) if recipe.augment and recipe.augment.images else None
        gate = parts.make(write_evaluation_texts, VERSION, [{"texts": held_out, "sets": evaluation_sets(job.plan), "sent": sent}], store)
        if refused := gate[0].report["refused"]:
            console.print(
                f"prepare: {sum(refused.values()):,} records of evaluation sets cannot be read and are not kept out: {refused}", soft_wrap=True
            )
        read = parts.make(read_pieces, VERSION, _specs(found, gate[0].path / TEXTS, recipe), store)
        kept, apart = _keep(found, read, recipe, store)
        draft.counts["corpora"] = _place(found, read, kept, draft.path)
        link(apart.clusters, draft.path / CLUSTERS)
        if recipe.augment:
            splits, rejected = select(rows, test, Gate.of_file(gate[0].path / TEXTS, recipe.decontaminate), recipe)
            draft.counts |= _row_counts(splits, rejected)
            for name, some in splits.items():
                write_jsonl(draft.path / "rows" / f"{name}.jsonl", some)
                shown = (file for row in some for file in files_of(row["messages"]))
                link_images((job.parents["augment"].path / FOLDER / file for file in shown), draft.path)
        else:
            rejected = []
        write_jsonl(draft.path / REJECTED, rejected)
        written = list(chain.from_iterable(kept))
        concatenate([part.path / REJECTED for part in written], draft.path / REJECTED)
        _check(draft.counts, recipe)
        parts.sweep(store, [*gate, *read, *written, *apart.parts])
        console.print(f"prepare: {_said(draft.counts)}", soft_wrap=True)


def _specs(found: list[Source], gate: Path, recipe: Recipe) -> list[Spec]:
    rules = {key: getattr(recipe, key).model_dump(mode="json") for key in ("decontaminate", "dedup")}
    return [spec | rules | {"gate": str(gate)} for source in found for spec in source.specs]


def documents(prepared: Path, corpus: str) -> Iterator[str]:
    """The texts of a corpus of a `prepare` artifact, in order; messages as JSON where the corpus is one of chats."""
    for path in sorted((prepared / "corpora" / corpus).glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1000, columns=["text"]):
                yield from batch["text"].to_pylist()


# ---- documents --------------------------------------------------------------------------------------------------------
def _keep(found: list[Source], read: list[Part], recipe: Recipe, store: Path) -> tuple[list[list[Part]], Result]:
    """(what is left, by source, in parts of the usual size, what dedup said): duplicates are left out, then all over a corpus's limit.

    A file that cannot be cut beforehand is read as one part; here it is cut, and what follows sees no part that is larger than others.
    """
    apart = deduplicate([part.path for part in read], [part.report["documents"] for part in read], store, recipe.dedup)
    specs: list[Spec] = []
    counts: list[int] = []  # of parts, by source
    masked = zip(read, apart.masks, strict=True)
    for source in found:
        limit, before = recipe.corpora[source.name].documents, len(specs)
        for part, packed_mask in islice(masked, len(source.specs)):
            mask, at = mask_of(packed_mask), 0
            cut = runs(part.path / DOCUMENTS, recipe.shard.part_mib << 20)
            for groups, rows in cut:
                here = mask[at : at + rows]
                spec = {"source": source.name, "read": str(part.path), "mask": packed(here), "limit": limit}
                specs.append(spec if len(cut) == 1 else spec | {"row_groups": [groups.start, groups.stop]})
                if limit is not None:
                    limit -= min(limit, int((here == KEPT).sum()))
                at += rows
        counts.append(len(specs) - before)
    made = iter(parts.make(keep_documents, VERSION, specs, store))
    return [list(islice(made, count)) for count in counts], apart


def keep_documents(spec: Spec, folder: Path) -> dict[str, Any]:
    """The part that writes what is left of a documents file. spec: source, read (the reading part), mask, limit; row_groups: of which the mask is,
    [first, end), or it is of all."""
    read = Path(spec["read"])
    groups = spec.get("row_groups")
    mask = mask_of(spec["mask"])
    keep = mask == KEPT
    if spec["limit"] is not None:
        keep &= np.cumsum(keep) <= spec["limit"]
    reasons = Counter[str]()
    with pq.ParquetFile(read / DOCUMENTS) as file, (folder / REJECTED).open("w", encoding="utf-8") as bad:
        for line in (read / REJECTED).open(encoding="utf-8") if not groups or groups[0] == 0 else ():  # each once
            row = {"source": spec["source"], **json.loads(line)}
            reasons[row["reason"]] += 1
            bad.write(json.dumps(row) + "\n")
        at = characters = 0
        with pq.ParquetWriter(folder / DOCUMENTS, COLUMNS, **PARQUET) as out:
            for batch in file.iter_batches(1000, range(*groups) if groups else None, columns=COLUMNS.names):
                here = slice(at, at := at + len(batch))
                kept = batch.filter(keep[here])
                out.write_batch(kept)
                characters += pc.sum(pc.utf8_length(kept["text"])).as_py() or 0
                for text, number, why in zip(batch["text"].to_pylist(), batch["number"].to_pylist(), mask[here], strict=True):
                    if why:
                        reason = REASONS[int(why)]
                        reasons[reason] += 1
                        row = {"source": spec["source"], "number": number, "reason": reason, "text": text[:EXCERPT]}
                        bad.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {"documents": int(keep.sum()), "characters": characters, "rejected": dict(sorted(reasons.items()))}


def _place(found: list[Source], read: list[Part], kept: list[list[Part]], folder: Path) -> dict[str, Any]:
    """Link the documents into the artifact as corpora/<name>/<n>.parquet; the counts by corpus."""
    counts: dict[str, Any] = {}
    every = iter(read)
    for source, after in zip(found, kept, strict=True):
        before = list(islice(every, len(source.specs)))
        home = folder / "corpora" / source.name
        home.mkdir(parents=True)
        total: Counter[str] = Counter(records=sum(part.report["records"] for part in before))
        rejected: Counter[str] = Counter()
        changed: Counter[str] = Counter()
        for part in before:
            changed.update(part.report["changed"])
            if (part.path / FOLDER).is_dir():
                link_images(sorted((part.path / FOLDER).iterdir()), folder)
        for n, part in enumerate(after):
            link(part.path / DOCUMENTS, home / f"{n:05d}.parquet")
            total.update(documents=part.report["documents"], characters=part.report["characters"])
            rejected.update(part.report["rejected"])
        counts[source.name] = {"layout": source.layout, "files": source.files, **total, "rejected": dict(rejected), "changed": dict(changed)}
    return counts


def link(source: Path, target: Path) -> None:
    """Give a part's file a name in an artifact, by a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def link_images(files: Iterable[Path], artifact: Path) -> None:
    """Give images, named by their content, a place in an artifact's images/, each once."""
    for file in files:
        (artifact / FOLDER).mkdir(exist_ok=True)
        if not (artifact / FOLDER / file.name).exists():
            link(file, artifact / FOLDER / file.name)


# ---- what is said -----------------------------------------------------------------------------------------------------
def concatenate(paths: list[Path], target: Path) -> None:
    """Append files to `target`."""
    with target.open("ab") as out:
        for path in paths:
            with path.open("rb") as some:
                shutil.copyfileobj(some, out)


def _row_counts(splits: dict[str, list[Row]], rejected: list[Row]) -> dict[str, Any]:
    kept = sum(map(len, splits.values()))
    reasons = Counter(r["reason"] for r in rejected)
    families = {name: {r["family"] for r in some} for name, some in splits.items()}
    by_label = {name: dict(sorted(Counter(r["label"] for r in some).items())) for name, some in splits.items()}
    return {
        "rows": {"in": kept + len(rejected), "kept": kept, "rejected": dict(sorted(reasons.items())), **by_label},
        "families": {"train": len(families["train"] | families["validation"]), "test": len(families["test"])},
    }


def _check(counts: dict[str, Any], recipe: Recipe) -> None:
    for split in ("train", "test") if recipe.augment else ():
        for label in LABELS if recipe.augmentation.seeds else (OF_IMAGES,):
            if not counts["rows"][split].get(label):
                raise DataError(
                    f"prepare: no {label!r} row is left for the {split} split (rejected: {counts['rows']['rejected']}): add seeds or rows"
                )
    hits = {name: c["rejected"].get("contaminated", 0) for name, c in {"rows": counts.get("rows", {"rejected": {}}), **counts["corpora"]}.items()}
    if recipe.decontaminate.on_hit == "refuse" and any(hits.values()):
        said = ", ".join(f"{n} of {name}" for name, n in hits.items() if n)
        raise DataError(f'prepare: contaminated by the evaluation sets: {said}; remove them, or set decontaminate.on_hit = "quarantine"')
    for name, c in counts["corpora"].items():
        if not c["documents"]:
            raise DataError(f"prepare: nothing is left of corpus {name!r} (rejected: {c['rejected']}): mend its files, or corpora.{name}.clean")


def _said(counts: dict[str, Any]) -> str:
    rows = counts.get("rows")
    splits = ", ".join(f"{sum(rows[s].values())} {s}" for s in ("train", "validation", "test")) + " rows; " if rows else ""
    texts = ", ".join(f"{c['documents']:,} {name}" for name, c in counts["corpora"].items()) or "no"
    rejected = sum(sum(c["rejected"].values()) for c in [rows or {"rejected": {}}, *counts["corpora"].values()])
    return f"{splits}{texts} documents; {rejected:,} rejected"
