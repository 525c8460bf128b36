"""The stage on real Ray actors against a server with books of its own: reproducible, never paid twice, ended in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest

from graft.core.errors import CredentialError, ServeError
from graft.core.rows import read_jsonl
from graft.core.stages import Plan
from graft.data.api.caller import check_credentials
from graft.data.augment import stage
from graft.data.augment.outlook import outlook

from ..api.faulty import FaultyEndpoint

CONFIGS = Path(__file__).parents[3] / "configs"
PRICES = {"gpt-4o-mini": {"input": 0.15, "cached_input": 0.075, "output": 0.6}}
PRICED = "api.prices={'gpt-4o-mini' = {input = 0.15, cached_input = 0.075, output = 0.6}}"


def plan(root, *overrides):
    if not (root / "configs").exists():
        shutil.copytree(CONFIGS, root / "configs")
    return Plan(root / "configs/recipes/image-intent-tiny.toml", ("augment.rows_per_class=60", *overrides), root)  # later overrides win


def fill(p):
    stage.run(p.resolve("augment"))
    return p.artifact("augment")


@pytest.fixture
def server(monkeypatch):
    with FaultyEndpoint(prices=PRICES, jitter_s=0.05) as s:
        monkeypatch.setenv("OPENAI_BASE_URL", s.base_url)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        yield s


def test_rows_join_seeds_and_nothing_is_asked_twice(ray_local, server, tmp_path):
    p = plan(tmp_path, "augment.rows_per_class=130", PRICED)
    artifact = fill(p)
    rows = list(read_jsonl(artifact.path / "rows.jsonl"))
    counts = artifact.counts
    assert counts["rows"] == {"call": 130, "text": 130} and len(rows) == len({r["id"] for r in rows}) == 260
    assert len({r["messages"][0]["content"] for r in rows}) == 260 and counts["stopped"] == {"call": "target", "text": "target"}
    by_id = {r["id"]: r for r in rows}
    assert all(by_id[r["parent"]]["family"] == r["family"] for r in rows if r["parent"] in by_id)
    requests = list(read_jsonl(artifact.path / "requests.jsonl"))
    assert sum(r["rewrites"] for r in requests) == counts["rewrites"] == counts["accepted"] + counts["rejected"]
    assert len(list(read_jsonl(artifact.path / "rejected.jsonl"))) == counts["rejected"] and counts["accepted"] == 260 - counts["seeds"]
    assert {r["request"] for r in rows if r["request"]} <= {r["request"] for r in requests}
    curve = list(read_jsonl(artifact.path / "metrics.jsonl"))
    assert (
        curve[-1]["rows"] == 260
        and 0 < curve[-1]["distinct_2"] < curve[0]["distinct_2"]
        and (artifact.path / "diversity.png").read_bytes()[:4] == b"\x89PNG"
    )
    truth = server.report()
    assert truth["requests"] == truth["unique"] == counts["requests"] == counts["sent"]
    cost = artifact.manifest["cost"]
    assert cost["usd_of_run"] == pytest.approx(truth["billed_usd"]) and cost["usd_per_accepted_row"] == pytest.approx(
        truth["billed_usd"] / counts["accepted"]
    )

    digest = artifact.digest
    shutil.rmtree(artifact.path)
    again = fill(p)
    assert again.digest == digest and server.report()["requests"] == truth["requests"], "the ledger answered everything"
    assert again.manifest["cost"]["usd_of_run"] == 0 and again.manifest["cost"]["usd_of_recipe"] == pytest.approx(truth["billed_usd"])
    for file in (tmp_path / "data_shards").glob("ledger.*"):
        file.unlink()
    shutil.rmtree(again.path)
    assert fill(p).digest == digest and server.report()["requests"] == 2 * truth["requests"], "asked again, the same rows"


def test_an_added_seed_asks_only_for_itself(ray_local, server, tmp_path):
    p = plan(tmp_path, "augment.rows_per_seed=6", "augment.novelty=1")
    fill(p)
    before = set(server.report()["by_key"])
    seeds = p.beside(p.recipe.augment.seeds)
    added = {"messages": [{"role": "user", "content": "鯨魚會唱歌嗎"}, {"role": "assistant", "content": "會，大翅鯨的歌可以傳得很遠。"}]}
    with seeds.open("a", encoding="utf-8") as f:
        f.write(json.dumps(added, ensure_ascii=False) + "\n")
    artifact = fill(Plan(p.path, p.overrides, p.root))
    new = set(server.report()["by_key"]) - before
    families = {r["request"]: r["family"] for r in read_jsonl(artifact.path / "requests.jsonl")}
    assert new and {families[key] for key in new} == {"text-15"} and artifact.counts["sent"] == len(new)


def test_a_spent_budget_ends_the_run_with_what_it_has_and_a_raised_one_goes_on(ray_local, server, tmp_path, capsys):
    fill(plan(tmp_path, PRICED, "api.in_flight=8", "api.budget_usd=0.004"))
    poor = plan(tmp_path, PRICED, "api.in_flight=8", "api.budget_usd=0.004").artifact("augment")
    assert "budget" in poor.counts["stopped"].values() and sum(poor.counts["rows"].values()) < 120
    assert server.report()["billed_usd"] <= 0.004 and "raise api.budget_usd" in capsys.readouterr().out
    spent = server.report()["requests"]
    p = plan(tmp_path, PRICED, "api.in_flight=8", "api.budget_usd=1.0")
    lines = "\n".join(outlook(p))
    assert re.search(r"about \d+ more requests", lines) and "covers it" in lines and "earlier answers" in lines
    assert server.report()["requests"] == spent, "a dry run sends nothing"
    rich = fill(p)
    truth = server.report()
    assert rich.counts["rows"] == {"call": 60, "text": 60} and truth["billed_twice"] == 0 and truth["requests"] == truth["unique"]


def test_a_dry_run_before_anything_was_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    said = "\n".join(outlook(plan(tmp_path)))
    assert "about 23 more requests" in said and "cost: unknown" in said
    priced = "\n".join(outlook(plan(tmp_path, PRICED, "api.budget_usd=0.0001")))
    assert "at the very worst" in priced and "ends the run before its target" in priced


def test_saturation_and_rounds_are_said(ray_local, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    short = fill(plan(tmp_path, "augment.rows_per_class=400", "augment.max_rounds=1"))
    assert short.counts["stopped"] == {"call": "rounds", "text": "rounds"} and short.counts["rounds"] == 1
    same = fill(plan(tmp_path, "augment.novelty=0.01", "augment.rows_per_class=40"))
    assert same.counts["stopped"] == {"call": "saturation", "text": "saturation"} and same.counts["rows"]["call"] < 40
    assert "repeat themselves" in capsys.readouterr().out


def test_an_outage_ends_the_run_and_not_the_families(ray_local, server, tmp_path):
    server.control(faults={"429": 1.0}, retry_after_s=0.01)
    p = plan(tmp_path, "api.max_retries=1")
    with pytest.raises(ServeError, match="no request of round 1 was answered: no answer after 2 attempts: 429"):
        fill(p)
    assert p.resolve("augment").artifact is None
    server.control(faults={})
    assert fill(p).counts["rows"] == {"call": 60, "text": 60}


def test_the_grammars_answers_are_not_the_servers(ray_local, server, tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        without.delenv("OPENAI_BASE_URL")
        assert fill(plan(tmp_path)).counts["sent"] > 0
    asked = fill(plan(tmp_path)).counts["sent"]
    assert asked == server.report()["unique"] > 0
    assert {f.name for f in (tmp_path / "data_shards").glob("*.sqlite")} == {"embedded.sqlite", "ledger.sqlite"}


def test_a_remote_server_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(CredentialError, match=r"api\.example\.com.*OPENAI_API_KEY"):
        check_credentials("https://api.example.com/v1")
    check_credentials("http://127.0.0.1:1/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk")
    check_credentials("https://api.example.com/v1")
