"""Corpora that are made on the machine, not read: the grammar's passages and dialogues, the standard library's docstrings, identity, drawings.

The order is the same on every run. Docstrings cost about 5 s (the standard library is parsed).
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from graft.core.rows import Row
from graft.core.sections import Corpus
from graft.data import drawings, grammar, identity
from graft.model.chat import in_chatml

MIN_DOCSTRING = 200  # characters
_SKIPPED = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}


CHATS = ("identity", "drawings")  # the kinds that are made as messages, the others are texts


def made(corpus: Corpus) -> Iterator[Row]:
    """At most `corpus.documents` records in a fixed order: {"messages"} of CHATS, {corpus.text} of other kinds."""
    count = corpus.documents or 0  # what has no end of its own is given one by the recipe
    if corpus.kind == "identity":
        rows = identity.rows(corpus.name or "", corpus.author or "")
    elif corpus.kind == "drawings":
        rows = drawings.rows(count, corpus.seed)
    else:
        rows = ({corpus.text: text} for text in _texts(corpus.kind, count, corpus.seed))
    return islice(rows, corpus.documents)


def _texts(kind: str, count: int, seed: int) -> Iterator[str]:
    if kind == "docstrings":
        return docstrings(Path(sysconfig.get_path("stdlib")))
    return grammar.corpus(count, seed) if kind == "grammar" else dialogues(count, seed)


def dialogues(count: int, seed: int) -> Iterator[str]:
    """The grammar's conversations in chat markup."""
    return (in_chatml(m) for m in grammar.dialogues(count, seed))


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
