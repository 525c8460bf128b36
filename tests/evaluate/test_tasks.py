"""Tasks of every kind on a tiny adapter that was really trained, beside its base, through the stage itself."""

import json
from math import exp
from statistics import fmean

import pytest

from graft.core.rows import read_jsonl
from graft.core.store import AdapterStore
from graft.data import questions
from graft.engine.hf import HFEngine
from graft.evaluate import arms, stage
from graft.evaluate.arms import CALLS
from graft.evaluate.options import behind, likelihoods, replies
from graft.evaluate.semantic import Encoder
from graft.evaluate.tasks import Asker, _of_option
from graft.model.chat import load_tokenizer
from graft.report.gather import gather

from ..train.small import small_plan, train
from .test_semantic import write_encoder

TASKS = """
[evaluate]
max_new_tokens = 8
semantic = "encoder"
batch_size = 4
{more}
[evaluate.tasks.reading]
kind = "choice"
path = "reading.jsonl"
mcq = {{ prompt = "{{question}} {{options}}", option = "{{letter}}{{text}}", reply = "{{letter}}" }}
[evaluate.tasks.next]
kind = "cloze"
path = "reading.jsonl"
mcq = {{ prompt = "{{article}} {{question}} ", reply = "{{text}}" }}
[evaluate.tasks.chat]
kind = "generation"
path = "chat.jsonl"
[evaluate.tasks.maths]
kind = "exact"
path = "maths.jsonl"
final = "\\\\w+"
[evaluate.tasks.texts]
kind = "perplexity"
path = "texts.txt"
"""


