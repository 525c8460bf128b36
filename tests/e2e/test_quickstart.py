"""The README's first command, as a stranger runs it: a copy of the tree, no `../shared`, no key, no GPU."""

import json
import signal
import time
import urllib.request

import openai
import pytest

from graft.core.artifact import Artifact
from graft.core.calls import parse_answer
from graft.core.metrics import read_metrics
from graft.core.stages import Plan, lineage
from graft.core.store import AdapterStore
from graft.data import grammar

from ..ports import free_port
from .tree import RECIPE, Tree

LIMIT_S = 480  # the eight minutes on two cores


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    tree = Tree(tmp_path_factory.mktemp("quickstart"))
    tree.seconds = tree.run("bash", "launch/quickstart.sh", timeout_s=900)
    return tree


@pytest.fixture
def plan(quickstart):
    return Plan(quickstart.path / RECIPE, (), quickstart.path)


def test_every_stage_is_complete_whole_and_in_time(quickstart, plan):
    for name in plan.stages:
        artifact = plan.artifact(name)
        artifact.verify()
        assert (artifact.path.parent / "current").resolve() == artifact.path
    assert not list(quickstart.path.glob("*/*/*/.*draft*"))
    quickstart.none_alive()
    assert quickstart.seconds <= LIMIT_S


def test_the_adapter_beats_both_constants_on_families_it_never_saw(plan):
    metrics = json.loads((plan.artifact("evaluate").path / "metrics.json").read_text())
    scores = metrics["scores"]
    ours = scores["adapter"]["strict"]["f1"]
    assert ours > max(scores["always-call"]["strict"]["f1"], scores["always-text"]["strict"]["f1"]) + 0.05
    assert 0.64 < scores["always-call"]["strict"]["f1"] < 0.72 and scores["always-text"]["strict"]["f1"] == 0
    assert sum(sum(row.values()) for row in metrics["confusion"].values()) == metrics["rows"] == len(rows_of(plan, "test"))
    files = {"predictions.jsonl", "failures.jsonl", "confusion.csv", "confusion.png", "report.txt"}
    assert files <= set(plan.artifact("evaluate").manifest["files"])


def rows_of(plan, split):
    return [json.loads(line) for line in (plan.artifact("prepare").path / "rows" / f"{split}.jsonl").read_text().splitlines()]


def test_no_test_family_leaks_into_any_training_text(plan):
    test, train = rows_of(plan, "test"), rows_of(plan, "train") + rows_of(plan, "validation")
    held_out = {r["family"] for r in test}
    assert held_out.isdisjoint({r["family"] for r in train})
    parent = {r["id"]: r["parent"] for r in test + train}
    family = {r["id"]: r["family"] for r in test + train}
    assert all(family[p] == family[i] for i, p in parent.items() if p), "a row stays in its seed's family"
    forms = {grammar.recognise(r["messages"][0]["content"], r["label"]) for r in test}
    assert len(forms) == len(held_out) and None not in forms
    sentences = {r["messages"][0]["content"] for r in test}
    for corpus in sorted((plan.artifact("prepare").path / "corpora").glob("*.jsonl")):
        for line in corpus.read_text().splitlines():
            text = json.loads(line)["text"]
            assert not any(s in text for s in sentences)
            if corpus.stem != "prose":
                for sentence in grammar.sentences(text):
                    assert not any(p.fullmatch(sentence) for f in forms for p in f.patterns), sentence


def test_training_learned_and_the_merge_is_faithful(plan):
    for stage in ("base", "cpt", "sft"):
        losses = [m["loss"] for m in read_metrics(plan.artifact(stage).path / "metrics.jsonl")]
        assert sum(losses[-5:]) < sum(losses[:5])
    merged = plan.artifact("merge").counts
    assert merged["logit_difference_max"] < 1e-3 < merged["logit_std"]
    frozen = sum(p.stat().st_size for p in plan.artifact("merge").path.glob("*.safetensors"))
    for checkpoint in (plan.root / plan.artifact("sft").counts["checkpoints"]).glob("step-*"):
        assert sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()) < frozen


