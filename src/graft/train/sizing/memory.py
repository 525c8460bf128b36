"""The memory plan of a run: the setting that all ranks go by, what it is predicted to need, and what to say where that is too much.

A recipe's "auto" becomes a number on rank 0, for the GPU with the least free memory; a resumed run goes on with the numbers
of the run it resumes, unless the recipe names others or they do not fit the GPUs that are there now. On the CPU "auto" is one bin
a forward and nothing computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from graft.core.errors import ConfigError, TrainError
from graft.core.stages import Job
from graft.model.frozen import fp8_works
from graft.train.flops import PEAK_BF16_FLOPS, known
from graft.train.sizing.choice import AUTO, choose, described, mend, smallest
from graft.train.sizing.needs import ERROR, GIB, Gpu, Setting, Shape, Work
from graft.train.split import micro_batch_of
from graft.train.strategy import Zero, strategy_of


@dataclass(frozen=True)
class MemoryPlan:
    setting: Setting
    predicted_gib: float | None = None  # None: on the CPU, or of a model whose shape tells nothing
    line: str | None = None  # for people
    smaller: str = 'lower micro_batch, or set activation_checkpointing = "full"'  # what to do if it runs out nonetheless

    @property
    def numbers(self) -> dict[str, Any]:
        """For metrics and the artifact."""
        return self.setting._asdict() | ({"predicted_mem_gib": self.predicted_gib} if self.predicted_gib else {})

    @contextmanager
    def explaining(self, stage: str) -> Iterator[None]:
        """A GPU's out-of-memory as one line, with what was predicted and what would fit."""
        try:
            yield
        except torch.OutOfMemoryError as e:
            peak_gib = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
            predicted = f", predicted {self.predicted_gib:.1f}" if self.predicted_gib else ""
            with_what = ", ".join(f"{key} {value}" for key, value in self.setting._asdict().items())
            why = ". ".join(str(e).split(". ")[:2]).rstrip(".")
            raise TrainError(f"{stage}: {why}; peak {peak_gib:.1f} GiB{predicted}, with {with_what}: {self.smaller}") from None


def agreed(job: Job, device: torch.device, cursor: dict[str, Any]) -> MemoryPlan:
    """The plan of this run, the same on every rank. cursor: of the run that is resumed, or empty.

    Raises TrainError, on rank 0, where the step is predicted not to fit: before any weight is loaded.
    """
    own = job.recipe.train_stage(job.stage.name)
    before = {key: value for key, value in cursor.get("setting", {}).items() if getattr(own, key) == AUTO}
    train = own.model_copy(update=before)
    micro = micro_batch_of(train.global_batch, dist.get_world_size(), train.micro_batch if isinstance(train.micro_batch, int) else 1)
    plain = Setting(micro, "none" if train.activation_checkpointing == AUTO else train.activation_checkpointing)
    if device.type != "cuda":
        return MemoryPlan(plain)
    room = torch.tensor(room_gib(device), device=device)
    dist.all_reduce(room, op=dist.ReduceOp.MIN)
    found = [MemoryPlan(plain)]
    if dist.get_rank() == 0:
        found = [_on_gpu(job, before, cursor.get("processes"), gpu_at(device, room.item()), plain)]
    dist.broadcast_object_list(found)
    return found[0]


def _on_gpu(job: Job, before: dict[str, Any], gpus_before: int | None, gpu: Gpu, plain: Setting) -> MemoryPlan:
    stage = job.stage.name
    try:
        shape = Shape.at(*job.plan.base_model(stage))
    except ConfigError as e:  # such a model may train nonetheless
        return MemoryPlan(plain, line=f"{e}; micro_batch {plain.micro_batch}, activation_checkpointing {plain.activation_checkpointing}")
    zero = Zero.of(strategy_of(job.plan))
    shard, seen = job.recipe.shard, job.recipe.stage_shows_images(stage)
    work = Work(
        shape,
        job.recipe.train_precision(stage),
        job.recipe.train_stage(stage),
        shard.seq_len,
        dist.get_world_size(),
        zero,
        image_pixels=shard.image_pixels if seen else 0,
    )
    return planned(stage, work, gpu, before, moved=gpus_before != work.gpus)


def planned(stage: str, work: Work, gpu: Gpu, before: dict[str, Any] | None = None, moved: bool = False) -> MemoryPlan:
    """What `work` runs with on such a GPU; TrainError where it does not fit.

    before: what the run that is resumed had in the place of "auto", kept where it fits. moved: that was on another number of GPUs.
    """
    as_before = replace(work, train=work.train.model_copy(update=before or {}))
    choice = choose(as_before, gpu)
    anew = bool(before) and (choice is None or (choice.tight and moved))  # where it ran already it may be tight again
    if anew:
        choice = choose(work, gpu)
    else:
        work = as_before
    if choice is None:
        least = smallest(work, gpu)
        raise TrainError(
            f"{stage} does not fit: it needs {least.need.peak_gib:.1f} GiB with {described(work, least.setting)}, and {gpu.name} has "
            f"{gpu.room_gib:.1f} of {gpu.memory_gib:.1f} GiB free: {mend(work, gpu)}"
        )
    setting, need, tight = choice
    fixed = replace(work, train=work.train.model_copy(update=setting._asdict()))
    smaller = mend(fixed, gpu._replace(room_gib=min(gpu.room_gib, need.peak_gib)))
    line = f"{described(work, setting)}: predicted peak {need.peak_gib:.1f} of {gpu.room_gib:.1f} GiB"
    if tight:
        line += f", within the prediction's error of {ERROR['peak_gib']:.0%}; if it runs out, {smaller}"
    if before and anew and before.items() - setting._asdict().items():
        line += f"; before it was {', '.join(f'{key} {value}' for key, value in before.items())}, which may not fit here"
    return MemoryPlan(setting, need.peak_gib, line, smaller)


def gpu_at(device: torch.device, room_gib: float) -> Gpu:
    """The GPU of this process."""
    name = torch.cuda.get_device_name(device)
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    return Gpu(name, total, room_gib, PEAK_BF16_FLOPS.get(known(name) or ""), fp8_works(device))


def room_gib(device: torch.device) -> float:
    """What torch can allocate here: the free memory, CUDA's context and other processes taken off, and what torch has already."""
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / GIB
