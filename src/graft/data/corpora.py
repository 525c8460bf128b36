"""Corpora that are made on the machine, not read: the grammar's passages and dialogues, the standard library's docstrings.

The order is the same on every run. Docstrings cost about 5 s (the standard library is parsed).
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from graft.core.sections import Corpus
from graft.data import grammar
from graft.model.chat import in_chatml

MIN_DOCSTRING = 200  # characters
_SKIPPED = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def made(corpus: Corpus) -> Iterator[str]:
    """At most `corpus.documents` texts in a fixed order."""
    found: Iterator[str]
    if corpus.kind == "docstrings":
        found = docstrings(Path(sysconfig.get_path("stdlib")))
    else:
        assert corpus.documents is not None  # the recipe demands it
        found = grammar.corpus(corpus.documents, corpus.seed) if corpus.kind == "grammar" else dialogues(corpus.documents, corpus.seed)
    return islice(found, corpus.documents)


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
