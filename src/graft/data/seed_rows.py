"""Augmented rows: the split by seed family, or by image, and which rows may be used.

1,000 rows take about 0.1 s.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from graft.core.calls import parse_answer
from graft.core.errors import DataError
from graft.core.recipe import Recipe
from graft.core.rows import LABELS, Row, in_texts, is_unicode, wrong_roles
from graft.core.sections import Prepare, Task
from graft.data.cleaning.document import STEPS
from graft.data.decontaminate import Gate
from graft.model.chat import files_of
from graft.model.pixels import wrong_size

OF_IMAGES = "image"  # the label of rows that augment made of images


def of_images(row: Row, augmented: Path) -> Row:
    """A row that augment made of an image, in the form of a prepared one: labelled OF_IMAGES, its images {"type", "file", "width", "height"}."""
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if isinstance(content, list):
            content = [_sized(part, augmented) if part["type"] == "image" else part for part in content]
        messages.append({**message, "content": content})
    return {**row, "messages": messages, "label": OF_IMAGES}


def _sized(part: Row, augmented: Path) -> Row:
    with Image.open(augmented / part["image"]) as image:  # the header alone is read
        return {"type": "image", "file": Path(part["image"]).name, "width": image.width, "height": image.height}


def families_held_out(rows: Iterable[Row], share: float, seed: int) -> set[str]:
    """The families of the test split: of each class `share` of them, at least one, never all; DataError for a class with one."""
    rows = list(rows)
    families: dict[str, set[str]] = {label: set() for label in LABELS if not any(row["label"] == OF_IMAGES for row in rows)}
    for row in rows:
        families.setdefault(row["label"], set()).add(row["family"])
    chosen: set[str] = set()
    for label, names in families.items():
        if len(names) < 2:
            raise DataError(
                f"prepare: class {label!r} has {len(names)} seed families, a test family and a training family are needed: add seeds, or images"
            )
        order = sorted(names)
        random.Random(seed).shuffle(order)
        chosen.update(order[: min(max(1, int(share * len(order) + 0.5)), len(order) - 1)])
    return chosen


def hold_out_rows(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """(train, validation): rows whose id hashes below `share`, at least one where `share` > 0 and two rows are there."""

    def draw(row: Row) -> float:
        return int.from_bytes(hashlib.sha256(row["id"].encode()).digest()[:8]) / 2**64

    limit = max(share, math.nextafter(min(map(draw, rows)), 2)) if share > 0 and len(rows) > 1 else 0.0
    return [r for r in rows if draw(r) >= limit], [r for r in rows if draw(r) < limit]


def clean_row(row: Row, limits: Prepare, task: Task) -> tuple[Row, str]:
    """(the row with clean messages, why it is rejected or "")."""
    if wrong := wrong_roles(in_texts(row["messages"])):
        return row, "empty" if wrong.endswith("is empty") else "unbalanced roles"
    row = {**row, "messages": [{**m, "content": _tidy_content(m["content"])} for m in row["messages"]]}
    texts = in_texts(row["messages"])
    if not is_unicode("".join(m["content"] for m in texts)):
        return row, "invalid UTF-8"
    size = sum(len(m["content"]) for m in texts if m["role"] != "system")
    if not all(m["content"] for m in texts):
        return row, "empty"
    if size < limits.min_chars:
        return row, "too short"
    if size > limits.max_chars:
        return row, "too long"
    if row["label"] == OF_IMAGES:
        sizes = [
            (part["width"], part["height"]) for m in row["messages"] for part in m["content"] if isinstance(part, dict) and part["type"] == "image"
        ]
        return row, next((f"image {wrong}" for size in sizes if (wrong := wrong_size(*size))), "")
    kind = parse_answer(row["messages"][-1]["content"], task.function, task.argument).kind
    return row, "" if kind == row["label"] else f"the answer is {kind}, the label {row['label']}"


def _tidy_content(content: Any) -> Any:
    if isinstance(content, list):
        return [{**part, "text": tidy(part["text"])} if part["type"] == "text" else part for part in content]
    return tidy(content)


def tidy(text: str) -> str:
    """A message in NFC, without control characters, and without white space that nobody sees."""
    for step in ("nfc", "control", "whitespace"):
        text = STEPS[step](text)[0]
    return text


def told_by(row: Row, limits: Prepare, task: Task) -> list[str]:
    """What no other row may hold of one that is held out: what the user says, cleaned; or the SHA-256 of the images, as what is asked of them is often
    the same. Nothing where the row cannot be used."""
    row, reason = clean_row(row, limits, task)
    shown = [file.partition(".")[0] for file in files_of(row["messages"])]
    return [] if reason else shown or [m["content"] for m in row["messages"] if m["role"] == "user"]


def select(rows: list[Row], test: set[str], gate: Gate, recipe: Recipe) -> tuple[dict[str, list[Row]], list[Row]]:
    """(rows by split, the rejected with their reasons); of equal user texts the first row stays. in = kept + rejected.

    gate: of the evaluation texts, the test families' sentences among them; rows of those families pass it.
    """
    kept: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    rejected: list[Row] = []
    users: set[str] = set()
    wholes: set[str] = set()
    for index, given in enumerate(rows):
        row, reason = clean_row(given, recipe.prepare, recipe.task)
        contents = [m["content"] for m in in_texts(row["messages"])]
        in_test = row["family"] in test
        if not reason and not in_test and gate.hits([*contents, *files_of(row["messages"])]).any():
            reason = "contaminated"
        if not reason:
            asked = [c for c, m in zip(contents, row["messages"], strict=True) if m["role"] == "user"] + files_of(row["messages"])
            user, whole = "\0".join(asked), "\0".join([*contents, *files_of(row["messages"])])
            reason = "duplicate" if whole in wholes else "duplicate user text" if user in users else ""
            users.add(user)
            wholes.add(whole)
        if reason:
            rejected.append({"source": "rows", "id": row["id"], "index": index, "reason": reason, "text": "\n".join(contents)[:200]})
        else:
            kept["test" if in_test else "train"].append(row)
    kept["train"], kept["validation"] = hold_out_rows(kept["train"], recipe.prepare.validation)
    return kept, rejected
