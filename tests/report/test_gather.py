import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from graft.core.errors import ArtifactError
from graft.core.rows import write_jsonl
from graft.core.stages import Plan
from graft.report.gather import gather

from .made import MATRIX, make, metrics, plan_in, predictions


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return gather(make(plan_in(tmp_path_factory.mktemp("made"))))


def states(report):
    return {s.name: s.state for s in report.stages}


def test_the_lineage_is_every_stage_with_what_it_is_made_of(finished):
    by_name = {s.name: s for s in finished.stages}
    assert next(iter(by_name)) == "augment" and set(states(finished).values()) == {"complete"}
    for stage in finished.stages:
        assert all(by_name[parent].fingerprint == fingerprint for parent, fingerprint in stage.parents), stage.name
    assert [n for n, _ in by_name["sft"].parents] == ["merge", "shard-sft"]
    assert by_name["augment"].usd == 0.5 and by_name["augment"].note == "60 call + 55 text rows from 4 seeds, 23 requests"
    assert by_name["sft"].wall_s == 150, "its steps, not the moment in which it was published"


def test_the_verdict_is_the_main_metric(finished):
    assert finished.verdict == "F1 0.725 on 23 held-out rows, above the best constant's 0.650; the base alone 0.725" and finished.good is True


def test_data_is_told_by_class_source_and_reason(finished):
    tables = {t.title: t for t in finished.data}
    assert tables["Rows made, by class"].rows == (("call", "60", "52.2%", "target"), ("text", "55", "47.8%", "saturation"))
    assert tables["Rows dropped, by reason"].rows == (("contaminated", "5", "100.0%"),)
    assert tables["Rows by split and class"].rows[0] == ("train", "40", "30", "70")
    assert tables["Corpora"].rows[0][-1] == "duplicate 2" and tables["Rewrites rejected, by reason"].rows[0][:2] == ("similar", "5")
    assert ("sft", "train", "12", "6", "150", "100", "78.0%") in tables["Shards"].rows
    assert ("sft", "rows", "100.0%") in tables["Training tokens by source"].rows
    for histogram in finished.lengths:
        assert sum(histogram.counts) == 12 and histogram.edges[0] == 1 and histogram.edges[-1] > 30 and "longest 30" in histogram.note
    assert len(finished.lengths) == 3


def test_each_training_stage_has_its_curves(finished):
    assert [t.stage for t in finished.trainings] == ["base", "cpt", "sft"]
    charts = {c.title: c for c in finished.trainings[2].charts}
    assert list(charts) == ["Loss", "Learning rate", "Gradient norm", "Throughput", "MFU", "Peak memory", "Waiting for data"]
    assert [s.name for s in charts["Loss"].series] == ["training", "validation"] and charts["Loss"].series[1].xs == (49, 99, 149, 199, 249, 299)
    assert charts["MFU"].series[0].ys[0] == pytest.approx(31) and charts["Waiting for data"].series[0].ys[0] == pytest.approx(2)
    facts = dict(finished.trainings[2].facts)
    assert facts["MFU"] == "31.0%" and facts["MFU to the measured matmul"] == "41.0%"
    assert facts["peak memory"] == "20.5 GiB, predicted 21.0" and facts["throughput"] == "2k tokens/s"


def test_resumes_and_steps_left_out_are_told(tmp_path):
    report = gather(make(plan_in(tmp_path), metrics=list(metrics(100, resumed_at=40, left_out=7))))
    assert [(m.x, m.kind) for m in report.trainings[0].marks] == [(7, "left out"), (40, "pause")]
    assert "the loss is nan" in report.trainings[0].marks[0].text and "40 s" in report.trainings[0].marks[1].text
    assert report.trainings[0].charts[0].series[0].ys[7] is None


def test_a_validation_is_no_pause_and_not_of_the_pace(tmp_path):
    lines = list(metrics(100, resumed_at=49))
    lines[49]["validation_s"] = 40.0
    training = gather(make(plan_in(tmp_path), metrics=lines)).trainings[0]
    facts = dict(training.facts)
    assert not training.marks and training.steps_s == pytest.approx(90)
    assert facts["throughput"] == "2k tokens/s" and "40 s of it in validations" in facts["time in steps"]


def test_cost_adds_up(finished):
    assert dict(finished.cost.api)["spent by this recipe so far"] == "$ 1.25" and dict(finished.cost.api)["spent in this run"] == "$ 0.5"
    assert finished.cost.gpu and finished.cost.device_hours == 10.5 and finished.cost.devices.rows[0] == ("base", "2", "0:02:30", "3.50")


def test_the_evaluation_has_its_tables_and_ten_of_each_kind(finished):
    e = finished.evaluation
    assert e.confusion.counts == tuple(tuple(row.values()) for row in MATRIX.values()) and e.failures == 6
    assert e.scores.columns == ("", "precision", "recall", "F1", "F1 intent", "accuracy") and [r[0] for r in e.scores.rows][2:] == [
        "always-call",
        "always-text",
        "adapter less base",
    ]
    assert e.scores.rows[0][3] == "0.725 (0.650 to 0.770)" and e.scores.rows[-1][3:5] == ("+0.100 (-0.020 to +0.200)", "")
    assert "3 held-out seed families" in e.scores.note and "families" not in str(e.others)
    assert e.families.rows[0] == ("call-00", "6", "50.0%")
    assert len(e.best) == 10 and all(p.right for p in e.best) and {p.label for p in e.best} == {"call", "text"}
    assert len(e.worst) == 6 and not any(p.right for p in e.worst)
    assert [len(p.answer) for p in e.worst] == sorted((len(p.answer) for p in e.worst), reverse=True)
    assert e.worst[0].wanted == f"wanted of {e.worst[0].id}"


