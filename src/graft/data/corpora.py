"""Corpora as streams of documents: the grammar's passages and dialogues, the standard library's docstrings, text files, JSONL files.

The order is the same on every run. Docstrings cost about 5 s (the standard library is parsed); files 50 MB a second.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from graft.core.errors import DataError
from graft.core.recipe import Corpus
from graft.core.stages import Plan
from graft.data import grammar
from graft.model.chat import in_chatml

MIN_DOCSTRING = 200  # characters
WINDOW = 1000  # characters of a document in a file without blank lines
_SKIPPED = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """A text as its source has it; `reason` says why it is none. Bytes that are no UTF-8 stand as lone surrogates."""

    text: str
    reason: str = ""


def documents(corpus: Corpus, plan: Plan) -> Iterator[Document]:
    """At most `corpus.documents` documents in a fixed order; DataError where a file cannot be read."""
    found: Iterator[Document]
    if corpus.kind == "grammar":
        assert corpus.documents is not None  # the recipe demands it
        found = (Document(t) for t in grammar.corpus(corpus.documents, corpus.seed))
    elif corpus.kind == "dialogues":
        assert corpus.documents is not None
        found = (Document(in_chatml(m)) for m in grammar.dialogues(corpus.documents, corpus.seed))
    elif corpus.kind == "docstrings":
        found = (Document(t) for t in docstrings(Path(sysconfig.get_path("stdlib"))))
    else:
        assert corpus.path is not None
        path = plan.beside(corpus.path)
        found = blocks(path) if corpus.kind == "text" else jsonl(path)
    return islice(found, corpus.documents)


def docstrings(root: Path) -> Iterator[str]:
    """Dedented docstrings of at least 200 characters of the modules, classes and functions under `root`, by path."""
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # templates and samples of other versions
                continue
            yield from (d for d in _docstrings_in(tree) if len(d) >= MIN_DOCSTRING)


def _docstrings_in(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings_in(child)


def blocks(path: Path) -> Iterator[Document]:
    """Paragraph blocks between blank lines; a file without blank lines gives windows of lines of about 1,000 characters."""
    lines = (line.rstrip("\n") for line in _lines(path))
    windowed = not _has_blocks(path)
    block: list[str] = []
    size = 0
    for line in lines:
        if line.strip():
            block.append(line)
            size += len(line) + 1
        if block and (size >= WINDOW if windowed else not line.strip()):
            yield Document("\n".join(block))
            block, size = [], 0
    if block:
        yield Document("\n".join(block))


def _has_blocks(path: Path) -> bool:
    """Whether a blank line stands between two others."""
    text_seen = gap_seen = False
    for line in _lines(path):
        blank = not line.strip()
        if gap_seen and not blank:
            return True
        gap_seen |= blank and text_seen
        text_seen |= not blank
    return False


def jsonl(path: Path) -> Iterator[Document]:
    """The "text" of every line; a line without one comes with its reason."""
    for line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            yield Document(line.rstrip("\n"), "no JSON")
            continue
        text = row.get("text") if isinstance(row, dict) else None
        yield Document(text) if isinstance(text, str) else Document(line.rstrip("\n"), 'no "text"')


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as f:
            yield from f
    except OSError as e:
        raise DataError(f"corpus {path} cannot be read ({e.strerror}): mend the path in [corpora]") from None
