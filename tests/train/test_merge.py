"""A merged model is base + adapter: in every precision, within its tolerance, against PEFT and the trainers' own layers; whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.cli import main
from graft.core.artifact import Artifact
from graft.core.errors import ArtifactError, ConfigError, TrainError
from graft.core.recipe import EmbeddedBase, Lora, Train
from graft.core.stages import lineage
from graft.model.base import load_base, random_llama
from graft.model.chat import load_tokenizer
from graft.model.lora import CONFIG, WEIGHTS, read_adapter
from graft.model.stream import load_fused
from graft.train.merge import TOLERANCES, merge_folder, run
from graft.train.merge_compare import difference, logits_of, tokens_of
from graft.train.merge_weights import Adapter, MergeBase

from ..engine.tiny_model import MAX_LENGTH, build, random_adapter
from .small import small_plan

CPU = torch.device("cpu")
LORA = Lora(r=8, alpha=8)  # as tiny_model has it for "two"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(a tied base in fp32, an adapter of its seven linear layers)."""
    base, adapters = build(tmp_path_factory.mktemp("tiny"))
    return base, adapters["two"]


@pytest.fixture(scope="module")
def merged(tiny, tmp_path_factory):
    """merged(precision) -> (folder, counts), made once."""
    root, made = tmp_path_factory.mktemp("merged"), {}

    def make(precision):
        if precision not in made:
            made[precision] = root / precision, merge_folder(tiny[1], str(tiny[0]), None, precision, root / precision)
        return made[precision]

    return make


def with_adapter(lm, pairs):
    """Any model of the trainers, the adapter put into it."""
    layers = dict(lm.named_modules())
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            own = layers[name].pair()
            own[0].copy_(a)
            own[1].copy_(b)
    return lm.eval()


def trained(base, adapter, precision):
    """Base + adapter as it trains: fp8 by the fused layers, whose inputs are FP8 too, the others by plain ones."""
    from graft.model.base import DTYPES
    from graft.model.lora import inject

    if precision == "fp8":
        lm = load_fused(str(base), None, precision, LORA, CPU, 0)
    else:
        lm = load_base(str(base), None, precision, "cpu")
        inject(lm, LORA, DTYPES[precision], 0)
    return with_adapter(lm, read_adapter(adapter)[1])


@torch.no_grad()
def logits(lm, texts):
    return [lm(text[None]).logits[0].float() for text in texts]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4", "fp8"])
def test_logits_are_those_of_base_and_adapter_within_the_tolerance(tiny, merged, precision):
    """The models run as others run them, in bf16 but for fp32: nothing of the merge's own forward pass is used."""
    base, adapter = tiny
    folder, counts = merged(precision)
    texts = tokens_of(load_tokenizer(str(base)), MergeBase(str(base), None, precision, CPU))
    whole = load_base(str(folder), None, "fp32" if precision == "fp32" else "bf16", "cpu")
    off = difference(logits(trained(base, adapter, precision), texts), logits(whole, texts))
    most = TOLERANCES[precision]
    slack = 2 if precision == "fp8" else 1  # inputs in FP8 are in no tolerance of weights
    assert off.logit_difference_max <= slack * most.logits * off.logit_std and off.kl_nats <= most.kl_nats
    plain = difference(logits(load_base(str(base), None, precision, "cpu"), texts), logits(whole, texts))
    assert plain.kl_nats > 20 * off.kl_nats and plain.logit_difference_max > 2 * off.logit_difference_max, "the adapter does something"
    assert counts["kl_nats"] <= off.kl_nats + 1e-6 and counts["logit_difference_max"] <= most.logits * counts["logit_std"]
    assert counts["layers"] == 14 and counts["tokens"] == sum(map(len, texts)) and counts["shards"] == 1


def test_what_is_measured_is_the_difference_of_the_weights(merged):
    exact, rounded = merged("fp32")[1], {p: merged(p)[1] for p in ("bf16", "nf4", "fp8")}
    assert exact["kl_nats"] < 1e-10 and exact["logit_difference_max"] < 1e-5
    assert all(1e-7 < c["kl_nats"] < 1e-4 for c in rounded.values())
    assert {p for p, c in rounded.items() if "unquantised" in c} == {"nf4", "fp8"} and "fp8_inputs" in rounded["fp8"]
    for c in (rounded["nf4"], rounded["fp8"]):
        assert c["unquantised"]["kl_nats"] > 20 * c["kl_nats"], "merged into what was trained on, not into what is stored"


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_tolerance_tells_an_adapter_from_half_of_it(tiny, precision):
    base, adapter = MergeBase(str(tiny[0]), None, precision, CPU), Adapter(tiny[1])
    texts = tokens_of(load_tokenizer(str(tiny[0])), base)
    whole = logits_of(base, base.trained, adapter, texts)
    adapter.scale /= 2
    off, most = difference(whole, logits_of(base, base.trained, adapter, texts)), TOLERANCES[precision]
    assert off.kl_nats > most.kl_nats and off.logit_difference_max > most.logits * off.logit_std