def test_the_server_answered_with_a_call(plan):
    reply = json.loads((plan.artifact("serve").path / "reply.json").read_text())
    assert reply["model"] == AdapterStore(plan.served).names()["image-intent-tiny"]
    assert parse_answer(reply["reply"], "generate_image", "prompt").kind == "call"


def test_a_prediction_from_the_command_line_is_what_the_server_answered(quickstart, plan):
    reply = json.loads((plan.artifact("serve").path / "reply.json").read_text())
    quickstart.run(*quickstart.graft("predict", RECIPE, reply["prompt"]))
    assert f"{reply['reply']}\n  call generate_image " in quickstart.said()


def test_lineage_reaches_from_the_reply_to_the_ledger(plan):
    kinds = [a.manifest["kind"] for _, a in lineage(plan.artifact("serve").path)]
    assert set(kinds) == set(plan.stages) - {"evaluate"} and kinds[0] == "serve"
    augment = plan.artifact("augment")
    requests = [json.loads(line) for line in (augment.path / "requests.jsonl").read_text().splitlines()]
    assert len(requests) == augment.counts["requests"] == len({r["request"] for r in requests})
    assert augment.counts["rows"] == {"call": 600, "text": 600}


def test_the_report_tells_all_of_it(quickstart, plan):
    quickstart.run(*quickstart.graft("report", RECIPE))
    page = (plan.home("checkpoints") / "report.html").read_text(encoding="utf-8")
    assert f"{len(plan.stages)} of {len(plan.stages)} stages are complete" in page and page.count('<article class="prediction') >= 10
    assert f"F1 {plan.artifact('evaluate').counts['strict_f1']:.3f} on" in page and all(f"<h3>{s}</h3>" in page for s in ("base", "cpt", "sft"))


def test_a_second_run_skips_everything_in_seconds(quickstart, plan):
    before = {s: plan.artifact(s).manifest["created_unix_s"] for s in plan.stages}
    began = time.monotonic()
    quickstart.run(*quickstart.graft("run", RECIPE))
    assert time.monotonic() - began < 10
    assert {s: plan.artifact(s).manifest["created_unix_s"] for s in plan.stages} == before


def test_from_makes_that_stage_again_and_to_the_same_result(quickstart, plan):
    before = plan.artifact("evaluate")
    digest = before.digest_of_files("predictions.jsonl")
    quickstart.run(*quickstart.graft("run", RECIPE, "--from", "evaluate", "--until", "evaluate"))
    after = Artifact.open(before.path)
    assert after.manifest["created_unix_s"] > before.manifest["created_unix_s"]
    assert after.digest_of_files("predictions.jsonl") == digest


def test_the_base_can_be_asked_for_alone(quickstart):
    assert quickstart.run(*quickstart.graft("base", "build", RECIPE)) < 10


def test_keep_leaves_the_server_up_until_it_is_interrupted(quickstart, plan):
    port = free_port()
    process = quickstart.start(*quickstart.graft("run", RECIPE, "--keep", "--set", f"serve.port={port}"))
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5)
            break
        except OSError:
            time.sleep(0.5)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        assert {m.id for m in client.models.list()} == {"image-intent-tiny", "base"}
        rows = [r for r in rows_of(plan, "test") if r["label"] == "text"][:8]
        predictions = {p["id"]: p for p in map(json.loads, (plan.artifact("evaluate").path / "predictions.jsonl").read_text().splitlines())}
        for row in rows:
            answer = client.chat.completions.create(model="image-intent-tiny", messages=row["messages"][:1], temperature=0, max_tokens=64)
            assert answer.choices[0].message.content == predictions[row["id"]]["answer"], "served as it was evaluated"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    quickstart.none_alive(within_s=60)
