"""Corpora that are made: the same texts on every run."""

import sysconfig
from itertools import islice
from pathlib import Path

from graft.core.sections import Corpus
from graft.data.corpora import docstrings, made


def test_docstrings_are_long_dedented_and_never_from_tests(tmp_path):
    long = "    Words of a docstring.\n" * 12
    body = f'class A:\n    """{long}    """\n    def f(self):\n        """{"inner words " * 20}"""\n    def g(self):\n        """short"""\n'
    for name in ("a.py", "pkg/b.py", "test/c.py", "pkg/tests/d.py", "idlelib/e.py", "site-packages/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body)
    (tmp_path / "broken.py").write_text("def (:")
    found = list(docstrings(tmp_path))
    assert len(found) == 4, "two long docstrings in each of two files"
    assert found[0] == "\n".join(["Words of a docstring."] * 12)
    assert found[1].startswith("inner words")


def test_this_interpreter_has_docstrings_in_a_fixed_order():
    root = Path(sysconfig.get_path("stdlib"))
    first = list(islice(docstrings(root), 20))
    assert len(first) == 20 and min(map(len, first)) >= 200
    assert first == list(islice(docstrings(root), 20))


def test_texts_stop_at_the_recipes_number():
    found = list(made(Corpus(kind="grammar", documents=5, seed=1)))
    assert len(found) == 5 and found == list(made(Corpus(kind="grammar", documents=5, seed=1))) != list(made(Corpus(kind="grammar", documents=5)))
    talk = list(made(Corpus(kind="dialogues", documents=5, seed=1)))
    assert len(talk) == 5 and all(t["text"].startswith("<|im_start|>user\n") and t["text"].endswith("<|im_end|>\n") for t in talk)
    assert len(list(made(Corpus(kind="docstrings", documents=3)))) == 3
