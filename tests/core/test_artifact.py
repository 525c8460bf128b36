"""Artifacts exist whole or not at all, and a damaged one is named."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from graft.core.artifact import Artifact, digest_of, point, write_text_atomic, writing
from graft.core.errors import ArtifactError


def make(path, text="hello"):
    with writing(path, kind="test", fingerprint="f", head={"parents": {}, "inputs": {}}) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "a.txt").write_text(text)
        draft.counts["n"] = 1
    return Artifact.open(path)


def test_written_whole_with_sums_and_counts(tmp_path):
    a = make(tmp_path / "x")
    assert a.counts == {"n": 1} and list(a.manifest["files"]) == ["sub/a.txt"]
    a.verify()
    assert a.digest == make(tmp_path / "y").digest != make(tmp_path / "z", "other").digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y", "z"]


def test_a_file_whose_name_is_no_utf8_is_an_input_like_any_other(tmp_path):
    name = os.fsdecode(b"a\xff.txt")
    with writing(tmp_path / "x", kind="t", fingerprint="f", head={"inputs": {name: "digest"}}) as draft:
        (draft.path / "a").write_text("whole")
    assert Artifact.open(tmp_path / "x").manifest["inputs"] == {name: "digest"}


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), writing(tmp_path / "x", kind="t", fingerprint="f", head={}) as draft:
        (draft.path / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "manifest"])
def test_damage_is_named(tmp_path, damage):
    file = make(tmp_path / "x").path / "sub" / "a.txt"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_text("hel")
    elif damage == "altered":
        file.write_text("hellO")
    else:
        (tmp_path / "x" / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest\.json" if damage == "manifest" else r"a\.txt"):
        Artifact.open(tmp_path / "x").verify()


def test_a_killed_writer_leaves_no_artifact_and_its_draft_is_swept(tmp_path):
    code = (
        "import sys, time, pathlib; from graft.core.artifact import writing\n"
        "with writing(pathlib.Path(sys.argv[1]), kind='t', fingerprint='f', head={}) as d:\n"
        "    (d.path / 'a').write_text('x'); print('in', flush=True); time.sleep(60)\n"
    )
    p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE)
    assert p.stdout.readline()
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    assert not (tmp_path / "x").exists() and len(list(tmp_path.iterdir())) == 1
    make(tmp_path / "x")
    assert [q.name for q in tmp_path.iterdir()] == ["x"]


def test_pointers_and_texts_are_replaced(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "two")
    for target in ("one", "two"):
        point(tmp_path / "current", tmp_path / target)
        assert (tmp_path / "current").resolve().name == target
    write_text_atomic(tmp_path / "t", json.dumps({"a": time.time()}))
    assert "a" in json.loads((tmp_path / "t").read_text())


def test_digest_ignores_key_order():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})
