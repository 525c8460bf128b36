"""`graft review`: a person pages through new rows in a terminal and keeps or rejects each with one key.

Every decision is appended to review.jsonl and on disk before the next screen: {"id", "decision", "unix_s"}. The last one
for an id wins, and "undecided" takes one back. Nothing but that file is written.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

from graft.core.artifact import fsync_dir
from graft.core.errors import ConfigError, DataError
from graft.core.rows import Row
from graft.data.augment.novelty import jaccard

BY_A_PERSON = "rejected by a person"  # the reason that a rejected row has
_DECISIONS = ("keep", "reject", "undecided")
_KEYS = "k keep   r reject   u undo   space, arrows next and previous   q quit"
_ARROWS = {"A": "previous", "D": "previous", "B": "next", "C": "next"}


def read_decisions(path: Path) -> dict[str, str]:
    """Row id -> "keep" or "reject"; empty where there is no file. A last line cut by a kill is passed over.

    Raises DataError with file:line for any other line that is no decision.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror}): mend the path") from None
    found: dict[str, str] = {}
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        decision = _decision(line)
        if decision:
            found[decision[0]] = decision[1]
        elif number < len(lines):
            raise DataError(f'{path}:{number}: no decision: write {{"id": "…", "decision": "keep" or "reject"}} or delete the line')
    return {row_id: decision for row_id, decision in found.items() if decision != "undecided"}


def review_in_terminal(rows: list[Row], decisions_path: Path, rejected: Iterable[Row] = ()) -> dict[str, int]:
    """`run_review` with this process's terminal; ConfigError where it has none."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            f'graft review reads single keys, and this is no terminal: run it in one, or add {{"id", "decision"}} lines to {decisions_path}'
        )
    with terminal_keys() as read_key:
        return run_review(rows, decisions_path, read_key, Console(), rejected)


def run_review(rows: list[Row], decisions_path: Path, read_key: Callable[[], str], console: Console, rejected: Iterable[Row] = ()) -> dict[str, int]:
    """Page through the rows that are neither seeds nor decided; returns {"keep", "reject", "undecided"} of them.

    read_key: the next key: "k", "r", "u", "q", "next" or "previous"; any other does nothing.
    rejected: rewrites that are no rows and may still be the parent of one, as augment wrote them.
    """
    old = read_decisions(decisions_path)
    texts = {r["id"]: (r["user"], r["assistant"]) for r in rejected if "user" in r} | {r["id"]: _last_turn(r) for r in rows}
    new = [row for row in rows if row["request"] is not None and row["id"] not in old]
    now: dict[str, str] = {}
    undo: list[tuple[int, str]] = []  # (where, what it was before)
    at = 0
    with _appending(decisions_path) as decide, console.screen(hide_cursor=True) as screen:
        while new:
            screen.update(_screen(new, at, now, texts))
            key = read_key()
            if key == "q":
                break
            if key in ("k", "r") and at < len(new):
                row_id = new[at]["id"]
                undo.append((at, now.get(row_id, "undecided")))
                now[row_id] = "keep" if key == "k" else "reject"
                decide(row_id, now[row_id])
                at += 1
            elif key == "u" and undo:
                at, before = undo.pop()
                now[new[at]["id"]] = before
                decide(new[at]["id"], before)
            elif key in ("next", "previous"):
                at = min(len(new), at + 1) if key == "next" else max(0, at - 1)
    return _tally(new, now)


@contextmanager
def terminal_keys() -> Iterator[Callable[[], str]]:
    """Single keys from standard input, without Enter and echo; the terminal is as before on every exit but SIGKILL."""
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setcbreak(fd)
        yield lambda: _read_key(fd)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _read_key(fd: int) -> str:
    """One key, byte by byte, so that keys typed ahead are kept; "q" where the terminal is gone."""
    try:
        while not select.select([fd], [], [], 0.2)[0]:
            pass  # a signal between the interpreter's last look and the call is seen at the next turn, not at the next key
        first = os.read(fd, 1)
        if first in (b"", b"\x04"):
            return "q"
        if first == b"\x1b":
            return _ARROWS.get(_escape_sequence(fd), "")
        following = sum(first[0] >= mark for mark in (0xC0, 0xE0, 0xF0))  # of a character in UTF-8
        text = first + b"".join(os.read(fd, 1) for _ in range(following))
    except OSError:
        return "q"
    key = unicodedata.normalize("NFKC", text.decode(errors="replace")).casefold()  # full-width letters too
    return {" ": "next", "\n": "next", "\r": "next", "\x7f": "previous"}.get(key, key)


def _escape_sequence(fd: int) -> str:
    """The last character of the sequence that follows an escape, empty where none does."""
    found = ""
    while select.select([fd], [], [], 0.05)[0]:
        found += os.read(fd, 1).decode(errors="replace")
        if len(found) > 1 and "@" <= found[-1] <= "~":
            return found[-1]
        if len(found) == 1 and found not in "[O":
            break
    return ""


@contextmanager
def _appending(path: Path) -> Iterator[Callable[[str, str], None]]:
    """Append decisions, each on disk when the call returns; a line cut by a kill is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("ab+", buffering=0) as file:
        if is_new:
            fsync_dir(path.parent)
        _end_line(file)

        def decide(row_id: str, decision: str) -> None:
            line = {"id": row_id, "decision": decision, "unix_s": round(time.time(), 3)}
            file.write(json.dumps(line).encode() + b"\n")
            os.fsync(file.fileno())

        yield decide


