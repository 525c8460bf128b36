"""What a stage needs, against what was measured (benchmarks/RESULTS.md)."""

import json
import subprocess
import sys

import pytest

from graft.core.errors import ConfigError
from graft.core.recipe import Train
from graft.model.shapes import SHAPES, empty_model
from graft.train.preflight import ERROR, MEMORY_GIB, Shape, fitting, need

LLAMA_8B, TINY = Shape.of(SHAPES["llama-3.1-8b"]), Shape.of(SHAPES["tinyllama"])
BENCH = Train(global_batch=4, micro_batch=4)  # of 4,096 tokens


@pytest.mark.parametrize(
    ("shape", "precision", "peak_gib", "step_time_s", "mean_length"),
    [
        (LLAMA_8B, "bf16", 87.19, 1.016, 4096),
        (LLAMA_8B, "fp8", 80.70, 0.724, 4096),
        (LLAMA_8B, "bf16", 87.19, 0.936, 888),
        (LLAMA_8B, "fp8", 80.70, 0.640, 888),
        (TINY, "fp8", 22.62, None, 888),
        (TINY, "nf4", 22.00, None, 888),
    ],
)
def test_it_tells_what_was_measured_within_its_stated_error(shape, precision, peak_gib, step_time_s, mean_length):
    found = need(shape, precision, BENCH, 4096, 1, "H200", mean_length)
    print(f"{precision}: {found.peak_gib:.2f} GiB for {peak_gib}, {found.step_time_s:.3f} s for {step_time_s}")
    assert found.peak_gib == pytest.approx(peak_gib, rel=ERROR["peak_gib"])
    if step_time_s:
        assert found.step_time_s == pytest.approx(step_time_s, rel=ERROR["step_time_s"])
        assert found.tokens_per_s == pytest.approx(16384 / found.step_time_s)


def test_what_saves_memory_costs_time_and_more_gpus_share_the_optimizer():
    def of(**update):
        return need(LLAMA_8B, "bf16", BENCH.model_copy(update=update), 4096, update.pop("gpus", 1), "H200")

    none, selective, full = (of(activation_checkpointing=kept) for kept in ("none", "selective", "full"))
    assert none.peak_gib > selective.peak_gib > full.peak_gib and none.step_time_s < selective.step_time_s < full.step_time_s
    assert full.step_time_s == pytest.approx(1.5 * none.step_time_s)
    whole = Train(lora=None, global_batch=8)
    alone, eight = (need(LLAMA_8B, "bf16", whole, 4096, gpus, "H200") for gpus in (1, 8))
    assert alone.optimizer_gib > 100 and eight.optimizer_gib < alone.optimizer_gib / 6 and eight.weights_gib == alone.weights_gib
    assert eight.step_time_s == pytest.approx(alone.step_time_s / 8)
    twice = need(LLAMA_8B, "bf16", whole.model_copy(update={"global_batch": 16}), 4096, 8, "H200")
    assert twice.optimizer_gib - eight.optimizer_gib == pytest.approx(8.03e9 * 2 / 2**30, rel=1e-3), "gradients wait for the second micro-batch"


def test_the_smallest_change_that_fits_is_named():
    def of(gpu, precision="bf16", **update):
        return fitting(LLAMA_8B, precision, BENCH.model_copy(update=update), 4096, 1, gpu)

    assert of("H200") == "as it is"
    assert of("H100") == 'activation_checkpointing = "selective"'
    assert of("RTX 4090") == 'activation_checkpointing = "full", micro_batch = 2'
    assert of("RTX 4090", lora=None) is None, "16 bytes a weight"
    larger = Shape.of(SHAPES["taigi-llama-2-13b"])
    assert fitting(larger, "bf16", BENCH, 4096, 1, "RTX 4090") == 'model.precision = "fp8", activation_checkpointing = "full", micro_batch = 2'


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
    tight = check("--gpus", "1xL40S")
    assert tight.returncode == 2 and "does not fit: set " in tight.stdout
    wrong = check("--gpus", "8xB300")
    assert wrong.returncode == 2 and "is not like 8xH100" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_config_without_a_size_is_one_line():
    with pytest.raises(ConfigError, match="has no 'hidden_size'"):
        Shape.of({"vocab_size": 5})
    assert set(MEMORY_GIB) >= {"H100", "H200", "A100"}


def test_of_a_model_that_sees_the_text_part_is_counted():
    shape = Shape.of(SHAPES["qwen2.5-vl-7b"])
    assert (shape.layers, shape.head_dim, shape.qkv, shape.tied) == (28, 128, 4608, False)
    model = empty_model("qwen2.5-vl-7b")
    text = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith("model.visual"))
    assert shape.layer_weights + 2 * shape.vocab * shape.hidden == text
