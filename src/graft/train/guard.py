"""Steps that would spoil the weights are left out: a loss or a gradient that is not finite, or a loss far above those before.

The loss is judged when all ranks have added theirs up, the norm of the gradient before the optimizer uses it, so every rank leaves
out the same step: weights and moments stay as they were, the step's learning rate and bins have passed. The losses that count
go into the checkpoint, so a resumed run leaves out the same.
"""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import Any

from torch.optim import Optimizer

from graft.core.recipe import Train

WINDOW = 50  # losses whose mean and deviation count: where a curve has just fallen, its start is soon forgotten
SETTLED = 20  # losses before there is a deviation to speak of
LEAST = 0.05  # of the mean: a deviation below it is taken for this, or a flat curve's first ripple would be a spike
LEAST_NATS = 0.02  # and below this, or the ripples of what is learned by heart would be: at a loss of 0.005 one bin in thirty stood out


class Guard:
    """On every rank, over DeepSpeed's ZeRO optimizer: judge() before engine.step(), verdict() after it.

    `state` goes into the cursor and comes back from it: the last losses (nats a target) of steps that were taken, and counts.
    """

    def __init__(self, config: Train, engine: Any, state: dict[str, Any] | None):
        self.deviations, self.zero = config.spike_deviations, engine.optimizer
        self.state: dict[str, Any] = state or {"losses": [], "skipped": 0, "in_a_row": 0}
        self._loss = 0.0
        self._reason: str | None = None
        self.norm = math.nan  # of the last step's gradient, before it was clipped
        self._looked = False
        self.zero.optimizer.register_step_pre_hook(self._before)

    @property
    def limit(self) -> float:
        """The loss above which a step is left out."""
        losses = self.state["losses"]
        if not self.deviations or len(losses) < SETTLED:
            return math.inf
        mean = fmean(losses)
        return mean + self.deviations * max(pstdev(losses, mean), LEAST * abs(mean), LEAST_NATS)

    def judge(self, loss: float) -> None:
        """loss: of the global batch, on all ranks the same."""
        self._loss, self._reason, self._looked = loss, None, False
        if not math.isfinite(loss):
            self._reason = f"the loss is {loss}"
        elif loss > (limit := self.limit):
            self._reason = f"the loss is {loss:.4g}, above {limit:.4g}, {self.deviations:g} deviations over the mean of the last {WINDOW}"

    def _look_at_norm(self) -> None:
        """Once a step: each look waits for what the GPU has been told by then."""
        if self._looked:
            return
        self.norm, self._looked = float(self.zero._global_grad_norm), True
        if self._reason is None and not (math.isfinite(self.norm) and self.norm >= 0):  # DeepSpeed's norm of what is not finite is -1, or inf
            self._reason = "the gradient is not finite"

    def _before(self, optimizer: Optimizer, args: Any, named: Any) -> None:
        self._look_at_norm()
        if self._reason:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None  # AdamW passes over what has no gradient

    def verdict(self) -> str | None:
        """Why the step was left out, None where it was taken."""
        self._look_at_norm()  # in fp32 DeepSpeed itself leaves out what is not finite, and asks no optimizer
        if self._reason:
            self.state["skipped"] += 1
            self.state["in_a_row"] += 1
        else:
            self.state["in_a_row"] = 0
            self.state["losses"] = [*self.state["losses"], self._loss][-WINDOW:]
        return self._reason
