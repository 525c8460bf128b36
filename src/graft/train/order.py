"""Which bins a step trains on: a function of (seed, position) alone, whatever the number of GPUs.

The bins of all epochs form one endless sequence, each epoch a permutation of its own; step s takes positions
[s G, (s + 1) G). A tail shorter than G so joins the next epoch. Inside a step, bins go to ranks by attention cost.
"""

from __future__ import annotations

import numpy as np


class BinOrder:
    """Positions of the endless sequence -> bin indices."""

    def __init__(self, bins: int, seed: int):
        self.bins, self.seed = bins, seed
        self._epochs: dict[int, np.ndarray] = {}

    def epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e == epoch - 1}  # a step spans two epochs at most, or tiny ones
            self._epochs[epoch] = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.bins)
        return self._epochs[epoch]

    def take(self, start: int, count: int) -> np.ndarray:
        """Bin indices [count] at positions start .. start + count - 1."""
        return np.array([self.epoch(p // self.bins)[p % self.bins] for p in range(start, start + count)])


def share_out(costs: np.ndarray, world: int, micro: int) -> np.ndarray:
    """Indices [world, accumulation, micro] into a step's bins: dealt in snake order of falling cost, so ranks finish together.

    costs: [global_batch], the attention cost of each bin (sum of squared document lengths).
    """
    falling = np.argsort(-costs, kind="stable").reshape(-1, world)
    falling[1::2] = falling[1::2, ::-1]
    return falling.T.reshape(world, -1, micro)


def learning_rate(step: int, total: int, peak: float, warmup: float, schedule: str) -> float:
    """Learning rate of 0-based global `step`: linear warm-up over `warmup` steps, or that share of all where it is below 1, then the schedule to 0."""
    rising = int(warmup if warmup >= 1 else total * warmup)
    if step < rising:
        return peak * (step + 1) / rising
    left = (step - rising) / max(1, total - rising)
    return peak * {"constant": 1.0, "linear": 1 - left, "cosine": 0.5 * (1 + float(np.cos(np.pi * left)))}[schedule]
