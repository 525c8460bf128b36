import json
from pathlib import Path

import pytest

from graft.core.errors import DataError
from graft.core.rows import read_jsonl, read_seeds, write_jsonl
from graft.core.sections import Task

CALL = {"messages": [{"role": "user", "content": "畫一隻貓"}, {"role": "assistant", "content": 'call("generate_image", {"prompt": "貓"})'}]}
TEXT = {"messages": [{"role": "user", "content": "貓會飛嗎"}, {"role": "assistant", "content": "不會。"}]}


def seeds(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x, ensure_ascii=False).encode()) + b"\n" for x in lines))
    return path


def test_seeds_become_rows_of_families_in_order(tmp_path):
    rows = read_seeds(seeds(tmp_path / "s.jsonl", CALL, TEXT, CALL, b"", {**TEXT, "note": "mine"}), Task())
    assert [r["family"] for r in rows] == ["call-00", "text-00", "call-01", "text-01"]
    assert [r["label"] for r in rows] == ["call", "text", "call", "text"]
    assert rows[0] == {"id": "call-00", "messages": CALL["messages"], "label": "call", "family": "call-00", "parent": None, "request": None}
    assert set(rows[3]) == set(rows[0])


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = seeds(tmp_path / "s.jsonl", CALL, TEXT)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_seeds(path, Task())) == 2


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([CALL, b"{oops"], "s.jsonl:2: no JSON"),
        ([CALL, TEXT, b"[1]"], "s.jsonl:3: no JSON object but list"),
        ([CALL, b"\xff\xfe"], "s.jsonl:2: no UTF-8"),
        ([{"text": "x"}], 's.jsonl:1: no "messages"'),
        ([{"messages": []}], 's.jsonl:1: no "messages"'),
        ([CALL, {"messages": TEXT["messages"][:1]}], r"s.jsonl:2: roles are \['user'\]"),
        ([{"messages": ["hi"]}], "s.jsonl:1: a message is no object"),
        ([{"messages": [TEXT["messages"][0], {"role": "assistant", "content": " "}]}], "s.jsonl:1: the assistant message is empty"),
        ([], "no seed rows"),
        ([b"", b"  "], "no seed rows"),
        ([CALL, CALL], "all 2 seeds are calls: add rows answered by plain text"),
        ([TEXT], "all 1 seeds are plain text: add rows answered by call"),
        ([{"messages": [CALL["messages"][0], {"role": "assistant", "content": 'call("generate_image", {"prompt": }'}]}], "s.jsonl:1: malformed call"),
        ([{"messages": [CALL["messages"][0], {"role": "assistant", "content": 'call("draw", {"prompt": "x"})'}]}], "s.jsonl:1: malformed call"),
    ],
)
def test_a_bad_seed_file_is_told_in_one_line(tmp_path, lines, says):
    with pytest.raises(DataError, match=says) as e:
        read_seeds(seeds(tmp_path / "s.jsonl", *lines), Task())
    assert "\n" not in str(e.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        read_seeds(tmp_path / "none.jsonl", Task())


def test_written_rows_are_read_again(tmp_path):
    rows = [{"id": "1", "t": "貓\u2028\n"}, {"id": "2", "t": "lone \ud800"}]
    assert write_jsonl(tmp_path / "a" / "b.jsonl", iter(rows)) == 2
    assert list(read_jsonl(tmp_path / "a" / "b.jsonl")) == rows
    assert "貓" in (tmp_path / "a" / "b.jsonl").read_text(encoding="utf-8")
