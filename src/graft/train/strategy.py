"""The DeepSpeed strategy file of a recipe, and what of it decides memory. Imports no torch."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from graft.core.errors import ConfigError
from graft.core.stages import Plan


def strategy_of(plan: Plan) -> dict[str, Any]:
    """The recipe's strategy file; ConfigError where it cannot be read."""
    try:
        return dict(json.loads(plan.beside(plan.recipe.deepspeed).read_text(encoding="utf-8")))
    except (OSError, ValueError) as e:
        raise ConfigError(f"deepspeed = {plan.recipe.deepspeed!r} cannot be read: {e}") from None


class Zero(NamedTuple):
    """What ZeRO-2 allocates to reduce gradients (deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, setup_buckets).

    allgather_bucket_size is not here: updated weights are gathered in place.
    """

    bucket: int = 500_000_000  # elements; DeepSpeed's default
    buffers: int = 1  # of a bucket each, whole however little is trained

    @classmethod
    def of(cls, strategy: dict[str, Any]) -> Zero:
        zero = strategy.get("zero_optimization", {})
        bucket = zero.get("reduce_bucket_size")
        buffers = (1 + bool(zero.get("overlap_comm"))) if zero.get("contiguous_gradients", True) else 0
        return cls(int(bucket) if isinstance(bucket, int | float) else DEFAULT.bucket, buffers)


DEFAULT = Zero()
