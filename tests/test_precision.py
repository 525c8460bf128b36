"""benchmarks/precision.py: the peer starts where graft does, a difference is told, and the whole runs where the data stages are not."""

import json
import math
import random
import subprocess
import sys

import pytest
import torch

from graft.core.recipe import EmbeddedBase, Lora, Train
from graft.core.rows import write_jsonl
from graft.data.grammar import corpus
from graft.model.base import random_llama
from graft.model.lora import adapters, inject

from .benchmarks.halves import BENCHMARKS, problem, without_data_stages


@pytest.fixture
def precision(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import precision

    return precision


def test_peft_begins_with_the_adapters_of_graft(precision):
    from peft import LoraConfig, get_peft_model

    shape = EmbeddedBase(hidden_size=16, intermediate_size=32, layers=2, heads=2, kv_heads=1, train=Train())
    ours, theirs, lora = random_llama(shape, 300, 32, 0), random_llama(shape, 300, 32, 0), Lora(r=4)
    inject(ours, lora, torch.bfloat16, seed=7)
    model = get_peft_model(theirs, LoraConfig(r=4, target_modules=list(lora.targets)))
    precision.draw_as_graft(model, lora, 7, torch.device("cpu"))
    found = dict(model.named_parameters())
    wanted = {f"base_model.model.{name}.lora_A.default.weight": a for name, a, _ in adapters(ours)}
    assert len(wanted) == 14
    assert all(torch.equal(found[name], a.float()) for name, a in wanted.items())


def curves(**ends):
    return {precision_row: {0: {0: 2.0, 10: end}, 1: {0: 2.0, 10: 1.5}} for precision_row, end in ends.items()}


@pytest.mark.parametrize(
    ("fp8", "nf4", "holds"),
    [
        (1.506, 1.52, [True, True, True]),
        (1.509, 1.52, [True, False, True]),
        (1.491, 1.52, [True, False, True]),
        (1.5, 1.529, [True, True, False]),
        (math.nan, 1.52, [True, False, True]),
    ],
)
def test_one_seed_over_the_bound_is_enough(precision, fp8, nf4, holds):
    found = curves(bf16=1.5, fp8=fp8, nf4=nf4, **{precision.PEFT: 1.52})
    assert [bound["holds"] for bound in precision.bounds(found, learns=0.1)] == holds


def test_a_task_that_was_not_learned_compares_nothing(precision):
    found = curves(bf16=1.95, **{precision.PEFT: 1.95})
    assert [bound["holds"] for bound in precision.bounds(found, learns=0.05)] == [False]


@pytest.mark.campaign
def test_both_halves_at_a_tiny_scale(precision, tmp_path):
    """On the CPU, where nothing but FP8 is missing: 8 minutes on two busy cores."""
    rng, texts = random.Random(0), [t for t in corpus(600, 0) if len(t) > 100]
    data = tmp_path / "data"
    data.mkdir()
    (data / "taigi_news.txt").write_text("\n".join(texts[:200]), encoding="utf-8")
    articles = [{"title": f"{n}", "paragraphs": [{"context": text}]} for n, text in enumerate(texts[200:])]
    (data / "drcd_dev.json").write_text(json.dumps({"data": articles}))
    write_jsonl(data / "gsm8k_train.jsonl", [problem(rng) for _ in range(800)])
    program = [sys.executable, str(BENCHMARKS / "precision.py"), "--tiny"]
    subprocess.run([*program, "--prepare", str(tmp_path / "made"), "--data", str(data)], check=True)
    (tmp_path / "made").rename(tmp_path / "moved")
    environment = without_data_stages(tmp_path / "absent")
    subprocess.run([*program, "--train", str(tmp_path / "moved"), "--out", str(tmp_path / "out"), "--seeds", "0"], env=environment, check=True)
    result = json.loads((tmp_path / "out/precision.json").read_text())
    assert list(result["held_out"]) == ["bf16", "nf4", precision.PEFT]
    assert all(bound["holds"] for bound in result["bounds"]) and len(result["bounds"]) == 2
    steps = [sorted(map(int, curve["0"])) for curve in result["held_out"].values()]
    assert steps[0] == steps[1] == steps[2] and steps[0][0] == 0 and len(steps[0]) > 3
    assert (tmp_path / "out/precision.png").stat().st_size > 10_000 and "| nf4 |" in (tmp_path / "out/precision.md").read_text()