def test_weights_are_those_of_pefts_merge(tiny, merged):
    from peft import PeftModel

    base, adapter = tiny
    theirs = PeftModel.from_pretrained(load_base(str(base), None, "fp32", "cpu"), adapter).merge_and_unload()
    ours, wanted = load_file(merged("fp32")[0] / "model.safetensors"), theirs.state_dict()
    assert set(ours) == set(wanted) - {"lm_head.weight"}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


def test_a_half_adapted_base_keeps_the_rest_and_is_rounded_once(tmp_path, tiny):
    """Untied, in several files; fp32 adapters on two layers alone."""
    model = random_llama(
        EmbeddedBase(hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2, train=Train(lora=None)), 330, MAX_LENGTH, 1
    )
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn(330, 64) * 0.1)
    model.bfloat16().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    load_tokenizer(str(tiny[0])).save_pretrained(tmp_path / "base")
    adapter = random_adapter(tmp_path / "base", Lora(r=4, alpha=6, targets=("up_proj",)), tmp_path / "adapter", 0)
    counts = merge_folder(adapter, str(tmp_path / "base"), None, None, tmp_path / "out")
    stored, pairs = load_base(str(tmp_path / "base"), None, "bf16", "cpu").state_dict(), read_adapter(adapter)[1]
    ours = load_file(tmp_path / "out/model.safetensors")
    assert set(ours) == set(stored) and counts["layers"] == 2
    for name, tensor in ours.items():
        pair, weight = pairs.get(name.removesuffix(".weight")), stored[name]
        assert torch.equal(tensor, weight if pair is None else (weight.float() + 1.5 * (pair[1] @ pair[0])).bfloat16()), name


def test_an_artifact_that_others_load_is_published(merged, tiny):
    folder, counts = merged("nf4")
    artifact = Artifact.open(folder)
    artifact.verify()
    assert artifact.counts == json.loads(json.dumps(counts)) and artifact.manifest["inputs"]["base"] == str(tiny[0])
    assert [a.manifest["kind"] for _, a in lineage(folder)] == ["merge"]
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    assert load_tokenizer(str(folder)).chat_template == load_tokenizer(str(tiny[0])).chat_template
    assert sorted(p.name for p in folder.parent.glob(".*")) == []


# ---- the stage ----------------------------------------------------------------------------------------------------------
def cpt_plan(root, precision):
    """A recipe whose cpt adapter is there, made by hand."""
    root.mkdir()
    sets = (
        'corpora.made.kind="grammar"',
        "corpora.made.documents=9",
        'cpt.corpora=["made"]',
        "cpt.lora={ r = 4, alpha = 8 }",
        f"model.precision={precision}",
    )
    plan = small_plan(root, *sets)
    with plan.resolve("shard-cpt").writing() as draft:
        (draft.path / "index.json").write_text("{}")
    with plan.resolve("cpt").writing() as draft:
        made = random_adapter(root / "base", Lora(r=4, alpha=8), root / "adapter", 0)
        for file in (WEIGHTS, CONFIG):
            shutil.copyfile(made / file, draft.path / file)
    return plan


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_the_stage_publishes_the_base_of_sft(tmp_path, precision):
    plan = cpt_plan(tmp_path / "work", precision)
    run(plan.resolve("merge"))
    artifact = plan.artifact("merge")
    artifact.verify()
    assert {"layers", "shards", "tokens", "kl_nats", "logit_difference_max", "logit_std"} <= set(artifact.counts)
    assert plan.base_model("sft") == (str(artifact.path), None)
    lm, tokenizer = load_base(*plan.base_model("sft"), precision, "cpu"), load_tokenizer(*plan.base_model("sft"))
    assert lm.config.vocab_size == 264 and "<|im_start|>" in tokenizer.chat_template, "the recipe's template goes along"
    given = merge_folder(plan.artifact("cpt").path, str(tmp_path / "work/base"), None, None, tmp_path / "out")
    assert given == artifact.counts, "the command finds the precision in the adapter's manifest"
    assert (tmp_path / "out/model.safetensors").read_bytes() == (artifact.path / "model.safetensors").read_bytes()


def test_a_merge_that_differs_is_refused_and_leaves_nothing(tmp_path):
    """As one of numbers that are none."""
    plan = cpt_plan(tmp_path / "work", "fp32")
    file = plan.artifact("cpt").path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    job = plan.resolve("merge")
    with pytest.raises(TrainError, match=r"differs from base \+ adapter by nan in logits .* nothing was written"):
        run(job)
    assert not job.directory.exists() and list(job.directory.parent.iterdir()) == []


