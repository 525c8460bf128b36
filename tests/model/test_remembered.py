"""What a machine remembers."""

import pytest

from graft.model.remembered import folder, recalled, remember


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe"])
def test_a_damaged_memory_is_none(home, damaged):
    assert recalled("matmuls") == {}
    folder().mkdir()
    (folder() / "matmuls.json").write_bytes(damaged)
    assert recalled("matmuls") == {}
    remember("matmuls", known := {"a": "00ff", "b": None})
    assert recalled("matmuls") == known and recalled("attention") == {}


def test_a_home_that_cannot_be_written_is_no_fault(home):
    (home / "graft").write_text("a file")
    remember("matmuls", {"a": None})
    assert recalled("matmuls") == {}
