"""Of an arm the deviation is between its seeds; of two arms what is paired is what both have. What is read: test_tasks.py."""

from statistics import stdev

import pytest

from graft.evaluate import arms
from graft.evaluate.arms import Task


def task(rows, **means):
    return {"t": Task("generation", "rougeL", means, {}, {"rougeL": rows})}


def test_mean_and_deviation_are_of_the_seeds():
    runs = {1: task({"a": 0.2}, rougeL=0.2), 5: task({"a": 0.5}, rougeL=0.5), 6: task({"a": 0.3}, rougeL=0.3)}
    told = arms.tasks(runs)["t"]["metrics"]["rougeL"]
    assert told == {"mean": pytest.approx(1 / 3), "std": pytest.approx(stdev([0.2, 0.5, 0.3])), "n": 3, "by_seed": {"1": 0.2, "5": 0.5, "6": 0.3}}
    assert "std" not in arms.tasks({1: runs[1]})["t"]["metrics"]["rougeL"], "nothing is known of it from one seed"


def test_arms_are_paired_by_seed_and_row():
    low = {1: task({"a": 0.1, "b": 0.9}, rougeL=0.5), 2: task({"a": 0.3, "b": 0.7}, rougeL=0.5)}
    high = {2: task({"b": 0.8, "a": 0.4}, rougeL=0.6), 3: task({"a": 0, "b": 0}, rougeL=0)}
    (found,) = arms.differences({"low": low, "high": high})
    assert (found["of"], found["less"], found["seeds"], found["rows"], found["wins"]) == ("high", "low", 1, 2, 2)
    assert found["difference"] == found["low"] == found["high"] == pytest.approx(0.1), "of seed 2, which both have, each row to its own"
    assert [(d["of"], d["less"]) for d in arms.differences({"a": low, "b": low, "c": low})] == [("b", "a"), ("c", "a"), ("c", "b")]


def test_other_rows_or_other_seeds_are_not_paired():
    one = {1: task({"a": 0.1}, rougeL=0.1)}
    assert arms.differences({"x": one, "y": {2: one[1]}}) == []
    assert arms.differences({"x": one, "y": {1: task({"b": 0.1}, rougeL=0.1)}}) == []