def _end_line(file: BinaryIO) -> None:
    file.seek(0)
    raw = file.read()
    last = raw.rpartition(b"\n")[2]
    if last and _decision(last):
        file.write(b"\n")
    elif last:
        file.truncate(len(raw) - len(last))


def _decision(line: bytes) -> tuple[str, str] | None:
    try:
        found = json.loads(line)
        return (found["id"], found["decision"]) if isinstance(found["id"], str) and found["decision"] in _DECISIONS else None
    except (ValueError, KeyError, TypeError):
        return None


def _tally(new: list[Row], now: dict[str, str]) -> dict[str, int]:
    counts = Counter(now.get(row["id"], "undecided") for row in new)
    return {decision: counts[decision] for decision in _DECISIONS}


def _screen(new: list[Row], at: int, now: dict[str, str], texts: dict[str, tuple[str, str]]) -> Layout:
    tally = _tally(new, now)
    head = Text(f"row {min(at + 1, len(new))} of {len(new)}   {tally['keep']} kept, {tally['reject']} rejected, {tally['undecided']} to go")
    layout = Layout()
    layout.split_column(Layout(name="head", size=3), Layout(name="row"), Layout(Text(_KEYS, style="dim"), size=1))
    layout["head"].update(Group(head, ProgressBar(total=len(new), completed=len(new) - tally["undecided"]), Text()))
    layout["row"].update(_row(new[at], now, texts) if at < len(new) else Text("That was the last one."))
    return layout


def _row(row: Row, now: dict[str, str], texts: dict[str, tuple[str, str]]) -> RenderableType:
    parent = texts.get(row["parent"])
    facts = [f"family {row['family']}", *([f"{jaccard(_last_turn(row)[0], parent[0]):.2f} similar to its parent"] if parent else [])]
    conversation = [(m["role"], _words(m["content"])) for m in row["messages"]]
    panels = [Panel(_conversation(conversation), title=f"{row['id']}  {now.get(row['id'], '')}".strip())]
    if row["parent"]:
        of_parent = _conversation([("user", parent[0]), ("assistant", parent[1])]) if parent else Text("It is not in this artifact.")
        panels.append(Panel(of_parent, title=f"parent {row['parent']}", border_style="dim"))
    beside, layout = Layout(), Layout()
    beside.split_row(*panels)
    layout.split_column(beside, Layout(Text(f"{', '.join(facts)}\nrequest {row['request']}", style="dim"), size=2))
    return layout


def _last_turn(row: Row) -> tuple[str, str]:
    return _words(row["messages"][-2]["content"]), _words(row["messages"][-1]["content"])


def _words(content: str | list[Row]) -> str:
    """A message's text; an image among its parts by its name."""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text") or f"[{part.get('image', part['type'])}]" for part in content)


def _conversation(messages: list[tuple[str, str]]) -> RenderableType:
    return Group(*(Text.assemble((f"{role}\n", "bold"), _visible(content), "\n") for role, content in messages))


def _visible(text: str) -> str:
    """Control and format characters by their number: what an API answers must not steer the terminal."""
    return "".join(f"<U+{ord(c):04X}>" if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)
