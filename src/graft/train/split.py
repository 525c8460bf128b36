"""How a run is split into steps and a step into forwards. Imports nothing heavy: `graft check` asks too."""

from __future__ import annotations

from graft.core.errors import ConfigError


def total_steps(bins: int, epochs: float, global_batch: int, max_steps: int | None) -> int:
    """Steps of the whole run: every full global batch of the epochs, at least one."""
    steps = max(1, int(bins * epochs) // global_batch)
    return min(steps, max_steps) if max_steps else steps


def micro_batch_of(global_batch: int, world: int, most: int) -> int:
    """Bins a forward: the largest divisor of the rank's share that is at most `most`; ConfigError where ranks do not divide."""
    if global_batch % world:
        fits = [w for w in range(1, global_batch + 1) if global_batch % w == 0]
        raise ConfigError(f"global_batch = {global_batch} bins cannot be split over {world} processes: use {fits} processes, or another global_batch")
    share = global_batch // world
    return max(m for m in range(1, min(most, share) + 1) if share % m == 0)


def deepspeed_split(global_batch: int, world: int, micro: int) -> dict[str, int]:
    """What DeepSpeed calls the parts of a global batch."""
    parts = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": global_batch // (world * micro)}
    return parts | {"train_batch_size": global_batch}
