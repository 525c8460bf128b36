"""Which setting a step runs with: the fastest that is predicted to fit; and what to say where none does. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final, NamedTuple

from graft.core.recipe import Kept
from graft.train.sizing.needs import BYTES, ERROR, Gpu, Need, Setting, Work, need
from graft.train.split import micro_batch_of

KEPT: tuple[Kept, ...] = ("none", "selective", "full")
AUTO: Final = "auto"


class Choice(NamedTuple):
    setting: Setting
    need: Need
    tight: bool  # only the prediction's error says that it may fit


def settings(work: Work) -> list[Setting]:
    """Those that the recipe leaves open; ConfigError where the GPUs do not divide the batch."""
    train, share = work.train, work.train.global_batch // work.gpus
    most = micro_batch_of(train.global_batch, work.gpus, train.micro_batch if isinstance(train.micro_batch, int) else share)
    micros = [m for m in range(1, most + 1) if share % m == 0] if train.micro_batch == AUTO else [most]
    kept = KEPT if train.activation_checkpointing == AUTO else (train.activation_checkpointing,)
    return [Setting(m, k) for m in micros for k in kept if k != "selective" or train.fused or len(kept) == 1]


def choose(work: Work, gpu: Gpu) -> Choice | None:
    """The fastest that fits, of equals the smallest; else the smallest of all, where it may fit; else None."""
    if found := _fastest(work, gpu, settings(work)):
        return found
    least = smallest(work, gpu)
    return least if least.need.peak_gib * (1 - ERROR["peak_gib"]) <= gpu.room_gib else None


def smallest(work: Work, gpu: Gpu) -> Choice:
    """The one that needs the least memory."""
    needs = {s: need(work, s, gpu) for s in settings(work)}
    least = min(needs, key=lambda s: (needs[s].peak_gib, needs[s].step_time_s))
    return Choice(least, needs[least], True)


def _fastest(work: Work, gpu: Gpu, among: list[Setting]) -> Choice | None:
    needs = {s: need(work, s, gpu) for s in among}
    fits = [s for s in among if needs[s].peak_gib * (1 + ERROR["peak_gib"]) <= gpu.room_gib]
    best = min(fits, key=lambda s: (needs[s].step_time_s, needs[s].peak_gib), default=None)
    return Choice(best, needs[best], False) if best else None


def mend(work: Work, gpu: Gpu) -> str:
    """What to change so that a step fits: the recipe as little as can be, or the number of GPUs."""
    train, most = work.train, work.train.micro_batch
    free = replace(work, train=train.model_copy(update={"activation_checkpointing": AUTO, "micro_batch": AUTO}))
    among = [s for s in settings(free) if not isinstance(most, int) or s.micro_batch <= most]
    for precision in _precisions(work, gpu):
        if found := _fastest(replace(free, precision=precision), gpu, among):
            changes = {key: new for key, new in found.setting._asdict().items() if getattr(train, key) not in (AUTO, new)}
            changes = ({"model.precision": precision} if precision != work.precision else {}) | changes
            return "set " + ", ".join(f"{key} = {new!r}".replace("'", '"') for key, new in changes.items()) if changes else "leave it as it is"
    for gpus in (n for n in range(work.gpus + 1, train.global_batch + 1) if train.global_batch % n == 0):
        more = replace(free, gpus=gpus)
        if _fastest(more, gpu, settings(more)):
            return f'take {gpus} of these GPUs, with activation_checkpointing and micro_batch = "auto"'
    return f"no setting fits: take larger GPUs{'' if train.lora else ', train LoRA'}, or make shorter bins (shard.seq_len)"


def _precisions(work: Work, gpu: Gpu) -> Iterable[str]:
    yield work.precision
    for smaller in ("bf16", "fp8", "nf4"):
        if BYTES[smaller] < BYTES[work.precision] and (work.train.lora or smaller == "bf16") and (gpu.fp8 or smaller != "fp8"):
            yield smaller


def described(work: Work, setting: Setting) -> str:
    """micro_batch 4 (auto), activation_checkpointing none."""
    return ", ".join(f"{key} {value}" + (" (auto)" if getattr(work.train, key) == AUTO else "") for key, value in setting._asdict().items())
