"""`graft check RECIPE --gpus 8xH100`: what each training stage will need before anything is allocated, and whether its base can be trained. Imports no torch.

Without --gpus it is the GPUs of this machine, as nvidia-smi lists them, that are asked about.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import replace

from graft.core.environment import number
from graft.core.errors import ArtifactError, ConfigError
from graft.core.hub import config_file
from graft.core.shards import ShardSet
from graft.core.stages import Plan
from graft.model.shapes import ON_THE_HUB, SHAPES
from graft.train.alike import refuse_long, refuse_unlike, window
from graft.train.flops import PEAK_BF16_FLOPS, known
from graft.train.launch import processes_per_node
from graft.train.sizing.choice import AUTO, choose, described, mend, smallest
from graft.train.sizing.needs import CONTEXT_GIB, ERROR, MEASURED, MEMORY_GIB, Gpu, Shape, Work
from graft.train.split import total_steps
from graft.train.strategy import Zero, strategy_of

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits")


def report(plan: Plan, gpus: str, price_usd: float | None) -> tuple[list[str], bool]:
    """(lines on each training stage of the recipe on GPUs such as "8xH100", whether all of it fits); price_usd: an hour of one GPU."""
    count, kind = _gpus(gpus)
    return _report(plan, count, Gpu.named(kind), price_usd)


def report_here(plan: Plan, price_usd: float | None) -> list[str]:
    """The same on this machine; without a GPU, what "auto" is there."""
    stages = plan.recipe.train_stages()
    if gpu := _here():
        try:
            return _report(plan, processes_per_node() * number("NUM_NODES", 1, 1), gpu, price_usd)[0]
        except ConfigError as e:
            return [f"memory: {e}"]
    autos = [
        stage for stage in stages if AUTO in (plan.recipe.train_stage(stage).micro_batch, plan.recipe.train_stage(stage).activation_checkpointing)
    ]
    return [f'{", ".join(autos)}: no GPU here, where "auto" is micro_batch 1 and activation_checkpointing none'] if autos else []


def trains_alike(plan: Plan) -> list[str]:
    """ConfigError where the trainer would refuse the base by its config.json, or with it shards that are made; a line where it may refuse those to come."""
    if not plan.recipe.train_stages() or plan.recipe.base or plan.recipe.model.base in plan.unseen:
        return []
    base, revision = plan.external_base()
    name = f"model.base = {base!r}"
    try:
        whole = json.loads(config_file(base, revision).read_text(encoding="utf-8"))
        config = whole.get("text_config") or whole
    except (OSError, ValueError, AttributeError) as e:
        raise ConfigError(f"{name} has a config.json that cannot be read ({e}): mend it, or name another base") from None
    refuse_unlike(config, name)
    missing = False
    for stage in plan.recipe.train_stages():
        try:
            folders = [folder for split in ("train", "validation") if (folder := plan.artifact(f"shard-{stage}").path / split).is_dir()]
        except (ArtifactError, KeyError):
            missing = True
            continue
        for folder in folders:
            refuse_long(ShardSet.open(folder, verify=False), folder, config, name)
    if missing and (seen := window(config)) and plan.recipe.shard.seq_len > seen:
        return [f"{name} sliding_window = {seen}: longer documents are refused, set shard.seq_len to {seen} at most where there may be some"]
    return []


def _report(plan: Plan, count: int, gpu: Gpu, price_usd: float | None) -> tuple[list[str], bool]:
    shape, told = _shape(plan)
    if shape is None:
        return [told], True
    zero = Zero.of(strategy_of(plan))
    lines, fits = [told] if told else [], True
    for stage in plan.recipe.train_stages():
        train = plan.recipe.train_stage(stage)
        work = Work(shape, plan.recipe.train_precision(stage), train, plan.recipe.shard.seq_len, count, zero)
        made = _made(plan, stage)
        if plan.recipe.stage_shows_images(stage):  # rows are alone in their bins
            filled = made["tokens"] / made["bins"] if made else None
            work = replace(work, image_pixels=plan.recipe.shard.image_pixels, row_tokens=filled)
        choice = choose(work, gpu)
        setting, n, tight = choice or smallest(work, gpu)
        line = (
            f"{stage}: {described(work, setting)}: {n.peak_gib:.1f} of {gpu.memory_gib:.0f} GiB a GPU, at its peak in the {n.moment} "
            f"(weights {n.weights_gib:.1f}, trained {n.optimizer_gib:.1f}, activations {n.activations_gib:.1f}, "
            f"{'logits' if n.moment == 'loss' else 'work'} {n.workspace_gib:.1f})"
        )
        lines.append(line + (f"; {n.step_time_s:.2f} s a step, {n.tokens_per_s:,.0f} tokens/s" if gpu.peak_flops else ""))
        if gpu.peak_flops and made:
            steps = total_steps(made["bins"], train.epochs, train.global_batch, train.max_steps)
            hours = steps * n.step_time_s / 3600
            cost = f", {hours * count * price_usd:,.2f} USD" if price_usd else ""
            lines.append(f"{stage}: {steps:,} steps, {hours:.2f} hours{cost}")
        if choice is None:
            lines.append(f"{stage}: does not fit: {mend(work, gpu)}")
        elif tight:
            lines.append(f"{stage}: may not fit, it is within the error: {mend(work, gpu)}")
        fits = fits and choice is not None
    lines.append(f"error: {ERROR['peak_gib']:.0%} of memory, {ERROR['step_time_s']:.0%} of time at most where {MEASURED}; elsewhere not measured")
    return lines, fits


def _shape(plan: Plan) -> tuple[Shape | None, str]:
    """The base's, and a line where its config.json was not looked at: what is known of it by its name alone."""
    base = plan.recipe.model.base
    if plan.recipe.base:
        return Shape.embedded(plan.recipe.base), ""
    place = plan.external_base()
    if base not in plan.unseen:
        return Shape.at(*place), ""
    if known := ON_THE_HUB.get(base):
        return Shape.of(SHAPES[known]), f"memory and time: by the shape that {base} is known to have ({known})"
    return None, f"memory and time: not predicted, the shape of {base} is known by its config.json alone"


