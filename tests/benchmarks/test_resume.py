import json
import subprocess
import sys
from pathlib import Path

from graft.data.like import write_like
from graft.model.shapes import SHAPES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {"vocab_size": 3000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_resumed_run_is_held_against_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    write_like("tiny", tmp_path / "base")
    given = ["--base", tmp_path / "base", "--rows", "bf16-short", "--way", "deterministic", "--dropout", "0.1", "--seq-len", "64", "--steps", "4"]
    command = [sys.executable, BENCHMARKS / "resume.py", *given, "--folder", tmp_path, "--out", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert (found["row"], found["resumed"]) == ("bf16-short", "bitwise equal")
    assert [len(run["curve"]) for run in found["runs"].values()] == [4, 4] and "bf16-short, deterministic: resumed bitwise equal" in done.stdout
