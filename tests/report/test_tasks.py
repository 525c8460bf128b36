"""Tasks of every kind: means, the ten best and the ten worst answers with what was asked, wanted and said by the base."""

import json

import pytest

from graft.report.gather import gather
from graft.report.page import page
from graft.report.scrub import ends

from .made import SHIBA, TASKS, make, plan_in, tasks
from .test_page import HOSTILE, parsed


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return gather(make(plan_in(tmp_path_factory.mktemp("tasks"), TASKS)))


@pytest.fixture(scope="module")
def found(report):
    return {t.name: t for t in report.evaluation.tasks}


def ids(answers):
    return [int(a.id) for a in answers]


def test_means_stand_a_metric_a_row_with_intervals_and_the_paired_difference(found):
    chat, reading, texts = (found[name].means for name in ("chat", "reading", "texts"))
    assert chat.columns == ("", "adapter", "base", "adapter less base", "p")
    mean = "0.500 (0.400 to 0.600)"
    assert chat.rows[0] == ("bleu", f"{mean} ± 0.010", f"{mean} ± 0.010", "", "")
    assert chat.rows[2] == ("rougeL", f"{mean} ± 0.010", f"{mean} ± 0.010", "+0.100 (-0.050 to +0.250)", "0.040")
    assert [r[0] for r in reading.rows] == [
        "right, by the generated answer", "unreadable", "right, by log-likelihood", "right, by log-likelihood a character",
    ]  # fmt: skip
    assert [r[0] for r in texts.rows] == ["perplexity", "bits per character", "nats per token"] and texts.rows[0][3:] == ("", "")


def test_unreadable_answers_are_counted(found):
    unread = sum(line["base"]["scores"]["unreadable"][0] for line in tasks()["reading"][1])
    assert f"{unread:.0f} of 30 answers of base unreadable" in found["reading"].note and found["reading"].note.startswith("choice, 30 rows, ")
    assert found["chat"].note == "generation, 30 rows"
    assert any("unreadable" in a.judged for a in found["maths"].worst)


def test_answers_are_ranked_by_the_tasks_own_score_and_then_by_what_the_base_did(found):
    assert ids(found["chat"].best) == list(range(29, 19, -1)) and ids(found["chat"].worst) == list(range(10))
    assert ids(found["texts"].best) == list(range(1, 11)) and ids(found["texts"].worst) == list(range(29, 19, -1)), "one of no tokens has no score"
    for name in ("reading", "maths"):
        best, worst = found[name].best, found[name].worst
        assert len(best) == len(worst) == 10 and all(a.right for a in best) and not any(a.right for a in worst)
        assert all("base wrong" in a.judged or "base unreadable" in a.judged for a in best), "first where the base did not"
        assert all("base right" in a.judged for a in worst)


def test_an_answer_stands_beside_what_was_asked_wanted_and_said_by_the_base(found):
    chat, reading, texts = (found[name].best[0] for name in ("chat", "reading", "texts"))
    assert dict(chat.sides) == {
        "prompt": f"system: short\n\nuser: {SHIBA} 29 of chat",
        "adapter’s answer": "adapter says 29",
        "wanted": "wanted 29",
        "base’s answer": "base says 29",
    }
    assert chat.right is None and chat.judged == "adapter rougeL 0.983, base rougeL 0.967"
    sides, n = dict(reading.sides), int(reading.id)
    assert sides["wanted"] == f"{'ABCD'[n % 4]}. {'海山河湖'[n % 4]} {n}", "the option, not its number"
    assert sides["prompt"].startswith("文文") and sides["prompt"].endswith(f"文 question {n}") and len(sides["prompt"]) < 1600
    assert n == 0 and reading.judged == "adapter right, likeliest C. 河 0, base unreadable, likeliest B. 山 0"
    assert texts.judged == "adapter 2.050 nats a token, base 2.550 nats a token" and texts.sides[0][1].startswith("text 1 海")


def test_few_answers_are_never_best_and_worst(tmp_path):
    _, lines, told = tasks(5)["chat"]
    plan = make(plan_in(tmp_path, TASKS), "sft")
    with plan.resolve("evaluate").writing() as draft:
        (draft.path / "metrics.json").write_text(json.dumps({"tasks": {"chat": told}}))
        (draft.path / "predictions-chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
        draft.counts["tasks"] = {"chat": {"rougeL": 0.5}}
    report = gather(plan)
    (chat,) = report.evaluation.tasks
    assert ids(chat.best) == [4, 3, 2] and ids(chat.worst) == [0, 1]
    assert "chat rougeL 0.500" in {s.name: s for s in report.stages}["evaluate"].note


def test_what_an_evaluation_does_not_have_is_left_out(tmp_path):
    plan = make(plan_in(tmp_path), "sft")
    one = {"kind": "choice", "systems": {"model": {"correct": {"mean": 0.5}}}}
    line = {"id": "0", "wanted": 2, "model": {"answers": ["C"], "scores": {"correct": [1.0], "unreadable": [0.0]}}}
    with plan.resolve("evaluate").writing() as draft:
        (draft.path / "metrics.json").write_text(json.dumps({"tasks": {"exam": one, "gone": {**one, "kind": "exact"}}}))
        (draft.path / "predictions-exam.jsonl").write_text("\n".join(map(json.dumps, [line, {"id": "1"}])))
    exam, gone = gather(plan).evaluation.tasks
    assert exam.means.columns == ("", "model") and exam.means.rows == (("right, by the generated answer", "0.500"),)
    assert [a.sides for a in exam.best] == [(("prompt", ""), ("answer", "C"), ("wanted", "option 3"))] and exam.worst == ()
    assert (gone.best, gone.worst, gone.note) == ((), (), "exact")


def test_the_page_shows_all_of_them_and_lets_nothing_through(report, tmp_path):
    text = parsed(page(report)).text
    for said in ("Task reading", "The 10 worst", "The 10 best", "adapter less base", "base’s answer", "wanted 29", "nats a token"):
        assert said in text, said
    plan = make(plan_in(tmp_path, TASKS), "sft")
    lines = [
        {"id": HOSTILE + line["id"], "wanted": HOSTILE, **{s: {**line[s], "answers": [HOSTILE]} for s in ("adapter", "base")}}
        for line in tasks()["chat"][1]
    ]
    with plan.resolve("evaluate").writing() as draft:
        (draft.path / "metrics.json").write_text(json.dumps({"tasks": {"chat": tasks()["chat"][2]}}))
        (draft.path / "predictions-chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert parsed(page(gather(plan))).text.count(HOSTILE) == 20 * 4


@pytest.mark.parametrize(
    ("text", "kept"), [("海邊散步", "海邊散步"), ("abcdefgh", "ab…gh"), ("abcde\u0301f", "ab…f"), ("abcdefe\u0301", "ab…e\u0301")]
)
def test_the_end_of_a_text_is_kept_too(text, kept):
    assert ends(text, 4) == kept
