"""Intervals hold the truth as often as they say, and what is paired sees what two intervals do not."""

import numpy as np
import pytest

from graft.evaluate.statistics import mean_of, paired, paired_runs


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        found = mean_of([(rng.random(80) < 0.3).astype(float)], seed)
        held += found.low <= 0.3 <= found.high
    assert 180 <= held <= 199


def test_repeats_give_a_standard_deviation_and_the_same_seed_the_same_interval():
    scores = np.random.default_rng(1).random((3, 50))
    found = mean_of(scores)
    assert found == mean_of(scores) and found.mean == pytest.approx(scores.mean())
    assert found.std == pytest.approx(scores.mean(axis=1).std(ddof=1)) and mean_of(scores[:1]).std is None
    assert set(found.told()) == {"mean", "low", "high", "rows", "std"}


def test_a_small_but_steady_difference_is_seen():
    rng = np.random.default_rng(2)
    hard = rng.random(300)
    ours, theirs = hard + 0.02 + rng.normal(0, 0.01, 300), hard
    found = paired([ours], [theirs])
    assert found.low > 0 and found.p < 0.01 and found.wins > found.losses
    assert mean_of([ours]).low < mean_of([theirs]).high, "two intervals overlap"
    assert paired([hard], [hard]).p == 1.0


def test_no_rows_and_other_rows():
    with pytest.raises(ValueError, match="no rows"):
        mean_of([[]])
    with pytest.raises(ValueError, match="cannot be paired"):
        paired([[1.0]], [[1.0, 0.0]])


def test_runs_are_drawn_beside_rows():
    rng = np.random.default_rng(3)
    theirs = rng.random((3, 200))
    of_rows = theirs + 0.05 + rng.normal(0, 0.1, (3, 200))
    of_runs = of_rows + np.array([[-0.1], [0.0], [0.1]])  # the same mean, but runs that differ
    steady, shaky = paired_runs(of_rows, theirs), paired_runs(of_runs, theirs)
    assert steady.difference == pytest.approx(shaky.difference) and steady.low > 0 > shaky.low
    assert paired(of_runs, theirs).low > 0, "which the rows alone do not show"
    assert steady == paired_runs(of_rows, theirs), "seeded"
    one = paired_runs(of_rows[:1], theirs[:1])
    assert (one.low, one.high) == pytest.approx((paired(of_rows[:1], theirs[:1]).low, paired(of_rows[:1], theirs[:1]).high), abs=0.002)


def test_the_interval_over_runs_holds_the_truth_more_often_than_that_of_rows():
    rng, held = np.random.default_rng(4), np.zeros(2)
    for seed in range(100):
        apart = 0.1 + rng.normal(0, 0.05, (8, 1)) + rng.normal(0, 0.3, (8, 60))
        held += [low <= 0.1 <= high for low, high in ((f.low, f.high) for f in (paired_runs(apart, 0 * apart, seed), paired(apart, 0 * apart, seed)))]
    assert 88 <= held[0] <= 100 and held[0] > held[1]


def test_runs_that_are_not_as_many():
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_runs([[1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]])
