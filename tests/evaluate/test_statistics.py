"""Intervals hold the truth as often as they say, and what is paired sees what two intervals do not."""

import numpy as np
import pytest

from graft.evaluate.statistics import RESAMPLES, Clusters, interval, mean_of, other_sign, paired, paired_runs


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


def test_a_draw_has_as_many_whole_clusters_of_each_stratum():
    strata, names = [*"xxxyyyy"], [*"aabaacc"]  # a of x is another than a of y
    drawn = Clusters.drawn(strata, names, 3)
    assert drawn.of.tolist() == [0, 0, 1, 2, 2, 3, 3] and drawn.times.shape == (RESAMPLES, 4)
    assert (drawn.times[:, :2].sum(axis=1) == 2).all() and (drawn.times[:, 2:].sum(axis=1) == 2).all()
    assert set(drawn.sums(np.ones((7, 1)))[:, 0]) == {2 + 4, 3 + 4, 4 + 4}, "families keep their sizes"
    assert (drawn.times == Clusters.drawn(strata, names, 3).times).all() and (drawn.times != Clusters.drawn(strata, names, 4).times).any()


def test_the_interval_over_clusters_holds_the_truth_more_often_than_that_of_rows():
    rng, held = np.random.default_rng(5), np.zeros(2)
    names = [str(n // 20) for n in range(240)]
    for seed in range(100):
        scores = (rng.random((12, 20)) < rng.beta(4, 2, (12, 1))).ravel().astype(float)
        means = Clusters.drawn(["x"] * 240, names, seed).sums(scores[:, None])[:, 0] / 240
        of_rows = mean_of([scores], seed)
        held += [low <= 4 / 6 <= high for low, high in (interval(means), (of_rows.low, of_rows.high))]
    assert 84 <= held[0] <= 100 and held[0] > held[1] + 10


def test_a_cluster_that_stands_alone_has_its_rows_drawn():
    scores = np.array([1.0, 0.0, 1.0, 1.0])
    low, high = interval(Clusters.drawn(["x"] * 4, ["a"] * 4).sums(scores[:, None])[:, 0] / 4)
    assert low < 0.75 < high, "no interval without a width"


def test_the_other_sign():
    assert other_sign(np.array([1.0, 2.0, 3.0, -1.0])) == 0.5 and other_sign(np.zeros(4)) == 1.0 and other_sign(np.ones(4)) == 0.0
