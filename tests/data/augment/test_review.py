"""`graft review` in a real pseudo-terminal: keys in, decisions on disk, the terminal as it was."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from rich.console import Console

from graft.core.errors import ConfigError, DataError
from graft.data.augment.review import read_decisions, review_in_terminal, run_review

SEED = {"id": "call-00", "family": "call-00", "label": "call", "parent": None, "request": None}
SEED["messages"] = [{"role": "user", "content": "請幫我畫一隻柴犬"}, {"role": "assistant", "content": "好的"}]


def made(n, parent="call-00", user=None):
    messages = [{"role": "user", "content": user or f"請畫第 {n} 隻柴犬"}, {"role": "assistant", "content": f"第 {n} 隻好了"}]
    return {"id": f"row-{n}", "family": "call-00", "label": "call", "parent": parent, "request": f"key-of-{n}", "messages": messages}


ROWS = [SEED, *(made(n) for n in range(6))]


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, tmp_path, rows=ROWS):
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        self.decisions = tmp_path / "review.jsonl"
        script = (
            "import json, sys; from pathlib import Path; from graft.data.augment.review import review_in_terminal\n"
            f"print('counts', review_in_terminal(json.loads(Path({str(tmp_path / 'rows.json')!r}).read_text()), Path({str(self.decisions)!r})))"
        )
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (30, 120))
        self.before = termios.tcgetattr(self.slave)
        slave = os.dup(self.slave)
        env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
        self.process = subprocess.Popen([sys.executable, "-c", script], preexec_fn=lambda: os.login_tty(slave), env=env)
        os.close(slave)
        self.seen = ""

    def expect(self, text, timeout_s=20.0):
        """Read the screen until `text` stands on it; what was seen up to there is used up."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not appear in {self.seen[-2000:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                raw = os.read(self.master, 65536).decode(errors="replace")
                self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)
        self.seen = self.seen.partition(text)[2]

    def press(self, keys):
        os.write(self.master, keys.encode())

    def close(self):
        """Wait for the end; the terminal must be as it was. Returns the exit status."""
        deadline = time.monotonic() + 20
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self.master], [], [], 0.05)[0]:
                os.read(self.master, 65536)
        os.set_blocking(self.master, False)
        after = termios.tcgetattr(self.slave)
        os.close(self.master)
        os.close(self.slave)
        assert after == self.before, "the terminal is not as it was"
        return self.process.returncode


def lines(path):
    return [(d["id"], d["decision"]) for d in map(json.loads, path.read_text().splitlines())]


def test_keys_become_decisions_at_once_and_undo_takes_one_back(tmp_path):
    t = Terminal(tmp_path)
    t.expect("row 1 of 6   0 kept, 0 rejected, 6 to go")
    t.expect("請畫第 0 隻柴犬")
    t.expect("similar to its parent")
    t.expect("key-of-0")
    t.press("k")
    t.expect("row 2 of 6   1 kept, 0 rejected, 5 to go")
    assert lines(t.decisions) == [("row-0", "keep")], "on disk before the next screen"
    t.press("r")
    t.expect("row 3 of 6   1 kept, 1 rejected")
    t.press("u")
    t.expect("row 2 of 6   1 kept, 0 rejected")
    t.press("k x")  # x does nothing, space goes on
    t.expect("row 4 of 6   2 kept, 0 rejected")
    t.press("\x1b[D")
    t.expect("row 3 of 6")
    t.press("\x1b[C\x1bOB")
    t.expect("row 5 of 6")
    t.press("Ｒ")  # typed full-width
    t.expect("row 6 of 6   2 kept, 1 rejected, 3 to go")
    t.press("q")
    t.expect("counts {'keep': 2, 'reject': 1, 'undecided': 3}")
    assert t.close() == 0
    assert lines(t.decisions)[1:] == [("row-1", "reject"), ("row-1", "undecided"), ("row-1", "keep"), ("row-4", "reject")]
    assert read_decisions(t.decisions) == {"row-0": "keep", "row-1": "keep", "row-4": "reject"}

    again = Terminal(tmp_path)
    again.expect("row 1 of 3")
    again.expect("請畫第 2 隻柴犬")
    again.press("rrr")  # typed ahead
    again.expect("That was the last one")
    again.press("q")
    again.expect("counts {'keep': 0, 'reject': 3, 'undecided': 0}")
    assert again.close() == 0 and len(read_decisions(t.decisions)) == 6


