"""A person's decisions through the whole stage: rejected rows are replaced, kept in the artifact, and only that is asked for."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from graft import cli
from graft.core.rows import read_jsonl
from graft.core.stages import Plan

from ..api.faulty import FaultyEndpoint

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPE = "configs/recipes/image-intent-tiny.toml"
TARGET = 52
BY_A_PERSON = "rejected by a person"


@pytest.fixture
def graft(tmp_path, monkeypatch):
    """graft(verb) runs the command line in a workspace of its own."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    arguments = [str(tmp_path / RECIPE), "--set", f"augment.rows_per_class={TARGET}", "--workspace", str(tmp_path)]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return lambda verb: cli.main([verb, *arguments])


def made(root):
    """(artifact, files by name) of the last run."""
    artifact = Plan(root / RECIPE, (), root).latest("augment")
    artifact.verify()
    return artifact, {name: list(read_jsonl(artifact.path / f"{name}.jsonl")) for name in ("rows", "rejected", "requests")}


def decide(path, rows, decision):
    with path.open("a") as f:
        f.writelines(json.dumps({"id": row["id"], "decision": decision}) + "\n" for row in rows)


def test_what_a_person_rejects_is_replaced(ray_local, graft, tmp_path, monkeypatch):
    with FaultyEndpoint(jitter_s=0.02) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        assert graft("augment") == 0
        artifact, before = made(tmp_path)
        asked = set(server.report()["by_key"])
        assert artifact.counts["rows"] == {"call": TARGET, "text": TARGET} and "review.jsonl" not in artifact.manifest["files"]
        spare = sum(r["reason"] == "surplus" and r["label"] == "call" for r in before["rejected"])
        new = [r for r in before["rows"] if r["request"] and r["label"] == "call"]
        refused, kept = new[-3:], new[:1]
        assert spare < len(refused), "what was beyond the target takes their place first, and is not enough"
        review = Plan(tmp_path / RECIPE, (), tmp_path).review_file
        decide(review, refused, "reject")
        decide(review, kept, "reject")
        decide(review, kept, "keep")  # the last word counts

        assert graft("augment") == 0
        artifact, after = made(tmp_path)
        extra = set(server.report()["by_key"]) - asked
        assert server.report()["requests"] == len(asked) + len(extra), "nothing was asked twice"
    assert artifact.counts["rows"] == {"call": TARGET, "text": TARGET}, "the target is full again"
    rows, gone = {r["id"] for r in after["rows"]}, {r["id"]: r["reason"] for r in after["rejected"]}
    assert {i for i, reason in gone.items() if reason == BY_A_PERSON} == {r["id"] for r in refused} and kept[0]["id"] in rows
    assert artifact.counts["reasons"][BY_A_PERSON] == 3 and rows.isdisjoint(gone)
    replacements = [r for r in after["rows"] if r["id"] not in {b["id"] for b in before["rows"]}]
    assert len(replacements) >= 3 and all(r["label"] == "call" for r in replacements)
    assert [r for r in after["rows"] if r["label"] == "text"] == [r for r in before["rows"] if r["label"] == "text"]
    sent = [r for r in after["requests"] if r["request"] in extra]
    assert {r["request"] for r in after["requests"]} == asked | extra and 1 <= len(sent) == len(extra) <= 3
    assert all(r["label"] == "call" for r in sent) and {r["request"] for r in replacements} & extra
    assert (artifact.path / "review.jsonl").read_bytes() == review.read_bytes() and "review.jsonl" in artifact.manifest["files"]
    counts = Counter(r["label"] for r in after["rows"])
    assert sum(r["accepted"] for r in after["requests"]) == artifact.counts["accepted"] == counts.total() - artifact.counts["seeds"]
    print(f"rejected {len(refused)}, replaced {len(replacements)}, requests sent for it {len(extra)}")


def test_a_review_needs_rows_and_a_terminal(ray_local, graft, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def refused():
        assert graft("review") == 2
        said = capsys.readouterr()
        assert said.out == "" and len(said.err.splitlines()) == 1
        return said.err

    assert "never completed" in refused()
    assert graft("augment") == 0
    capsys.readouterr()
    assert "no terminal" in refused() and not Plan(tmp_path / RECIPE, (), tmp_path).review_file.exists()
