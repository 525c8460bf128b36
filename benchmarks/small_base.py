"""What the benchmarks share that train a small base of their own (precision.py, cpt.py) in two halves, data here and training where a GPU is.

The first half runs graft's data stages in Ray and hands over a tokenizer and shards; the second trains on them through graft's own launcher, without
Ray or the data room. Here are the base's size, its texts, both halves' command line, and what is said of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")
Curve = dict[int, float]  # held-out loss (nats a target) by steps taken


@dataclass(frozen=True)
class Base:
    """Of the base and its training, with 150 M weights."""

    vocabulary: int = 8192
    hidden: int = 1024
    inter: int = 2816
    layers: int = 12
    heads: int = 16
    kv_heads: int = 8
    seq_len: int = 1024
    base_batch: int = 16  # bins
    base_lr: float = 1e-3
    base_epochs: float = 4.0


TINY_BASE: dict[str, Any] = {
    "vocabulary": 2000, "hidden": 64, "inter": 176, "layers": 2, "heads": 4, "kv_heads": 2, "seq_len": 256, "base_batch": 8, "base_lr": 5e-3,
    "base_epochs": 2,
}  # fmt: skip
RECIPE = """
name = "made"
seed = {seed}
deepspeed = "{root}/configs/deepspeed/zero2.json"
[corpora.made]
path = "made.jsonl"
[model]
base = "{base}"
precision = "{precision}"
[shard]
seq_len = {seq_len}
{training}
"""
WHOLE = """
[cpt]
corpora = ["made"]
lora = false
lr = {scale.base_lr}
epochs = {scale.base_epochs}
global_batch = {scale.base_batch}
micro_batch = {scale.base_batch}
warmup = 0.1
weight_decay = 0.1
validate_every = 50
keep = "best"
save_every = 100000
[sft]
corpora = ["made"]
"""


# ---- data -------------------------------------------------------------------------------------------------------------
def articles(data: Path) -> list[dict[str, str]]:
    """DRCD's paragraphs, each with its article's title."""
    found = json.loads((data / "drcd_dev.json").read_text(encoding="utf-8"))["data"]
    return [{"title": article["title"], "text": paragraph["context"]} for article in found for paragraph in article["paragraphs"]]


def hand_over(plan: Any, folder: Path, stages: list[str]) -> None:
    """Write folder/tokenizer, and folder/<stage> with the train and validation shards of each; nothing in them names a place."""
    for stage in stages:
        for split in ("train", "validation"):
            shutil.copytree(plan.artifact(f"shard-{stage}").path / split, folder / stage / split)
    (folder / "tokenizer").mkdir()
    for path in plan.artifact("init").path.glob("tokenizer*"):
        shutil.copy(path, folder / "tokenizer")


def size(folder: Path) -> str:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return f"{folder}: {len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB"


# ---- training ---------------------------------------------------------------------------------------------------------
def plan_of(home: Path, stage: str, base: Path, shards: Path, seq_len: int, training: str, seed: int = 0, precision: str = "bf16") -> Any:
    """A workspace whose `stage` is ready to train as the sections `training` say: its shards are given."""
    from graft.core.stages import Plan

    home.mkdir(parents=True, exist_ok=True)
    (home / "made.jsonl").write_text("{}\n")
    recipe = RECIPE.format(seed=seed, root=ROOT, base=base, precision=precision, training=training, seq_len=seq_len)
    (home / "recipe.toml").write_text(recipe, encoding="utf-8")
    plan = Plan(home / "recipe.toml", (), home)
    for parent in ("prepare", f"shard-{stage}"):
        job = plan.resolve(parent)
        if job.artifact is None:
            with job.writing() as draft:
                if parent != "prepare":
                    shutil.copytree(shards, draft.path, dirs_exist_ok=True)
    return plan


def launch(plan: Any, stage: str) -> Curve:
    """Train through graft's own launcher, on one GPU or one process."""
    from graft.core.metrics import read_metrics

    command = [sys.executable, "-m", "graft.train.launch", str(plan.path), "--stage", stage, "--workspace", str(plan.root)]
    done = subprocess.run(command, env={**os.environ, "GRAFT_PROCESSES": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{plan.root}: {done.stdout[-1000:]}\n{done.stderr[-4000:]}")
    metrics = read_metrics(plan.artifact(stage).path / "metrics.jsonl")
    return {m["step"] + 1: m["validation_loss"] for m in metrics if "validation_loss" in m}


def make_base(folder: Path, data: Path, scale: Base) -> tuple[Path, dict[str, Any]]:
    """(the base, trained on what was handed over in data/base; what there is to say of it)."""
    from transformers.utils.logging import disable_progress_bar

    from graft.core.recipe import EmbeddedBase, Train
    from graft.model.base import random_llama
    from graft.model.chat import load_tokenizer

    disable_progress_bar()  # of writing one file
    init = folder / "init"
    tokenizer = load_tokenizer(str(data / "tokenizer"), None, "tokenizer")
    shape = {"hidden_size": scale.hidden, "intermediate_size": scale.inter, "layers": scale.layers, "heads": scale.heads, "kv_heads": scale.kv_heads}
    model = random_llama(EmbeddedBase(**shape, train=Train()), len(tokenizer), scale.seq_len, seed=0)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(init)
    tokenizer.save_pretrained(init, save_jinja_files=False)
    plan = plan_of(folder / "base", "cpt", init, data / "base", scale.seq_len, WHOLE.format(scale=scale))
    curve = launch(plan, "cpt")
    trained = plan.artifact("cpt")
    return trained.path, {"weights": model.num_parameters(), "held_out": curve, **trained.counts}


def said_of(base: dict[str, Any]) -> str:
    losses = ", ".join(f"{loss:.3f}" for loss in base["held_out"].values())
    return f"base: {base['weights']:,} weights, {base['steps']} steps, held-out loss {losses}"


# ---- the machine ------------------------------------------------------------------------------------------------------
def where() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def machine(device: Any) -> dict[str, Any]:
    """The tree's commit, versions and the device's name."""
    import torch

    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    return {"commit": commit, "versions": {"python": platform.python_version(), **dict(_versions())}, "device": name}


def said_of_machine(told: dict[str, Any]) -> str:
    return f"{told['device']}, {', '.join(f'{k} {v}' for k, v in told['versions'].items())}; commit {told['commit']}"


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            yield name, version(name)


# ---- the command line -------------------------------------------------------------------------------------------------
def both_halves(doc: str | None, at_once: str, whole: Any, tiny: Any, prepare: Callable[..., None], train: Callable[..., bool]) -> int:
    """The command of a benchmark in two halves; its exit code. at_once: what shares the GPU; whole, tiny: its scales."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    half = parser.add_mutually_exclusive_group(required=True)
    half.add_argument("--prepare", type=Path, metavar="DIR", help="write tokenizer and shards")
    half.add_argument("--train", type=Path, metavar="DIR", help="read them and train")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "../shared/data", help="the folder with taigi_news.txt, drcd_dev.json and gsm8k_train.jsonl"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("."), help="where the results go; base and runs, 4 GB, lie in the temporary folder meanwhile"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-once", type=int, help=at_once)
    parser.add_argument("--tiny", action="store_true")
    numbers = ("epochs", "lr", "base_epochs", "base_lr")
    for name in numbers:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    args = parser.parse_args()
    scale = replace(tiny if args.tiny else whole, **{name: value for name in numbers if (value := getattr(args, name)) is not None})
    if args.prepare:
        prepare(args.prepare, args.data.resolve(), scale)
        return 0
    return 0 if train(args, scale) else 1


def refuse_other_bins(shards: Path, seq_len: int) -> None:
    """Exit where the halves were run at different scales."""
    if (found := json.loads((shards / "train/index.json").read_text())["seq_len"]) != seq_len:
        sys.exit(f"{shards} has bins of {found} tokens, not {seq_len}: give --tiny to both halves or to neither")
