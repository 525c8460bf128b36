"""Chat rows as JSONL, one a line: {"id", "messages", "label": "call" | "text", "family", "parent", "request"}.

`family` names the seed that a row descends from, `parent` the row that it rewrites and `request` the API call that made
it (both null for a seed). Files are read and written a line at a time, about 100 MB a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from graft.core.calls import parse_answer
from graft.core.errors import DataError
from graft.core.sections import Task

Row = dict[str, Any]
LABELS = ("call", "text")
AN_IMAGE = "\ufffc"  # OBJECT REPLACEMENT CHARACTER: where one stands in a text


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file in order, blank lines left out; DataError names file:line where one is no object."""
    return (row for _, row in _numbered(path))


def write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    """Write one object a line, as UTF-8 with characters unescaped; returns how many. Makes the folder where it is missing.

    A row with a lone surrogate, which an API's JSON may hold and UTF-8 cannot, is written with escapes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("wb") as f:
        for row in rows:
            try:
                line = json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                line = json.dumps(row).encode()
            f.write(line + b"\n")
            count += 1
    return count


def read_seeds(path: Path, task: Task) -> list[Row]:
    """The user's seeds as rows; each line needs "messages" alone, and becomes a family of its own, `call-00` and on.

    Raises DataError with file:line for a line that is no JSON, has no or unbalanced messages or a malformed call, and with
    the file for one that is missing, empty or of one class only.
    """
    seeds: list[Row] = []
    counts = dict.fromkeys(LABELS, 0)
    for number, line in _numbered(path):
        where = f"{path}:{number}"
        messages = line.get("messages")
        if not isinstance(messages, list) or not messages:
            raise DataError(f'{where}: no "messages": write {{"messages": [{{"role": "user", …}}, {{"role": "assistant", …}}]}}')
        if wrong := wrong_roles(messages):
            raise DataError(f"{where}: {wrong}")
        answer = parse_answer(messages[-1]["content"], task.function, task.argument)
        if answer.kind == "malformed":
            raise DataError(f'{where}: malformed call ({answer.reason}): write call("{task.function}", {{"{task.argument}": "…"}}) and nothing else')
        family = f"{answer.kind}-{counts[answer.kind]:02d}"
        counts[answer.kind] += 1
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        seeds.append({"id": family, "messages": plain, "label": answer.kind, "family": family, "parent": None, "request": None})
    if not seeds:
        raise DataError(f"{path}: no seed rows: add chat rows of both classes, one JSON object a line")
    if not counts["text"]:
        raise DataError(f"{path}: all {len(seeds)} seeds are calls: add rows answered by plain text")
    if not counts["call"]:
        raise DataError(f'{path}: all {len(seeds)} seeds are plain text: add rows answered by call("{task.function}", …)')
    return seeds


def wrong_roles(messages: list[Any]) -> str | None:
    """What is wrong with a conversation, None for [system], then user and assistant in turn, no message empty."""
    if not all(isinstance(m, dict) for m in messages):
        return 'a message is no object: write {"role": …, "content": …}'
    roles = [m.get("role") for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        return f"roles are {roles}: expected an optional system message, then user and assistant in turn"
    empty = [m["role"] for m in messages if not isinstance(m.get("content"), str) or not m["content"].strip()]
    return f"the {empty[0]} message is empty" if empty else None


def in_texts(messages: list[Any]) -> list[Any]:
    """Messages whose contents are texts; where one is a list of parts, an image is AN_IMAGE."""
    has_parts = [isinstance(m, dict) and isinstance(m.get("content"), list) for m in messages]
    return [{**m, "content": _joined(m["content"])} if parts else m for m, parts in zip(messages, has_parts, strict=True)]


def _joined(parts: list[Any]) -> str:
    return "".join(AN_IMAGE if part["type"] == "image" else part["text"] for part in parts)


def is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON can write and UTF-8 cannot: it stands for bytes that were none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _numbered(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number from 1, object) of every line that is not blank."""
    number = 0
    try:
        with Path(path).open("rb") as f:
            for number, raw in enumerate(f, 1):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")  # a byte order mark, as Windows editors write
                if not text.strip():
                    continue
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: no JSON object but {type(row).__name__}: write one object a line")
                yield number, row
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror}): mend the path") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number}: no UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as e:
        raise DataError(f"{path}:{number}: no JSON ({e.msg} at column {e.colno}): write one object a line") from None
