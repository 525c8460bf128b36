"""Steps that would spoil the weights are left out: a loss or a gradient that is not finite, or a loss far above those before.

Both are judged on the device as the optimizer is about to step: the loss that all ranks have added up, and the norm of their gradient, so every
rank leaves out the same step, and none waits to know: weights and moments stay as they were, the step's learning rate and bins have passed.
The losses that count go into the checkpoint, so a resumed run leaves out the same.
"""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from graft.core.recipe import Train

WINDOW = 50  # losses whose mean and deviation count: where a curve has just fallen, its start is soon forgotten
SETTLED = 20  # losses before there is a deviation to speak of
LEAST = 0.05  # of the mean: a deviation below it is taken for this, or a flat curve's first ripple would be a spike
LEAST_NATS = 0.02  # and below this, or the ripples of what is learned by heart would be: at a loss of 0.005 one bin in thirty stood out


class Guard:
    """On every rank, over DeepSpeed's ZeRO optimizer of a fused AdamW: judge() before engine.step(), verdict() after it.

    `state` goes into the cursor and comes back from it: the last losses (nats a target) of steps that were taken, and counts.
    """

    def __init__(self, config: Train, engine: Any, state: dict[str, Any] | None):
        self.deviations, self.zero = config.spike_deviations, engine.optimizer
        self.state: dict[str, Any] = state or {"losses": [], "skipped": 0, "in_a_row": 0}
        self.sums: list[float] = []  # of the last step, what judge() was given besides the loss
        self.loss = self.norm = math.nan  # of the last step's global batch; of its gradient, before it was clipped
        self._given: tuple[Tensor, int] | None = None  # what is to be judged
        self._told: Tensor = torch.empty(0)  # the last step's sums and norm, on their way to the CPU
        self._arrived: torch.cuda.Event | None = None
        self.zero.optimizer.register_step_pre_hook(self._before)

    @property
    def limit(self) -> float:
        """The loss above which a step is left out."""
        losses = self.state["losses"]
        if not self.deviations or len(losses) < SETTLED:
            return math.inf
        mean = fmean(losses)
        return mean + self.deviations * max(pstdev(losses, mean), LEAST * abs(mean), LEAST_NATS)

    def judge(self, sums: Tensor, targets: int) -> None:
        """sums: on all ranks the same, the loss of all targets first."""
        self._given = sums, targets

    def _before(self, optimizer: Optimizer, args: Any, named: Any) -> None:
        """Tell the optimizer, on the device, whether to leave the step out, and begin to read why."""
        if self._given is None:  # its parameters' second group
            return
        (sums, targets), self._given = self._given, None
        figures = torch.cat([sums.double(), torch.as_tensor(self.zero._global_grad_norm, dtype=torch.float64, device=sums.device).view(1)])
        loss, norm = figures[0] / targets, figures[-1]
        taken = loss.isfinite() & (loss <= self.limit) & norm.isfinite() & (norm >= 0)  # DeepSpeed's norm of what is not finite is -1, or inf
        optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells a fused optimizer
        figures[0] = loss
        self._told = figures.to("cpu", non_blocking=True)
        if figures.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def verdict(self) -> str | None:
        """Why the step was left out, None where it was taken. Waits for the GPU to have come to the optimizer's step."""
        self._before(self.zero.optimizer, None, None)  # in fp32 DeepSpeed itself leaves out what is not finite, and asks no optimizer
        if self._arrived:
            self._arrived.synchronize()
        self.loss, *self.sums, self.norm = self._told.tolist()
        if not math.isfinite(self.loss):
            reason = f"the loss is {self.loss}"
        elif self.loss > (limit := self.limit):
            reason = f"the loss is {self.loss:.4g}, above {limit:.4g}, {self.deviations:g} deviations over the mean of the last {WINDOW}"
        elif not (math.isfinite(self.norm) and self.norm >= 0):
            reason = "the gradient is not finite"
        else:
            self.state["in_a_row"] = 0
            self.state["losses"] = [*self.state["losses"], self.loss][-WINDOW:]
            return None
        self.state["skipped"] += 1
        self.state["in_a_row"] += 1
        return reason
