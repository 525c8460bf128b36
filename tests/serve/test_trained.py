"""From a training run to the server by themselves: what was trained is what answers, and its evaluation is the offline one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from graft.cli import main
from graft.core.errors import ConfigError
from graft.core.store import AdapterStore
from graft.evaluate import stage
from graft.serve.api import build
from graft.serve.app import spec_of
from graft.serve.probe import other_than, overridden
from graft.serve.runner import Runner

from ..train.small import small_plan, train
from .conftest import Listening


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Trained and evaluated."""
    plan = small_plan(tmp_path_factory.mktemp("trained"), "evaluate.max_new_tokens=12", "sft.lr=0.02", "sft.epochs=6")
    train(plan, 1)
    stage.run(plan.resolve("evaluate"))
    return plan


def test_the_evaluation_through_the_server_equals_the_offline_one(plan, tmp_path, capsys):
    """By its version: the recipe's name is left to another one here, which the gate refuses."""
    store = AdapterStore(plan.served)
    own = store.get("small")
    shutil.copytree(own.folder, tmp_path / "other", ignore=shutil.ignore_patterns("parity.json"))
    store.add("small", tmp_path / "other", {})
    spec = spec_of(plan)
    assert spec.ready == (own.id,) == (spec.own,) and spec.store == str(plan.served)
    words = ["evaluate", str(plan.path), "--workspace", str(plan.root), *(w for o in plan.overrides for w in ("--set", o)), "--server"]
    with Listening(build(Runner(spec))) as url:
        assert main([*words, url]) == 0
    assert "3 of 3 answers are equal to the letter" in capsys.readouterr().out
    predictions = plan.artifact("evaluate").path / "predictions.jsonl"
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len({line["answer"] for line in lines}) > 1 and all(line["answer"] for line in lines)
    assert main([*words, url]) == 2 and "did not answer" in capsys.readouterr().err
    store.alias("small", own.id)


def test_a_prediction_from_the_command_line_is_the_evaluations(plan, capsys):
    lines = [json.loads(line) for line in (plan.artifact("evaluate").path / "predictions.jsonl").read_text().splitlines()]
    words = ["predict", str(plan.path), "--workspace", str(plan.root), *(w for o in plan.overrides for w in ("--set", o)), "--json"]
    assert main([*words, *(line["user"] for line in lines)]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(s["reply"], s["parsed"]["kind"]) for s in said] == [(line["answer"], line["predicted"]) for line in lines]


def test_an_override_says_why(plan, capsys):
    words = ["serve", str(plan.path), "--workspace", str(plan.root), *(w for o in plan.overrides for w in ("--set", o)), "--override"]
    assert main([*words, " "]) == 2 and "give a reason" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="here is none"):
        overridden(dataclasses.replace(spec_of(plan), store=None), "why")


def test_lineage_and_evaluation_stand_beside_the_model(plan):
    with TestClient(build(Runner(spec_of(plan))), base_url="http://localhost") as client:
        while client.get("/ready").json()["status"] == "loading":
            time.sleep(0.02)
        card = client.get("/v1/models/small").json()
    sft = plan.artifact("sft")
    assert card["verified"] and card["lineage"]["digest"] == sft.digest and card["lineage"]["counts"]["steps"] == 21
    assert card["metrics"]["rows"] == 3 and card["version"] == AdapterStore(Path(plan.served)).get("small").id


def test_what_a_name_stands_for_outlives_a_restart_and_an_evaluation(plan, tmp_path):
    store, trained = AdapterStore(Path(plan.served)), AdapterStore(Path(plan.served)).get("small")
    assert other_than(spec_of(plan), "small") == []
    shutil.copytree(trained.folder, tmp_path / "other")
    (tmp_path / "other/probes.json").write_text("[]")
    other = store.add("small", tmp_path / "other", {})
    assert store.publish("small", plan.artifact("sft")) == trained and spec_of(plan).ready == (trained.id,)
    assert store.get("small").id == other.id != trained.id, "whoever set it back would find it moved"
    line = f'small answers as {other.id}, not as this recipe\'s {trained.id}: POST /admin/alias {{"alias": "small", "model": "{trained.id}"}}'
    assert other_than(spec_of(plan), "small") == [f"{line} changes that"]
    (store.root / "small/alias").unlink()  # published, and cut short
    spec_of(plan)
    assert store.get("small") == trained
