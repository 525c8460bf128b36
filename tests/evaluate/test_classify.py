"""Scores equal scikit-learn's; strict and by intent differ by the malformed calls alone."""

import random
from itertools import pairwise

import pytest
from sklearn.metrics import precision_recall_fscore_support

from graft.evaluate.classify import PREDICTED, certainty, confusion, family_accuracy, render_report, score


@pytest.mark.parametrize("seed", range(20))
def test_scores_equal_scikit_learn(seed):
    rng = random.Random(seed)
    truth = [rng.choice(["call", "text"]) for _ in range(rng.randint(1, 60))]
    predicted = [rng.choice(PREDICTED) for _ in truth]
    found = score(truth, predicted)
    for name, said in (("strict", [p == "call" for p in predicted]), ("intent", [p != "text" for p in predicted])):
        p, r, f, _ = precision_recall_fscore_support([t == "call" for t in truth], said, average="binary", zero_division=0)
        assert found[name] == pytest.approx({"precision": p, "recall": r, "f1": f})
    assert found["accuracy"] == sum(t == p for t, p in zip(truth, predicted, strict=True)) / len(truth)
    matrix = confusion(truth, predicted)
    assert sum(sum(row.values()) for row in matrix.values()) == len(truth)
    assert matrix["call"]["call"] + matrix["text"]["text"] == round(found["accuracy"] * len(truth))


def test_a_malformed_call_is_wrong_when_strict_and_a_call_by_intent():
    found = score(["call", "call", "text"], ["malformed", "call", "text"])
    assert found["strict"]["recall"] == 0.5 and found["intent"]["recall"] == 1.0


def test_constants_and_empty_classes():
    truth = ["call"] * 5 + ["text"] * 5
    assert score(truth, ["call"] * 10)["strict"]["f1"] == pytest.approx(2 / 3)
    assert score(truth, ["text"] * 10)["strict"] == {"precision": 0, "recall": 0, "f1": 0}


def test_intervals_are_of_families_drawn_anew():
    """Against a loop that draws families and asks scikit-learn."""
    rng = random.Random(0)
    rows = [{"label": ("call", "text")[f % 2], "family": str(f)} for f in range(9) for _ in range(5 + 3 * f)]
    truth = [row["label"] for row in rows]
    ours = [t if rng.random() < 0.6 + 0.04 * int(row["family"]) else rng.choice(PREDICTED) for row, t in zip(rows, truth, strict=True)]
    found = certainty(rows, {"ours": ours}, ["ours"], 0)
    assert found["families"] == 9 and "paired" not in found and found == certainty(rows, {"ours": ours}, ["ours"], 0)
    drawn = []
    for _ in range(400):
        names = rng.choices("02468", k=5) + rng.choices("1357", k=4)
        own = [n for name in names for n, row in enumerate(rows) if row["family"] == name]
        drawn.append(
            precision_recall_fscore_support([truth[n] == "call" for n in own], [ours[n] == "call" for n in own], average="binary", zero_division=0)[
                :3
            ]
        )
    for at, metric in enumerate(("precision", "recall", "f1")):
        each = sorted(values[at] for values in drawn)
        low, high = found["intervals"]["ours"]["strict"][metric]
        assert abs(low - each[10]) < 0.03 and abs(high - each[-11]) < 0.03 and low < score(truth, ours)["strict"][metric] < high


def test_a_pair_is_scored_on_the_same_draws():
    rng = random.Random(1)
    rows = [{"label": ("call", "text")[f % 2], "family": str(f)} for f in range(8) for _ in range(30)]
    hard = [rng.random() < int(row["family"]) / 8 for row in rows]  # families that differ much
    other = {"call": "text", "text": "call"}
    theirs = [other[row["label"]] if h else row["label"] for row, h in zip(rows, hard, strict=True)]
    ours = [row["label"] if not h or rng.random() < 0.2 else other[row["label"]] for row, h in zip(rows, hard, strict=True)]
    found = certainty(rows, {"ours": ours, "theirs": theirs}, ["ours", "theirs"], 0)
    pair, both = found["paired"], found["intervals"]
    assert pair["of"] == "ours less theirs" and pair["accuracy"]["low"] > 0 and pair["strict"]["f1"]["low"] > 0 and pair["strict"]["f1"]["p"] < 0.01
    assert both["ours"]["strict"]["f1"][0] < both["theirs"]["strict"]["f1"][1], "two intervals overlap"
    truth = [row["label"] for row in rows]
    apart = score(truth, ours)["strict"]["f1"] - score(truth, theirs)["strict"]["f1"]
    assert pair["strict"]["f1"]["difference"] == pytest.approx(apart, abs=1e-6)
    same = certainty(rows, {"a": ours, "b": ours}, ["a", "b"], 0)["paired"]["intent"]["recall"]
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_report_shows_every_number():
    truth, predicted, base = ["call", "text"] * 2, ["call", "malformed", "call", "text"], ["text"] * 4
    rows = [{"family": f, "label": t, "predicted": p} for f, t, p in zip("abcd", truth, predicted, strict=True)]
    metrics = {
        "rows": 4,
        "scores": {"adapter": score(truth, predicted), "base": score(truth, base)},
        **certainty(rows, {"adapter": predicted, "base": base}, ["adapter", "base"], 0),
        "confusion": confusion(truth, predicted),
        "per_family_accuracy": family_accuracy(rows),
        "argument_exact_share": None,
    }
    text = render_report(metrics)
    assert "1.000" in text and "a 1.00, b 0.00" in text and "malformed" in text and "4 held-out seed families" in text
    adapter, below = next((a.split(), b.split()) for a, b in pairwise(text.splitlines()) if a.startswith("adapter"))
    assert adapter == ["adapter", "1.000", "1.000", "1.000", "0.800", "0.750"]
    assert below == ["1.00-1.00"] * 3 + ["0.67-1.00", "0.50-1.00"]
    assert "adapter less base: F1 +1.000 (+1.000 to +1.000), p 0.000; accuracy +0.250 (+0.000 to +0.500)" in text
