"""`graft check`: what each training stage needs, on GPUs that are named or on those that are here."""

import json
import re
import subprocess
import sys

import pytest

from graft.core.stages import Plan
from graft.model.shapes import SHAPES
from graft.train.sizing.check import listed, report
from graft.train.sizing.needs import CONTEXT_GIB

from ..small import CONFIGS


@pytest.mark.parametrize("like", ["llama-3.1-8b", "qwen2.5-vl-7b"])
def test_the_command_says_it_without_torch(tmp_path, like):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(SHAPES[like]))
    (tmp_path / "chats.jsonl").write_text("{}")
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'name = "r"\ndeepspeed = "zero2.json"\n[corpora.c]\npath = "chats.jsonl"\n[shard]\nseq_len = 4096\n[model]\nbase = "base"\n'
        '[sft]\ncorpora = ["c"]\nglobal_batch = 8\nmicro_batch = 4\n'
    )
    (tmp_path / "zero2.json").write_text("{}")

    def check(*words):
        blocked = "import sys; sys.modules['torch'] = sys.modules['ray'] = None; from graft.cli import main; sys.exit(main(sys.argv[1:]))"
        return subprocess.run([sys.executable, "-c", blocked, "check", str(recipe), *words], capture_output=True, text=True)

    fits = check("--gpus", "2xH200", "--price", "2.5")
    assert fits.returncode == 0 and "of 140 GiB a GPU" in fits.stdout and "error: 3% of memory" in fits.stdout, fits.stderr
    assert "sft: micro_batch 4, activation_checkpointing none (auto): " in fits.stdout and "2.5" not in fits.stdout
    assert re.search(r"activation_checkpointing (selective|full) \(auto\)", check("--gpus", "1xL40S").stdout)
    tight = check("--gpus", "1xL40S", "--set", "sft.activation_checkpointing=none")
    assert tight.returncode == 2 and "does not fit: set micro_batch = 2" in tight.stdout
    own = check()
    assert own.returncode == 0 and own.stdout.count("\n") >= 2, "what auto is on this machine"
    config = dict(SHAPES[like])
    text = config.get("text_config", config)
    for more, code, said in (
        ({"sliding_window": 1024}, 0, "sliding_window = 1024: longer documents are refused, set shard.seq_len to 1024 at most"),
        ({"logits_scaling": 8.0}, 2, "has logits_scaling = 8.0, which graft does not compute"),
    ):
        changed = config | ({"text_config": text | more} if text is not config else more)
        (tmp_path / "base/config.json").write_text(json.dumps(changed))
        found = check()
        assert found.returncode == code and said in found.stdout + found.stderr and "Traceback" not in found.stderr, found.stderr
    (tmp_path / "base/config.json").write_text("{")
    assert check().returncode == 2 and "has a config.json that cannot be read" in check().stderr and "Traceback" not in check().stderr
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    for gpus in ("8xB300", "²xH100"):
        wrong = check("--gpus", gpus)
        assert wrong.returncode == 2 and "is not like 8xH100" in wrong.stderr and "Traceback" not in wrong.stderr


def test_an_embedded_base_is_asked_about_by_its_recipe(tmp_path):
    plan = Plan(CONFIGS / "recipes/image-intent-tiny.toml", (), tmp_path)
    lines, fits = report(plan, "1xL40S", None)
    assert fits and [line.split(":")[0] for line in lines[:-1]] == ["base", "cpt", "sft"]


def test_the_listing_of_a_machine():
    found = listed("NVIDIA H200, 143771, 143156, 9.0\nNVIDIA A100-SXM4-80GB, 81920, 40960, 8.0\nNVIDIA GB10, [N/A], [N/A], 12.1\n")
    assert [(gpu.name, gpu.fp8) for gpu in found] == [("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False)]
    assert found[0].peak_flops == 989e12 and found[1].room_gib == pytest.approx(40 - CONTEXT_GIB)
    assert listed("NVIDIA GeForce RTX 3090, 24576, 24000, 8.6")[0].peak_flops is None