# ---- the command --------------------------------------------------------------------------------------------------------
def test_the_command_says_what_it_did(tiny, tmp_path, capsys):
    base, adapter = tiny
    assert main(["merge", str(adapter), "--base", str(base), "--precision", "nf4", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'out'}: 14 layers merged, 1 shards; over 320 tokens") and said.count("\n") == 1
    assert load_base(str(tmp_path / "out"), None, "bf16", "cpu").num_parameters() > 0


def test_what_it_refuses_is_one_line_and_leaves_nothing(tiny, tmp_path, capsys):
    base, adapter = tiny

    def refused(adapter=adapter, base=base, out=tmp_path / "out", *more):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()  # what building the bases said
        assert main(["merge", str(adapter), "--base", str(base), "--out", str(out), *more]) == 2
        err = capsys.readouterr().err
        assert err.startswith("graft: ") and "\n" not in err.strip() and "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    (tmp_path / "there").mkdir()
    assert "there exists already" in refused(out=tmp_path / "there")
    assert "holds no readable adapter" in refused(adapter=base)
    assert "neither a folder nor a hub id" in refused(base="./none")
    wider, _ = build(tmp_path / "wider", hidden_size=96)
    assert "is the adapter of another base: its model.layers.0.mlp.down_proj is [64, 128]" in refused(base=wider)
    shallow, _ = build(tmp_path / "shallow", layers=1)
    assert "it adapts model.layers.1.mlp.down_proj, which is no linear layer" in refused(base=shallow)
    shutil.copytree(base, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    assert "its weights are pickled" in refused(base=tmp_path / "pickled")
    shutil.copytree(adapter, tmp_path / "trained")
    (tmp_path / "trained/parity.json").write_text(json.dumps({"precision": "nf4"}))
    assert "was trained on a base in nf4: merge it with --precision nf4" in refused(
        tmp_path / "trained", base, tmp_path / "out", "--precision", "bf16"
    )
    (tmp_path / "trained/parity.json").write_text("[]")
    assert "parity.json or manifest.json cannot be read" in refused(tmp_path / "trained")


def test_a_base_on_the_hub_is_merged_at_its_commit(hub, client, tiny, tmp_path):
    base, adapter = tiny
    commit = hub.push("models/owner/tiny", {p.name: p.read_bytes() for p in base.iterdir()})
    merge = f"""
from pathlib import Path
from graft.train.merge import merge_folder
merge_folder(Path({str(adapter)!r}), "owner/tiny", None, "fp32", Path({str(tmp_path / "out")!r}))
answer = 1
"""
    assert client.asks(merge) == 1
    assert Artifact.open(tmp_path / "out").manifest["inputs"]["base"] == f"owner/tiny@{commit}"


# ---- memory and interruption ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(folder, bytes): in it large/, a base in bf16 of 20 layers and several files, its adapter/, and what build() makes."""
    root = tmp_path_factory.mktemp("large")
    build(root)
    shape = EmbeddedBase(hidden_size=768, intermediate_size=2304, layers=20, heads=6, kv_heads=6, train=Train(lora=None))
    with torch.no_grad():
        model = random_llama(shape, len(load_tokenizer(str(root / "base"))), MAX_LENGTH, 0).bfloat16()
    model.save_pretrained(root / "large", max_shard_size="100MB")
    load_tokenizer(str(root / "base")).save_pretrained(root / "large")
    random_adapter(root / "large", Lora(r=4, alpha=8, targets=("q_proj", "down_proj")), root / "adapter", 0)
    return root, sum(p.stat().st_size for p in (root / "large").glob("*.safetensors"))


PEAK = """
import resource, sys
from pathlib import Path
from graft.train.merge import merge_folder
root, out = map(Path, sys.argv[1:])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
merge_folder(root / "two", str(root / "base"), None, "bf16", out / "small")
before = peak()
merge_folder(root / "adapter", str(root / "large"), None, "bf16", out / "large")
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_base(large, tmp_path):
    root, size = large
    said = subprocess.run([sys.executable, "-c", PEAK, str(root), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr[-2000:]
    assert size > 280e6 and int(said.stdout.split()[-1]) < 0.3 * size


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_merge_that_is_cut_off_is_not_there_and_can_be_made_again(large, tmp_path, sent):
    root, out = large[0], tmp_path / "out"
    argv = [
        sys.executable,
        "-m",
        "graft.cli",
        "merge",
        str(root / "adapter"),
        "--base",
        str(root / "large"),
        "--precision",
        "fp32",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    until = time.monotonic() + 120
    while not list(tmp_path.glob(".out.draft-*/*.safetensors")):
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()[-2000:]
        time.sleep(0.01)
    if sent == signal.SIGKILL:
        with pytest.raises(ConfigError, match="another `graft merge` writes"):
            merge_folder(root / "adapter", str(root / "large"), None, "fp32", out)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -sent) and not out.exists(), said[-2000:]
    if sent == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
    merge_folder(root / "two", str(root / "base"), None, "fp32", out)
    Artifact.open(out).verify()
    assert list(tmp_path.iterdir()) == [out]


def test_an_unreadable_adapter_names_its_folder(tmp_path):
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        merge_folder(tmp_path, str(tmp_path), None, None, tmp_path / "out")