def _gpus(text: str) -> tuple[int, str]:
    count, _, kind = text.partition("x")
    found = next((name for name in MEMORY_GIB if name.replace(" ", "").lower() == kind.replace(" ", "").replace("-", "").lower()), None)
    if not count.isdecimal() or not int(count) or found is None:
        raise ConfigError(f"--gpus {text!r} is not like 8xH100: a number, x, and one of {', '.join(MEMORY_GIB)}")
    return int(count), found


def _here() -> Gpu | None:
    """The GPU of this machine, of those that this process may use, with the least room."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which(NVIDIA_SMI[0]) is None or visible == "":
        return None
    listing = subprocess.run([*NVIDIA_SMI, *(["-i", visible] if visible else [])], capture_output=True, text=True, timeout=30)
    return min(listed(listing.stdout), key=lambda gpu: gpu.room_gib, default=None) if listing.returncode == 0 else None


def listed(text: str) -> list[Gpu]:
    """The GPUs of nvidia-smi's lines "name, MiB, free MiB, compute capability"; one that tells no numbers is left out."""
    found = []
    for line in filter(None, text.splitlines()):
        name, *fields = (field.strip() for field in line.rsplit(",", 3))
        with suppress(ValueError):
            total, free, capability = map(float, fields)
            found.append(Gpu(name, total / 1024, free / 1024 - CONTEXT_GIB, PEAK_BF16_FLOPS.get(known(name) or ""), capability >= 8.9))
    return found


def _made(plan: Plan, stage: str) -> dict[str, int]:
    """Counts of what the stage trains on, where its shards are made."""
    try:
        found: dict[str, int] = plan.artifact(f"shard-{stage}").counts["train"]
    except (ArtifactError, KeyError):
        return {}
    return found
