"""Scores equal scikit-learn's; strict and by intent differ by the malformed calls alone."""

import random

import pytest
from sklearn.metrics import precision_recall_fscore_support

from graft.evaluate.classify import PREDICTED, confusion, family_accuracy, render_report, score


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


def test_report_shows_every_number():
    truth, predicted = ["call", "text"], ["call", "malformed"]
    rows = [{"family": f, "label": t, "predicted": p} for f, t, p in zip("ab", truth, predicted, strict=True)]
    metrics = {
        "rows": 2,
        "scores": {"adapter": score(truth, predicted)},
        "confusion": confusion(truth, predicted),
        "per_family_accuracy": family_accuracy(rows),
        "argument_exact_share": None,
    }
    text = render_report(metrics)
    assert "1.000" in text and "a 1.00, b 0.00" in text and "malformed" in text