def plan_with(root, more=""):
    small_plan(root)
    write_encoder(root / "encoder")
    options = {f"option{n + 1}": text for n, text in enumerate("wxyz")}
    reading = [{"article": "a", "question": f"{n}?", **options, "answer": "ABCD"[n % 4]} for n in range(6)]
    (root / "reading.jsonl").write_text("\n".join(map(json.dumps, reading)))
    (root / "chat.jsonl").write_text("\n".join(json.dumps({"question": c, "answer": c * 3}) for c in "abcde"))
    (root / "maths.jsonl").write_text("\n".join(json.dumps({"question": c, "answer": c}) for c in "abc"))
    (root / "texts.txt").write_text("\n\n".join("abc " * n for n in (3, 30, 5)))
    recipe = root / "small.toml"
    if "[evaluate" not in recipe.read_text():
        recipe.write_text(recipe.read_text() + TASKS.format(more=more))
    plan = small_plan(root, "sft.lr=0.1", "sft.epochs=4")
    train(plan, 1)
    questions.run(plan.resolve("questions"))
    stage.run(plan.resolve("evaluate"))
    return plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_with(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def found(plan):
    return json.loads((plan.artifact("evaluate").path / "metrics.json").read_text())


def test_every_task_has_its_metrics_of_both_systems_and_their_difference(found):
    tasks = found["tasks"]
    assert {name: (told["kind"], told["rows"]) for name, told in tasks.items()} == {
        "reading": ("choice", 6),
        "next": ("cloze", 6),
        "chat": ("generation", 5),
        "maths": ("exact", 3),
        "texts": ("perplexity", 3),
    }
    for told in tasks.values():
        assert list(told["systems"]) == ["adapter", "base"] and told["paired"]["of"] == "adapter less base"
        for means in told["systems"].values():
            for mean in means.values():
                assert mean["low"] <= mean["mean"] <= mean["high"]
    assert {"correct", "unreadable", "correct_loglikelihood", "correct_loglikelihood_per_character"} == set(tasks["reading"]["systems"]["base"])
    assert {"correct_loglikelihood", "correct_loglikelihood_per_character"} == set(tasks["next"]["systems"]["base"])
    assert {"bleu", "rouge1", "rouge2", "rougeL", "equal", "semantic"} == set(tasks["chat"]["systems"]["base"])
    assert found["rows"] == 3 and found["scores"].keys() == found["intervals"].keys() and found["paired"]["of"] == "adapter less base"


def test_the_likelihoods_are_those_of_each_option_alone(plan):
    base, revision, adapters = plan.trained()
    engine = HFEngine(base, revision, "fp32", adapters, load_tokenizer(str(plan.artifact("sft").path)), device="cpu")
    rows = list(read_jsonl(plan.artifact("questions").path / "reading.jsonl"))
    kept = list(read_jsonl(plan.artifact("evaluate").path / "predictions-reading.jsonl"))
    for system, adapter in (("adapter", "small"), ("base", None)):
        together = likelihoods(engine, [replies(engine.tokenizer, row) for row in rows], adapter)
        for row, own, line in zip(rows, together, kept, strict=True):
            for (nats, a_character), reply in zip(own, replies(engine.tokenizer, row), strict=True):
                scores = engine.score(reply.ids, reply.first, adapter)
                alone = sum(s for s, supervised in zip(scores, reply.mask, strict=True) if supervised)
                assert abs(nats - alone) < 1e-5 and a_character == nats / reply.characters
            assert line[system]["loglikelihoods_nats"] == pytest.approx([nats for nats, _ in own], abs=1e-4)
    assert plan.artifact("evaluate").counts["engine"] == "HFEngine"


def test_predictions_are_kept_and_give_the_scores_again(plan, found):
    lines = list(read_jsonl(plan.artifact("evaluate").path / "predictions-reading.jsonl"))
    for system in ("adapter", "base"):
        share = sum(line[system]["scores"]["correct"][0] for line in lines) / len(lines)
        assert share == pytest.approx(found["tasks"]["reading"]["systems"][system]["correct"]["mean"], abs=1e-6)
        best = [max(range(4), key=line[system]["loglikelihoods_nats"].__getitem__) == line["wanted"] for line in lines]
        assert sum(best) / len(best) == pytest.approx(found["tasks"]["reading"]["systems"][system]["correct_loglikelihood"]["mean"], abs=1e-6)
    assert any(
        line["adapter"]["answers"] != line["base"]["answers"] for line in read_jsonl(plan.artifact("evaluate").path / "predictions-chat.jsonl")
    )


def engine_of(plan):
    base, revision, adapters = plan.trained()
    return HFEngine(base, revision, "fp32", adapters, load_tokenizer(str(plan.artifact("sft").path)), device="cpu")


def test_the_reply_that_was_trained_is_right_though_it_is_another_options_text():
    row = {"options": ["3", "1", "2", "4"], "replies": ["1", "2", "3", "4"], "right": 0}
    assert _of_option(row, "1") == {"correct": 1.0, "unreadable": 0.0} and _of_option(row, "3")["correct"] == 0.0


def test_a_cloze_is_plain_text_behind_plain_text(plan, found):
    engine = engine_of(plan)
    lines = list(read_jsonl(plan.artifact("evaluate").path / "predictions-next.jsonl"))
    for row, line in zip(read_jsonl(plan.artifact("questions").path / "next.jsonl"), lines, strict=True):
        assert row["text"] == f"a {row['id']}? " and row["replies"] == list("wxyz") and row["right"] == line["wanted"] == int(row["id"]) % 4
        context = engine.tokenizer(row["text"])["input_ids"]
        nats = [sum(engine.score(context + engine.tokenizer(reply)["input_ids"], len(context), "small")) for reply in row["replies"]]
        assert line["adapter"]["loglikelihoods_nats"] == pytest.approx(nats, abs=1e-3)
        best = float(max(range(4), key=nats.__getitem__) == row["right"])
        assert line["adapter"]["scores"] == {"correct_loglikelihood": [best], "correct_loglikelihood_per_character": [best]}
    told = found["tasks"]["next"]["systems"]["adapter"]["correct_loglikelihood"]
    assert told["mean"] == pytest.approx(sum(line["adapter"]["scores"]["correct_loglikelihood"][0] for line in lines) / 6, abs=1e-6)


def test_a_text_too_long_for_the_model_loses_its_begin_not_the_reply(plan):
    engine = engine_of(plan)
    asker = Asker(plan.recipe, "next", plan.recipe.evaluate.tasks["next"], engine, engine.tokenizer, None)
    context, reply = (engine.tokenizer(text)["input_ids"] for text in ("b" * 100, "wxyz"))
    whole = [*context, *reply][-asker.window :]
    asked = [{"text": "b" * 100, "replies": ["wxyz"]}, {"text": "b", "replies": ["w" * 100]}]
    ((long,),), ((wide,),) = (likelihoods(engine, [behind(engine.tokenizer, row, asker.window)], None) for row in asked)
    assert long[0] == pytest.approx(sum(engine.score(whole, len(whole) - len(reply))))
    assert wide[0] == pytest.approx(sum(engine.score(engine.tokenizer("w" * asker.window)["input_ids"], 1)))


def test_perplexity_is_that_of_the_engine(plan, found):
    engine = engine_of(plan)
    nats = tokens = 0
    for row in read_jsonl(plan.artifact("questions").path / "texts.jsonl"):
        ids = engine.tokenizer(row["text"])["input_ids"]
        for at in range(0, len(ids), 32):
            if len(window := ids[at : at + 32]) > 1:
                scores = engine.score(window, 1, "small")
                nats, tokens = nats - sum(scores), tokens + len(scores)
    told = found["tasks"]["texts"]["systems"]["adapter"]["perplexity"]
    assert told["tokens"] == tokens and told["mean"] == pytest.approx(exp(nats / tokens), rel=1e-5)
    assert told["mean"] != found["tasks"]["texts"]["systems"]["base"]["perplexity"]["mean"]


def test_the_report_the_store_and_the_counts_say_them(plan, found):
    report = (plan.artifact("evaluate").path / "report.txt").read_text()
    for words in ("reading: choice on 6 rows", "rougeL", "bits_per_character", "difference", "always-call"):
        assert words in report
    counts = plan.artifact("evaluate").counts
    assert counts["tasks"]["texts"]["perplexity"] == pytest.approx(found["tasks"]["texts"]["systems"]["adapter"]["perplexity"]["mean"], abs=1e-5)
    assert AdapterStore(plan.served).get("small").notes["evaluation"]["reading correct"] == counts["tasks"]["reading"]["correct"]


def test_the_encoder_is_an_input_and_its_score_one_of_the_others(plan, found):
    chat, lines = found["tasks"]["chat"], list(read_jsonl(plan.artifact("evaluate").path / "predictions-chat.jsonl"))
    encoder = Encoder(str(plan.root / "encoder"), None, 4, "cpu")
    for system in ("adapter", "base"):
        near = encoder.similarity([line[system]["answers"][0] for line in lines], [line["wanted"] for line in lines])
        assert [line[system]["scores"]["semantic"][0] for line in lines] == pytest.approx(near)
        assert chat["systems"][system]["semantic"]["mean"] == pytest.approx(sum(near) / len(near), abs=1e-6)
    assert "difference" in chat["paired"]["semantic"] and "semantic" in (plan.artifact("evaluate").path / "report.txt").read_text()
    inputs = plan.artifact("evaluate").manifest["inputs"]["semantic"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(inputs)
    before = plan.resolve("evaluate").fingerprint
    config = plan.root / "encoder/config.json"
    said = config.read_text()
    config.write_text(said + " ")
    assert plan.resolve("evaluate").fingerprint != before and plan.resolve("sft").artifact
    config.write_text(said)


def test_the_page_of_the_run_shows_what_was_asked_said_and_wanted(plan):
    tasks = {t.name: t for t in gather(plan).evaluation.tasks}
    assert list(tasks) == ["reading", "next", "chat", "maths", "texts"] and "answers of base unreadable" in tasks["reading"].note
    shown = {name: [*t.best, *t.worst] for name, t in tasks.items()}
    assert len(shown["chat"]) > 0 and len(shown["texts"]) == 3
    assert shown["next"]
    for answer in [a for name in ("reading", "next", "chat", "maths") for a in shown[name]]:
        sides = dict(answer.sides)
        assert list(sides) == ["prompt", "adapter’s answer", "wanted", "base’s answer"] and sides["prompt"] and sides["wanted"]
    assert all(answer.right == (dict(answer.sides)["adapter’s answer"] == dict(answer.sides)["wanted"]) for answer in shown["next"])
    for answer in shown["texts"]:
        assert "nats a token, base" in answer.judged and answer.sides[0][1].startswith("abc")


def test_every_figure_is_one_of_the_table_that_is_tracked(found):
    figures = list(stage._figures(found))
    tasks = {(task, system, metric): value for task, system, metric, value, *_ in figures}
    assert len(tasks) == len(figures) and all(isinstance(value, float) for value in tasks.values())
    assert tasks["chat", "base", "rougeL"] == found["tasks"]["chat"]["systems"]["base"]["rougeL"]["mean"]
    assert tasks["chat", "adapter less base", "rougeL"] == found["tasks"]["chat"]["paired"]["rougeL"]["difference"]
    assert tasks["", "adapter", "strict f1"] == found["scores"]["adapter"]["strict"]["f1"]
    assert tasks["", "adapter less base", "accuracy"] == found["paired"]["accuracy"]["difference"]
    assert all(low - 1e-6 <= value <= high + 1e-6 for _, system, metric, value, low, high in figures if (system, metric) == ("adapter", "accuracy"))


def test_repeats_by_other_seeds_have_a_standard_deviation(tmp_path):
    plan = plan_with(tmp_path, "temperature = 1.5\nrepeats = 3")
    told = json.loads((plan.artifact("evaluate").path / "metrics.json").read_text())["tasks"]
    assert (
        "std" in told["chat"]["systems"]["base"]["rouge1"]
        and "std" in told["chat"]["systems"]["base"]["bleu"]
        and "std" not in told["texts"]["systems"]["base"]["nats_per_token"]
    )
    line = next(read_jsonl(plan.artifact("evaluate").path / "predictions-chat.jsonl"))
    assert len(set(line["base"]["answers"])) == 3 == len(line["base"]["scores"]["rouge1"])
    assert "± between repeats" in (plan.artifact("evaluate").path / "report.txt").read_text()


def test_a_sweep_reads_the_same_figures_and_each_rows_scores(plan, found):
    metrics, found = found, arms.read(plan.artifact("evaluate"))
    assert {name: (t.kind, t.main) for name, t in found.items()} == {
        CALLS: ("calls", "F1"),
        "reading": ("choice", "correct"),
        "next": ("cloze", "correct_loglikelihood"),
        "chat": ("generation", "rougeL"),
        "maths": ("exact", "correct"),
        "texts": ("perplexity", "perplexity"),
    }
    assert found[CALLS].means == {"F1": metrics["scores"]["adapter"]["strict"]["f1"], "accuracy": metrics["scores"]["adapter"]["accuracy"]}
    for name in ("reading", "next", "chat", "maths", "texts"):
        systems = metrics["tasks"][name]["systems"]
        for own, system in ((found[name].means, "adapter"), (found[name].base, "base")):
            assert own == {metric: told["mean"] for metric, told in systems[system].items()}
        assert found[name].rows
        for metric, rows in found[name].rows.items():
            assert len(rows) == metrics["tasks"][name]["rows"] and fmean(rows.values()) == pytest.approx(found[name].means[metric], abs=1e-4)
    assert fmean(found[CALLS].rows["accuracy"].values()) == pytest.approx(found[CALLS].means["accuracy"])