def test_predictions_with_scores_go_by_them(tmp_path):
    scored = [{**p, "score": n / 100} for n, p in enumerate(predictions())]
    e = gather(make(plan_in(tmp_path), predictions=scored)).evaluation
    assert [p.score for p in e.best[:2]] == [0.22, 0.21] and [p.score for p in e.worst[:2]] == [0.0, 0.01]
    assert not {p.id for p in e.best} & {p.id for p in e.worst}


def test_an_evaluation_of_other_measures_is_told_by_their_names(tmp_path):
    plan = make(plan_in(tmp_path), "sft")
    with plan.resolve("evaluate").writing() as draft:
        (draft.path / "metrics.json").write_text(json.dumps({"tasks": {"exam": {"accuracy": 0.5, "rouge": {"l": 0.25}}}}))
    report = gather(plan)
    assert report.evaluation.others.rows == (("tasks.exam.accuracy", "0.5"), ("tasks.exam.rouge.l", "0.25")) and report.evaluation.scores is None


def test_the_tree_is_json(finished):
    assert json.loads(json.dumps(dataclasses.asdict(finished)))["recipe"] == "made"


# ---- what is not complete ---------------------------------------------------------------------------------------------
def test_a_run_that_stopped_says_so_by_stage(tmp_path):
    plan = make(plan_in(tmp_path), "shard-sft")
    write_jsonl(plan.resolve("base").run_directory / "metrics.jsonl", list(metrics(300))[:120])
    with (plan.resolve("base").run_directory / "metrics.jsonl").open("a") as f:
        f.write('{"step": 120, "lo')  # as a kill leaves it
    report = gather(plan)
    found = states(report)
    assert (found["shard-sft"], found["base"], found["cpt"], found["evaluate"]) == ("complete", "under way", "waits", "waits")
    assert report.verdict == "Not complete: base is under way (120 of 300 steps, no artifact yet)" and report.good is None
    (run,) = report.trainings
    assert (run.stage, run.complete, run.steps, run.total_steps) == ("base", False, 120, 300) and report.evaluation is None


def test_a_damaged_artifact_is_named_and_the_rest_is_told(tmp_path):
    plan = make(plan_in(tmp_path))
    (plan.resolve("cpt").directory / "metrics.jsonl").write_text("")
    report = gather(plan)
    found = {s.name: s for s in report.stages}
    assert found["cpt"].state == "damaged" and "metrics.jsonl has 0 bytes" in found["cpt"].note
    assert found["merge"].state == "waits" and "an earlier one" in found["merge"].note and found["base"].state == "complete"


def test_other_keys_are_another_run_and_the_earlier_one_is_named(tmp_path):
    plan = make(plan_in(tmp_path))
    report = gather(Plan(plan.path, ("sft.lr=1e-3",), tmp_path))
    sft = next(s for s in report.stages if s.name == "sft")
    assert sft.state == "missing" and plan.resolve("sft").directory.name in sft.note and report.evaluation is None


def test_what_was_never_run_is_refused(tmp_path):
    plan = plan_in(tmp_path)
    with pytest.raises(ArtifactError, match="'made' was never run"):
        gather(plan)
    assert not (tmp_path / "data_shards").exists()


def test_an_evaluation_that_is_altered_is_one_line(tmp_path):
    plan = make(plan_in(tmp_path))
    file = plan.resolve("evaluate").directory / "metrics.json"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(ArtifactError, match=r"metrics\.json cannot be read"):
        gather(plan)


def test_rows_of_images_are_told(tmp_path):
    plan = plan_in(tmp_path)
    with plan.resolve("augment").writing() as draft:
        write_jsonl(draft.path / "rows.jsonl", [{}])
        draft.counts.update(
            accepted=7, rejected=2, requests=9, reasons={"malformed": 2}, images={"in": 10, "kept": 8, "rejected": {"small": 2}}, stopped="end"
        )
    report = gather(plan)
    assert report.stages[0].note == "7 rows from 8 images, 9 requests" and report.data[0].title == "Answers rejected, by reason"
    assert report.data[1].title == "Images" and ("augment", "rejected: small", "2") in report.data[1].rows


def test_shards_that_are_gone_cost_their_histogram_alone(tmp_path):
    plan = make(plan_in(tmp_path))
    index = plan.resolve("shard-sft").directory / "train" / "index.json"
    index.write_text(index.read_text().replace('"format": 2', '"format": 9'))
    assert len(gather(plan).lengths) == 2


def test_gathering_loads_no_torch_ray_or_transformers(tmp_path):
    make(plan_in(tmp_path))
    program = "import sys; from graft.cli import main; assert main(['report', 'made.toml']) == 0; assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "checkpoints/made/report.html"