@pytest.mark.parametrize("how", ["ctrl-c", "SIGTERM", "hang-up key"])
def test_the_terminal_is_restored_however_it_ends(tmp_path, how):
    t = Terminal(tmp_path)
    t.expect("row 1 of 6")
    t.press("k")
    t.expect("row 2 of 6")
    if how == "SIGTERM":
        t.process.send_signal(signal.SIGTERM)
    else:
        t.press("\x03" if how == "ctrl-c" else "\x04")
    assert t.close() == {"ctrl-c": -signal.SIGINT, "SIGTERM": 143, "hang-up key": 0}[how]
    assert lines(t.decisions) == [("row-0", "keep")]


def test_a_kill_in_the_middle_keeps_every_decision(tmp_path):
    t = Terminal(tmp_path)
    t.expect("row 1 of 6")
    t.press("krk")
    t.expect("row 4 of 6")
    t.process.kill()
    t.process.wait()
    os.close(t.master)
    os.close(t.slave)
    assert read_decisions(t.decisions) == {"row-0": "keep", "row-1": "reject", "row-2": "keep"}
    with t.decisions.open("a") as f:
        f.write('{"id": "row-3", "dec')  # as a kill inside the write would leave it
    assert read_decisions(t.decisions) == {"row-0": "keep", "row-1": "reject", "row-2": "keep"}
    again = Terminal(tmp_path)
    again.expect("row 1 of 3")
    again.press("r")
    again.expect("row 2 of 3")
    again.press("q")
    assert again.close() == 0
    assert read_decisions(t.decisions) == {"row-0": "keep", "row-1": "reject", "row-2": "keep", "row-3": "reject"}


def test_a_line_without_its_end_is_kept_where_it_is_whole(tmp_path):
    path = tmp_path / "review.jsonl"
    path.write_text('{"id": "row-0", "decision": "keep"}')
    keys = iter(["r", "q"])
    run_review(ROWS, path, lambda: next(keys), Console(file=(tmp_path / "screen").open("w")))
    assert lines(path) == [("row-0", "keep"), ("row-1", "reject")]


def test_what_an_api_answers_does_not_steer_the_terminal(tmp_path):
    row = made(1, parent="gone", user="看\x1b]0;title\x07\x1b[2J[bold]\u202e這裡")
    parent = {"id": "gone", "user": "原句", "assistant": "答", "reason": "similar"}
    screen = tmp_path / "screen"
    with screen.open("w", encoding="utf-8") as f:
        run_review(
            [row], tmp_path / "review.jsonl", lambda: "q", Console(file=f, width=160, height=30, force_terminal=True, color_system=None), [parent]
        )
    text = screen.read_text(encoding="utf-8")
    assert "看<U+001B>]0;title<U+0007><U+001B>[2J[bold]<U+202E>這裡" in text
    assert "\x1b]0" not in text and "\x1b[2J" not in text and "原句" in text


def test_rows_about_images_can_be_reviewed_too(tmp_path):
    asked = [{"type": "image", "image": "images/ab.jpg", "sha256": "ab"}, {"type": "text", "text": "這是什麼"}]
    row = {"id": "0123", "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "[一隻貓]"}], "family": "ab"}
    keys = iter(["k", "q"])
    with (tmp_path / "screen").open("w+", encoding="utf-8") as f:
        console = Console(file=f, width=100, height=30, force_terminal=True, color_system=None)
        counts = run_review([{**row, "request": "0123", "parent": None}], tmp_path / "review.jsonl", lambda: next(keys), console)
        f.seek(0)
        screen = f.read()
    assert counts == {"keep": 1, "reject": 0, "undecided": 0}
    assert "[images/ab.jpg]" in screen and "這是什麼" in screen and "[一隻貓]" in screen and "parent" not in screen


def test_no_terminal_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", (tmp_path / "keys").open("w+"))
    with pytest.raises(ConfigError, match=r"no terminal.*review\.jsonl") as e:
        review_in_terminal(ROWS, tmp_path / "review.jsonl")
    assert "\n" not in str(e.value) and not (tmp_path / "review.jsonl").exists()


def test_another_bad_line_is_named(tmp_path):
    path = tmp_path / "review.jsonl"
    assert read_decisions(path) == {}
    for bad in ("x", '{"id": "a", "decision": "maybe"}', "[]", '{"decision": "keep"}', '{"id": 1, "decision": "keep"}'):
        path.write_text('{"id": "a", "decision": "keep"}\n\n' + bad + "\n")
        with pytest.raises(DataError, match=r"review\.jsonl:3: no decision"):
            read_decisions(path)
