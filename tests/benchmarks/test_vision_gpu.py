"""benchmarks/vision_gpu.py: a peer sees the tokens, targets and pixels that graft does, in its order; the table; and both halves at a tiny scale."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import torch

from graft.core.shards import ShardSet
from graft.model.images import ImageProcessor
from graft.train.order import BinOrder
from graft.train.pictures import Pictures

from ..model.tiny_vision import tiny
from .halves import BENCHMARKS

PIXELS = 30_000


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("vision_gpu")


def test_a_screens_answer_keeps_to_the_recipes_schema(bench: ModuleType) -> None:
    schema = json.loads((bench.RECIPE.parent / "ui-vqa/answer.schema.json").read_text(encoding="utf-8"))
    rows = list(import_module("vision_data").rows(6, 0.2))
    assert rows == list(import_module("vision_data").rows(6, 0.2)) and len({row["images"][0]["bytes"] for row in rows}) == 2
    answers = [json.loads(row["messages"][1]["content"]) for row in rows]
    for answer in answers:
        jsonschema.validate(answer, schema)
    assert {e["kind"] for e in answers[1]["elements"]} == {"button", "field"} and len(answers[0]["elements"]) > 10


def test_a_peer_trains_on_what_graft_does(bench: ModuleType, tmp_path: Path) -> None:
    told, peers = bench.prepare(tmp_path / "made", 6, 1024, PIXELS, 0.2), import_module("vision_gpu_peers")
    folder, base = tmp_path / "made/shards", tmp_path / "made/tokenizer"
    assert told["bins"] == told["images"] == 6 and len(list((tmp_path / "made/shards/images").iterdir())) == 2 and not told["rejected"]
    shards, processor = ShardSet.open(folder / "train"), ImageProcessor(str(base), None, PIXELS)
    lm = tiny(vocab_size=8192, images=dict(zip(("start", "end", "image"), (4, 5, 6), strict=True)))
    ours, rows = Pictures(folder, processor, lm, 1), peers.rows_of(folder, 2, 3, seed=3)
    make = peers.Rows(base, folder / "images", PIXELS, lm.config.image_token_id, 3)
    for step in range(3):
        batch = ours.collate([shards.bin(int(i)) for i in BinOrder(6, 3).take(2 * step, 2)])
        given = make(rows[2 * step : 2 * step + 2])
        length = given["input_ids"].shape[1]
        assert torch.equal(batch.text.input_ids[:, :length], given["input_ids"])
        assert torch.equal(batch.pixels, given["pixel_values"]) and batch.layout.whole.cu.tolist() == [0, *given["image_grid_thw"].prod(1).cumsum(0)]
        labels = given["labels"]
        assert torch.equal(batch.targets, labels[labels >= 0]) and (given["mm_token_type_ids"].sum() * 4 == len(batch.pixels))
        assert not (labels[given["mm_token_type_ids"] == 1] >= 0).any() and (labels[:, :20] < 0).all(), "answers alone"


def steps(tokens: int, step_time_s: float) -> list[dict[str, Any]]:
    one = {"tokens": tokens, "images": 16, "data_s": 0.0, "peak_mem_gib": 30.0, "loss": 2.0}
    return [{**one, "step_time_s": 9.0}] * 5 + [{**one, "step_time_s": step_time_s}] * 5


def test_the_table_sets_graft_beside_the_best_peer(bench: ModuleType) -> None:
    paces = [("bf16", "graft", 1.0), ("bf16", "trl", 1.5), ("bf16", "transformers", 2.0), ("fp8", "graft", 0.75), ("nf4", "graft", 1.25)]
    runs = [{"precision": precision, "of": of, **bench.told(steps(24_000, pace))} for precision, of, pace in paces]
    runs.append({"precision": "nf4", "of": "trl", "failed": "OutOfMemoryError: 1 | 2"})
    lines = bench.report({"runs": runs, "device": "a GPU", "versions": {"torch": "2"}, "commit": "c", "command": "python"}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:8]]
    assert [c[:5] for c in cells[:4]] == [
        ["bf16", "graft", "24,000", "1.50", "16.0"],
        ["bf16", "trl", "16,000", "1.00", "10.7"],
        ["bf16", "transformers", "12,000", "0.75", "8.0"],
        ["fp8", "graft", "32,000", "2.00", "21.3"],
    ]
    assert cells[4][:4] == ["nf4", "graft", "19,200", ""] and cells[5][2] == "failed: OutOfMemoryError: 1 / 2"
    assert {len(c) for c in cells} == {len(bench.HEAD)} and cells[0][8:] == ["9.0 s", "2.000, 2.000"]


@pytest.mark.campaign
def test_both_halves_at_a_tiny_scale(tmp_path: Path) -> None:
    """On the CPU: 2 minutes on two cores."""
    program = [sys.executable, str(BENCHMARKS / "vision_gpu.py"), "--tiny", "--steps", "6", "--peers", "transformers"]
    subprocess.run([*program, "--prepare", str(tmp_path / "made")], check=True)
    (tmp_path / "made").rename(tmp_path / "moved")
    command = [*program, "--train", str(tmp_path / "moved"), "--out", str(tmp_path / "out"), "--workspace", str(tmp_path / "home")]
    subprocess.run(command, check=True)
    runs = {(r["precision"], r["of"]): r for r in json.loads((tmp_path / "out/vision_gpu.json").read_text())["runs"]}
    assert list(runs) == [("bf16", "graft"), ("bf16", "transformers"), ("fp8", "graft"), ("nf4", "graft"), ("nf4", "transformers")]
    assert "needs a GPU of compute capability" in runs.pop(("fp8", "graft"))["failed"]
    for precision in ("bf16", "nf4"):
        ours, theirs = runs[precision, "graft"], runs[precision, "transformers"]
        assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=2e-3) and len(ours["losses"]) == len(theirs["losses"]) == 6
    assert "| nf4 | transformers |" in (tmp_path / "out/vision_gpu.md").read_text()
