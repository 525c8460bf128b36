"""Corpora as reading parts: what is read together, and what a corpus is told to be."""

import json

import pytest

from graft.core.errors import ConfigError
from graft.data.readers.files import Piece
from graft.data.sources import NEIGHBOURS, SMALL, _together, sources


def test_an_added_small_file_moves_one_border(tmp_path):
    def groups(names):
        cut = []
        for name in sorted(names):
            (tmp_path / name).write_text("x")
            cut.append(Piece(str(tmp_path / name), "text", 0, 1))
        return [tuple(p.path for p in group) for group in _together(cut)]

    names = [f"{i:04d}.txt" for i in range(400)]
    before, after = groups(names), groups([*names, "0200a.txt"])
    assert sum(map(len, before)) == 400 and sum(map(len, after)) == 401
    assert len(set(before) - set(after)) == 1, "one group is read again"
    assert max(map(len, before)) <= 4 * NEIGHBOURS and 10 < len(before) < 60


def test_a_large_file_is_a_part_of_its_own(tmp_path):
    for name, size in (("a", 1), ("b", SMALL), ("c", 1)):
        (tmp_path / name).write_bytes(b"x" * size)
    cut = [
        Piece(str(tmp_path / "a"), "text", 0, 1),
        *(Piece(str(tmp_path / "b"), "text", i, i + 1) for i in (0, 1)),
        Piece(str(tmp_path / "c"), "text", 0, 1),
    ]
    assert [[p.path[-1] for p in group] for group in _together(cut)] == [["a"], ["b"], ["b"], ["c"]]


def test_a_layout_that_cannot_be_told_names_the_corpus(workspace, tmp_path):
    plan = workspace(tmp_path, notes=[json.dumps({"content": "x"})])
    with pytest.raises(ConfigError, match=r"^corpora.notes: no layout fits records with the keys 'content': name the text's key") as e:
        sources(plan)
    assert "\n" not in str(e.value)


def test_what_was_found_is_said(workspace, tmp_path):
    assert [str(s) for s in sources(workspace(tmp_path))] == ["made (made here)", "notes (text, 1 files)"]
