"""Training on two real processes (gloo, DeepSpeed ZeRO-2): it learns, a kill loses nothing, what is wrong is one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from graft.core.artifact import sha256_file
from graft.core.metrics import read_metrics

from ..core.wandb_server import history, records
from ..ports import free_port
from .small import curve, environment, small_plan, start, train


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    return root, train(small_plan(root))


def test_it_learns_and_says_what_it_did(undisturbed):
    _, artifact = undisturbed
    steps = curve(artifact.path)
    assert [s[0] for s in steps] == list(range(7))
    assert steps[-1][1] < steps[0][1]
    assert artifact.counts["processes"] == 2 and artifact.counts["steps"] == 7 and artifact.counts["validation_loss"] > 0
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "metrics.jsonl"} <= set(artifact.manifest["files"])


def test_a_steps_time_is_without_its_validation_and_devices_are_counted_for_both(undisturbed):
    _, artifact = undisturbed
    lines = list(read_metrics(artifact.path / "metrics.jsonl"))
    assert [m["step"] for m in lines if "validation_s" in m] == [3, 6]
    spent_s = sum(m["step_time_s"] + m.get("validation_s", 0.0) for m in lines)
    assert artifact.counts["device_hours"] * 3600 == pytest.approx(2 * spent_s, rel=5e-3)
    assert artifact.counts["steps_s"] == pytest.approx(spent_s)


def test_a_run_that_was_killed_before_it_published_tells_what_it_did(undisturbed, tmp_path):
    root, whole = undisturbed
    shutil.copytree(root, tmp_path / "copy", symlinks=True)
    plan = small_plan(tmp_path / "copy")
    shutil.rmtree(plan.resolve("sft").directory)
    again = train(plan)
    figures = ("steps", "loss", "validation_loss", "step_time_s", "tokens_per_s", "steps_s", "device_hours")
    assert {key: again.counts.get(key) for key in figures} == {key: whole.counts[key] for key in figures}


def test_checkpoints_hold_no_frozen_base(undisturbed):
    root, artifact = undisturbed
    run = root / artifact.counts["checkpoints"]
    kept = sorted(p.name for p in run.glob("step-*"))
    assert kept == ["step-00000006", "step-00000007"], "the last two are kept"
    weights = sum(t.numel() for t in load_file(artifact.path / "adapter_model.safetensors").values())
    held = sum(p.stat().st_size for p in (run / kept[-1]).rglob("*") if p.is_file())
    assert held < 4 * weights * 4 + 200_000 < sum(p.stat().st_size for p in (root / "base").glob("*.safetensors")) + 4 * weights * 4 + 200_000


def test_wandb_is_told_the_figures_over_a_resume_and_no_command_line(undisturbed, tmp_path):
    plan = small_plan(tmp_path, "tracking.wandb=offline")
    artifact = train(plan)
    assert curve(artifact.path) == curve(undisturbed[1].path)
    run = tmp_path / artifact.counts["checkpoints"]
    shutil.rmtree(run / "step-00000007")  # as if it had been killed before this: step 6 is taken again
    shutil.rmtree(artifact.path)
    artifact = train(plan)
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    told = history(file)
    assert [(m["_step"], m["loss"]) for m in told] == [(s[0], s[1]) for s in curve(artifact.path)] and "validation_loss" in told[-1]
    kinds = {kind for _, kind in records(file)}
    assert {"run", "history", "artifact", "exit"} <= kinds and b"graft.train" not in file.read_bytes() and b"argv" not in file.read_bytes()


def test_the_best_weights_are_kept_and_patience_ends_the_run(tmp_path):
    plan = small_plan(tmp_path, "sft.validate_every=1", "sft.keep=best", "sft.patience=2", "sft.lr=3.0", "sft.schedule=constant")
    artifact = train(plan)
    losses = [m["validation_loss"] for m in read_metrics(artifact.path / "metrics.jsonl")]
    lowest = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == artifact.counts["steps"] == lowest + 3 < 7, "such a rate makes it worse, and it stops after two"
    assert artifact.counts["kept_step"] == lowest + 1 and artifact.counts["kept_validation_loss"] == losses[lowest]
    kept = plan.root / artifact.counts["checkpoints"] / "best/adapter_model.safetensors"
    assert sha256_file(artifact.path / "adapter_model.safetensors") == sha256_file(kept)


def test_a_kill_and_a_resume_end_in_the_same_adapter(undisturbed, tmp_path):
    plan = small_plan(tmp_path, "sft.lora.dropout=0.1")
    whole = train(plan)
    wanted, steps = sha256_file(whole.path / "adapter_model.safetensors"), curve(whole.path)
    run = plan.root / whole.counts["checkpoints"]
    for extra in ("step-00000006", "step-00000007"):  # as if the run had been killed before these
        shutil.rmtree(run / extra)
    shutil.rmtree(whole.path)
    process = start(plan, 2)
    deadline = time.monotonic() + 120
    while not (run / "step-00000002").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _no_ranks_left(plan)
    again = train(plan)
    assert sha256_file(again.path / "adapter_model.safetensors") == wanted
    assert curve(again.path) == steps


def test_auto_goes_on_with_the_choice_of_the_run_it_resumes(undisturbed, tmp_path):
    root, whole = undisturbed
    shutil.copytree(root, tmp_path / "copy", symlinks=True)
    plan = small_plan(tmp_path / "copy", "sft.micro_batch=auto", "sft.activation_checkpointing=auto")
    shutil.rmtree(plan.resolve("sft").directory)
    shutil.rmtree(plan.root / whole.counts["checkpoints"] / "step-00000007")
    again = train(plan)
    assert again.counts["micro_batch"] == whole.counts["micro_batch"] == 2, "a fresh one would take 1 here"
    assert sha256_file(again.path / "adapter_model.safetensors") == sha256_file(whole.path / "adapter_model.safetensors")
    assert [m["micro_batch"] for m in read_metrics(again.path / "metrics.jsonl")] == [2] * 7


def _no_ranks_left(plan, within_s=30):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        left = subprocess.run(["pgrep", "-f", f"graft.train {plan.path}"], capture_output=True, text=True).stdout.split()
        if not left:
            return
        time.sleep(0.2)
    raise AssertionError(f"ranks outlived the launcher: {left}")


def test_a_wrong_shard_stops_it_in_one_line(tmp_path):
    plan = small_plan(tmp_path)
    shard = next(plan.resolve("shard-sft").directory.glob("train/*.arrow"))
    data = bytearray(shard.read_bytes())
    data[-300] ^= 1
    shard.write_bytes(data)
    process = start(plan, 2)
    said, _ = process.communicate(timeout=120)
    lines = [line for line in said.splitlines() if line.startswith("graft: ")]
    assert process.returncode == 2 and len(set(lines)) == 1 and shard.name in lines[0], said[-2000:]
    assert "Traceback" not in said


def test_two_launchers_with_one_rendezvous_are_one_run(undisturbed, tmp_path):
    """What slurm/train.sbatch starts: a launcher a node, here two of one process each on this machine."""
    plan = small_plan(tmp_path)
    port = str(free_port())
    command = [sys.executable, "-m", "graft.train.launch", str(plan.path), "--stage", "sft", "--workspace", str(plan.root)]
    nodes = []
    for rank in ("0", "1"):
        where = {"NUM_NODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        nodes.append(subprocess.Popen(command, env=environment(1) | where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    artifact = plan.resolve("sft").artifact
    assert artifact.counts["processes"] == 2 and curve(artifact.path) == curve(undisturbed[1].path)


def test_whole_weights_train_on_two_ranks_and_the_model_is_evaluated_alone(tmp_path):
    from graft.evaluate import stage

    plan = small_plan(tmp_path, "sft.lora=false", "sft.lr=1e-3", "sft.max_steps=3", "evaluate.max_new_tokens=4")
    artifact = train(plan)
    steps = curve(artifact.path)
    assert len(steps) == 3 and steps[-1][1] < steps[0][1]
    trained, base = (load_file(folder / "model.safetensors") for folder in (artifact.path, plan.root / "base"))
    assert all((trained[k] != base[k]).any() for k in base)
    stage.run(plan.resolve("evaluate"))
    metrics = json.loads((plan.artifact("evaluate").path / "metrics.json").read_text())
    assert metrics["rows"] == 3 and set(metrics["scores"]) == {"model", "always-call", "always-text"}
