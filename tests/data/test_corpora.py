import sysconfig
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from graft.core.errors import DataError
from graft.core.recipe import Corpus
from graft.data.corpora import Document, blocks, docstrings, documents, jsonl


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


def test_paragraphs_are_documents(tmp_path):
    (tmp_path / "t.txt").write_text("\n\none\nmore\n\n \ntwo\n\nthree", encoding="utf-8-sig")
    assert list(blocks(tmp_path / "t.txt")) == [Document("one\nmore"), Document("two"), Document("three")]


def test_a_file_without_blank_lines_gives_windows(tmp_path):
    lines = [f"line {i} " + "x" * 90 for i in range(35)]
    (tmp_path / "t.txt").write_text("\n".join(lines) + "\n\n")
    found = [d.text for d in blocks(tmp_path / "t.txt")]
    assert "\n".join(found).split("\n") == lines
    assert all(1000 <= len(t) + 1 < 1150 for t in found[:-1]) and len(found) == 4


def test_bytes_that_are_no_utf8_stand_as_surrogates(tmp_path):
    (tmp_path / "t.txt").write_bytes("好\n\n".encode() + b"bad \xff\n\nfine")
    assert [d.text for d in blocks(tmp_path / "t.txt")] == ["好", "bad \udcff", "fine"]


def test_a_jsonl_line_without_text_has_its_reason(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n\n{oops\n{"body": "b"}\n[1]\n{"text": 3}\n{"text": "z"}')
    found = list(jsonl(tmp_path / "c.jsonl"))
    assert [d.reason for d in found] == ["", "no JSON", 'no "text"', 'no "text"', 'no "text"', ""]
    assert [d.text for d in found if not d.reason] == ["a", "z"]


def test_documents_stop_at_the_recipes_number(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join("abcdef"))
    plan = SimpleNamespace(beside=lambda p: tmp_path / p)
    assert [d.text for d in documents(Corpus(kind="text", path="t.txt", documents=2), plan)] == ["a", "b"]
    assert len(list(documents(Corpus(kind="text", path="t.txt"), plan))) == 6
    made = list(documents(Corpus(kind="grammar", documents=5, seed=1), plan))
    assert len(made) == 5 and made == list(documents(Corpus(kind="grammar", documents=5, seed=1), plan))
    talk = [d.text for d in documents(Corpus(kind="dialogues", documents=5, seed=1), plan)]
    assert len(talk) == 5 and all(t.startswith("<|im_start|>user\n") and t.endswith("<|im_end|>\n") for t in talk)
    assert len(list(documents(Corpus(kind="docstrings", documents=3), plan))) == 3


def test_a_missing_corpus_is_named(tmp_path):
    for kind in ("text", "jsonl"):
        with pytest.raises(DataError, match="none cannot be read"):
            list(documents(Corpus(kind=kind, path="none"), SimpleNamespace(beside=lambda p: tmp_path / p)))
