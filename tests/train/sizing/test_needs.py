"""What a step needs, against what was measured (benchmarks/RESULTS.md) and against what real tensors hold."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graft.core.errors import ConfigError
from graft.core.recipe import EmbeddedBase, Lora, Train
from graft.model.base import random_llama
from graft.model.shapes import SHAPES
from graft.model.stream import load_fused
from graft.train.launch import command
from graft.train.sizing.needs import ERROR, GIB, MEMORY_GIB, Gpu, Setting, Shape, Work, need
from graft.train.strategy import Zero

from ..small import CONFIGS, small_plan

LLAMA_8B, TAIGI_13B, TINY = (Shape.of(SHAPES[name]) for name in ("llama-3.1-8b", "taigi-llama-2-13b", "tinyllama"))
BENCH = Train(global_batch=4)  # of 4,096 tokens
H200 = Gpu.named("H200")
BUCKET = Zero(50_000_000)


def work(shape=LLAMA_8B, precision="bf16", train=BENCH, **others):
    return Work(shape, precision, train, 4096, zero=BUCKET, **others)


@pytest.mark.parametrize(
    ("shape", "precision", "setting", "peak_gib", "step_time_s", "mean_length"),
    [
        (LLAMA_8B, "bf16", Setting(4, "none"), 63.70, 0.922, 4096),  # two machines
        (LLAMA_8B, "bf16", Setting(4, "none"), 63.70, 0.940, 4096),
        (LLAMA_8B, "fp8", Setting(4, "none"), 57.41, 0.659, 4096),
        (LLAMA_8B, "fp8", Setting(4, "none"), 56.97, 0.676, 4096),
        (LLAMA_8B, "bf16", Setting(4, "none"), 63.70, 0.840, 888),
        (LLAMA_8B, "bf16", Setting(4, "none"), 63.70, 0.857, 888),
        (LLAMA_8B, "fp8", Setting(4, "none"), 57.41, 0.580, 888),
        (LLAMA_8B, "fp8", Setting(4, "none"), 56.97, 0.592, 888),
        (LLAMA_8B, "nf4", Setting(4, "none"), 53.99, 0.944, 4096),
        (LLAMA_8B, "nf4", Setting(4, "none"), 53.69, 0.873, 888),
        (LLAMA_8B, "bf16", Setting(2, "full"), 20.90, 1.150, 888),
        (LLAMA_8B, "fp8", Setting(4, "full"), 19.67, 0.736, 888),
        (TAIGI_13B, "fp8", Setting(4, "none"), 87.13, 1.013, 888),
    ],
)
def test_it_tells_what_was_measured_within_a_third_of_its_stated_error(shape, precision, setting, peak_gib, step_time_s, mean_length):
    found = need(work(shape, precision, mean_length=mean_length), setting, H200)
    assert found.peak_gib == pytest.approx(peak_gib, rel=ERROR["peak_gib"] / 3)
    assert found.step_time_s == pytest.approx(step_time_s, rel=ERROR["step_time_s"])
    assert found.tokens_per_s == pytest.approx(16384 / found.step_time_s)


def test_what_saves_memory_costs_time():
    none, selective, full = (need(work(), Setting(4, kept), H200) for kept in ("none", "selective", "full"))
    assert none.peak_gib > selective.peak_gib > full.peak_gib and none.step_time_s < selective.step_time_s < full.step_time_s
    wide = [need(work(train=Train(global_batch=4, lora=Lora(r=65))), Setting(4, kept), H200).step_time_s for kept in ("none", "full")]
    assert full.step_time_s / none.step_time_s < wide[1] / wide[0] < 1.5, "a layer that is no operator is made again whole"
    small, whole = (need(work(), Setting(m, "none"), H200) for m in (1, 4))
    assert small.peak_gib < whole.peak_gib and whole.step_time_s < small.step_time_s < 1.1 * whole.step_time_s
    twice = need(work(train=Train(global_batch=8)), Setting(8, "none"), H200)
    assert twice.step_time_s == pytest.approx(2 * whole.step_time_s), "more than 16k tokens a forward gain nothing"


def test_zero_shares_masters_moments_and_gradients():
    def of(gpus):
        return need(work(train=Train(lora=None, global_batch=64), gpus=gpus), Setting(1, "full"), H200)

    weights = LLAMA_8B.layer_weights + LLAMA_8B.ends + LLAMA_8B.norms
    alone, eight = of(1), of(8)
    assert alone.moment == "step" and alone.peak_gib * GIB == pytest.approx(22 * weights), "2 held, 12 fp32, 8 of gradients"
    assert eight.weights_gib == alone.weights_gib and eight.moment != "step"
    assert eight.optimizer_gib * GIB == pytest.approx((12 / 8 + 2) * weights, rel=0.01), "gradients of several forwards wait whole"
    assert of(64).peak_gib < eight.peak_gib and of(8).step_time_s == pytest.approx(alone.step_time_s / 8)


def test_buckets_are_allocated_whole_however_little_is_trained():
    def of(strategy):
        return need(Work(TINY, "bf16", BENCH, 4096, zero=Zero.of({"zero_optimization": strategy})), Setting(1, "full"), H200)

    shipped = json.loads((CONFIGS / "deepspeed/zero2.json").read_text())["zero_optimization"]
    small, one, two = of(shipped), of({}), of({"overlap_comm": True})
    assert Zero.of({"zero_optimization": shipped}) == BUCKET
    assert small.moment == "loss" and one.moment == two.moment == "backward"
    assert two.peak_gib - one.peak_gib == pytest.approx(500_000_000 * 2 / GIB)
    assert of({"contiguous_gradients": False}).peak_gib == small.peak_gib


def test_what_is_not_fused_keeps_more_and_has_no_selective():
    kept = [need(work(train=Train(lora=lora, global_batch=4)), Setting(4, "none"), H200) for lora in (Lora(), Lora(dropout=0.1), Lora(r=65))]
    assert kept[0].activations_gib == kept[1].activations_gib < kept[2].activations_gib / 1.2, "of masks nothing is kept"
    for lora in (Lora(r=65), None):
        with pytest.raises(ValueError, match="use 'full'"):
            Train(lora=lora, activation_checkpointing="selective")
    assert Train(lora=Lora(dropout=0.1), activation_checkpointing="selective")


def test_a_config_without_a_size_is_one_line():
    with pytest.raises(ConfigError, match="has no 'hidden_size'"):
        Shape.of({"vocab_size": 5})
    with pytest.raises(ConfigError, match="'num_local_experts'"):
        Shape.of(SHAPES["llama-3.1-8b"] | {"num_local_experts": 8})
    assert set(MEMORY_GIB) >= {"H100", "H200", "A100"}


def test_a_model_that_also_sees_is_counted_by_its_text():
    from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2}
    seen = {"depth": 4, "hidden_size": 1280, "out_hidden_size": 512}
    config = Qwen2_5_VLConfig(text_config=text | {"tie_word_embeddings": True, "vocab_size": 1000}, vision_config=seen, tie_word_embeddings=True)
    shape = Shape.of(json.loads(config.to_json_string()))
    assert shape.hidden == config.text_config.hidden_size and shape.layers == config.text_config.num_hidden_layers
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    tower = sum(p.numel() for p in model.model.visual.parameters())
    assert shape.beside == pytest.approx(tower, rel=0.02)
    counted = shape.layer_weights + shape.ends + shape.norms + shape.beside
    assert counted == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nf4"])
def test_images_cost_a_towers_weights_in_bf16_its_forward_and_their_pixels(precision):
    shape = Shape.of(SHAPES["qwen2.5-vl-7b"])
    seeing, blind = (Work(s, precision, Train(global_batch=16), 2048) for s in (shape, shape._replace(beside=0)))
    assert seeing.frozen_bytes - blind.frozen_bytes == 2 * shape.beside and 1.2e9 < 2 * shape.beside < 1.4e9
    needs = [need(replace(seeing, image_pixels=pixels), Setting(1, "none"), H200) for pixels in (0, 1_003_520)]
    assert (needs[1].peak_gib - needs[0].peak_gib) * GIB == pytest.approx(16 * 5120 * 1176 * 2)
    tower_s = 16 * 2 * shape.beside * 5120 / 989e12
    assert tower_s < needs[1].step_time_s - needs[0].step_time_s < 2 * tower_s
    half = need(replace(seeing, row_tokens=1024), Setting(1, "none"), H200)
    assert half.peak_gib == needs[0].peak_gib and 0.5 < half.step_time_s / needs[0].step_time_s < 0.65, "padding is not computed"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "nf4"])
def test_a_frozen_base_holds_what_is_counted(tmp_path, precision):
    base = EmbeddedBase(vocab_size=500, hidden_size=256, intermediate_size=768, layers=2, heads=4, kv_heads=2, train=Train(corpora=("a",), lora=None))
    random_llama(base, 500, 64, 0).save_pretrained(tmp_path)
    lora = Lora(r=4)
    lm = load_fused(str(tmp_path), None, precision, lora, torch.device("cpu"), 0)
    counted = Work(Shape.embedded(base), precision, Train(lora=lora), 64)
    adapters = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert adapters == counted.trained
    frozen = _bytes([p for p in lm.parameters() if not p.requires_grad]) + _bytes(lm.buffers())
    assert frozen == pytest.approx(counted.frozen_bytes, rel=0.03)


def _bytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("lora", ["{r=4}", "false"])
def test_each_of_two_ranks_holds_what_is_counted(tmp_path, monkeypatch, lora):
    """A real run of two processes, its engine's tensors counted where it saves its first checkpoint."""
    plan = small_plan(tmp_path, "model.precision=bf16", f"sft.lora={lora}", "sft.max_steps=2", "sft.micro_batch=auto")
    monkeypatch.setenv("GRAFT_PROCESSES", "2")
    argv, environment = command([str(plan.path), str(tmp_path), *plan.overrides])
    module = argv.index("graft.train") - 1
    script = [str(Path(__file__).with_name("held.py"))]
    done = subprocess.run([*argv[:module], *script, *argv[module + 2 :]], env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shape = Shape.of(json.loads((tmp_path / "base/config.json").read_text()))
    counted = Work(shape, "bf16", plan.recipe.sft, 32, 2)
    for rank in range(2):
        held = json.loads((tmp_path / f"held-{rank}.json").read_text())
        assert held["weights"] == pytest.approx(counted.frozen_bytes + counted.trained * 2, rel=0.03)
        assert held["optimizer"] == pytest.approx(counted.trained / 2 * 12, rel=0.03)
    counts = plan.artifact("sft").counts
    assert (counts["micro_batch"], counts["activation_checkpointing"]) == (1, "none"), "what auto is on the CPU"
