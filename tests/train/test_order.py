"""The order of bins is a function of (seed, position); the split over ranks never changes a step's bins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.train.order import BinOrder, learning_rate, share_out


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation_and_tails_join_the_next(bins, batch, seed):
    order = BinOrder(bins, seed)
    seen = np.concatenate([order.take(s * batch, batch) for s in range((3 * bins) // batch + 1)])
    for epoch in range(len(seen) // bins):
        assert sorted(seen[epoch * bins : (epoch + 1) * bins]) == list(range(bins))


def test_resuming_at_any_position_gives_the_same_bins():
    whole = BinOrder(17, 3).take(0, 100)
    for at in (0, 1, 16, 17, 18, 50):
        assert (BinOrder(17, 3).take(at, 100 - at) == whole[at:]).all()
    assert (BinOrder(17, 4).take(0, 17) != whole[:17]).any()


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 8), (2, 2), (4, 1), (8, 1)])
def test_a_step_is_shared_out_whole_and_evenly(world, micro):
    costs = np.random.default_rng(0).lognormal(size=8)
    shares = share_out(costs, world, micro)
    assert shares.shape == (world, 8 // world // micro, micro)
    assert sorted(shares.flat) == list(range(8))
    loads = costs[shares.reshape(world, -1)].sum(1)
    assert loads.max() - loads.min() <= costs.max()


def test_learning_rates():
    rates = [learning_rate(s, 100, 1.0, 0.1, "cosine") for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[-1] < 0.001 and max(rates) == 1.0
    steps = [learning_rate(s, 100, 1.0, 10, "cosine") for s in range(100)]
    assert steps == rates and learning_rate(24, 100, 1.0, 50, "cosine") == 0.5 and learning_rate(0, 100, 1.0, 1, "constant") == 1.0
    assert learning_rate(50, 100, 2.0, 0.0, "constant") == 2.0
    assert learning_rate(50, 100, 2.0, 0.0, "linear") == 1.0
