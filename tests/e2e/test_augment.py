"""`graft augment` as a user runs it, killed, doubled and grown: what was paid is never paid again, nothing is lost."""

import json
import os
import random
import signal
import sqlite3
import time

import pytest

from graft.core.rows import read_jsonl
from graft.core.stages import Plan

from ..data.api.faulty import FaultyEndpoint
from .kills import RAY_AGENTS
from .tree import RECIPE, Tree

BIG = ["augment.rewrites_per_call=1", "augment.novelty=1", "api.in_flight=16"]


def arguments(overrides):
    return [a for o in overrides for a in ("--set", o)]


def environment(server):
    return {"OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": "planted"}


def attempts(tree, state):
    with sqlite3.connect(f"file:{tree.path}/data_shards/ledger.sqlite?mode=ro", uri=True) as db:
        return db.execute("SELECT count(*) FROM attempts WHERE state = ?", (state,)).fetchone()[0]


def asked(server):
    return server.report(by_key=False)["requests"]


def killed_and_resumed(tmp_path, rows, kills):
    """One run, its driver killed at random points of the asking; compared with an undisturbed one."""
    overrides = [*BIG, f"augment.rows_per_class={rows}"]
    rng = random.Random(kills)
    with FaultyEndpoint(latency_s=0.15, jitter_s=0.1, log=tmp_path / "log.jsonl") as server:
        tree = Tree(tmp_path / "killed", environment(server))
        command = tree.graft("augment", RECIPE, *arguments(overrides))
        in_flight, at, share = 0, [], 2 * rows / (kills + 1)
        for _ in range(kills):
            target = asked(server) + rng.randint(1, int(1.6 * share))  # requests seen when the kill comes
            process = tree.start(*command)
            while asked(server) <= target:
                assert process.poll() is None, tree.said()[-3000:]
                time.sleep(0.02)
            time.sleep(rng.random() * 0.1)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            tree.none_alive(within_s=60, but=RAY_AGENTS)
            in_flight += attempts(tree, "open")
            at.append(asked(server))
        tree.run(*command)
        plan = Plan(tree.path / RECIPE, tuple(overrides), tree.path)
        truth, killed = server.report(), plan.latest("augment")
        killed.verify()
        assert killed.counts["rows"] == {"call": rows, "text": rows}
        assert truth["requests"] <= truth["unique"] + in_flight
        ids = [r["id"] for r in read_jsonl(killed.path / "rows.jsonl")]
        with sqlite3.connect(tree.path / "data_shards/ledger.sqlite") as db:
            kept = {k for (k,) in db.execute("SELECT key FROM answers")}
        assert {r["request"] for r in read_jsonl(killed.path / "requests.jsonl")} <= kept and len(ids) == len(set(ids)) == 2 * rows
        calm = Tree(tmp_path / "calm", environment(server))
        calm.run(*calm.graft("augment", RECIPE, *arguments(overrides)))
        undisturbed = Plan(calm.path / RECIPE, tuple(overrides), calm.path).latest("augment")
        assert killed.digest == undisturbed.digest, "the same rows, rejects and requests, byte for byte"
    print(
        f"kills {kills} at {at} requests; seen {truth['requests']} <= unique {truth['unique']} + in flight at kills {in_flight}; lost rows 0, digest equal"
    )


def test_killed_while_asking_it_pays_for_nothing_twice(tmp_path):
    killed_and_resumed(tmp_path, rows=120, kills=2)


@pytest.mark.campaign
def test_killed_fifty_times_in_2000_requests(tmp_path):
    killed_and_resumed(tmp_path, rows=1020, kills=50)


def test_two_at_once_share_what_they_pay_for(tmp_path):
    with FaultyEndpoint(latency_s=0.1, jitter_s=0.1) as server:
        tree = Tree(tmp_path, environment(server))
        twin = tree.path / RECIPE.replace("tiny", "twin")
        twin.write_text((tree.path / RECIPE).read_text().replace('name = "image-intent-tiny"', 'name = "image-intent-twin"'))
        overrides = [*BIG, "augment.rows_per_class=150"]
        runs = [tree.start(*tree.graft("augment", r, *arguments(overrides))) for r in (RECIPE, str(twin))]
        assert [r.wait(240) for r in runs] == [0, 0], tree.said()[-3000:]
        made = [Plan(p, tuple(overrides), tree.path).latest("augment") for p in (tree.path / RECIPE, twin)]
        truth = server.report()
        assert truth["billed_twice"] == 0 and truth["requests"] == truth["unique"]
        assert made[0].digest == made[1].digest and made[0].counts["rows"] == {"call": 150, "text": 150}
        assert attempts(tree, "paid") == truth["unique"] and attempts(tree, "open") == 0
        tree.none_alive(within_s=30)
    print(f"two runs, {truth['requests']} requests, {truth['billed_twice']} paid twice")


def write_seeds(tree, count):
    with (tree.path / "configs/recipes/image-intent/seeds.jsonl").open("w", encoding="utf-8") as f:
        for i in range(count):
            call = i % 2 == 0
            user = f"請畫第{i}號風景" if call else f"第{i}號房間在哪裡"
            answer = f'call("generate_image", {{"prompt": "第{i}號風景"}})' if call else f"在第{i}層樓"
            f.write(json.dumps({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}) + "\n")


def grown(tmp_path, seeds):
    """`seeds` finished ones, then one more: what is sent for it."""
    with FaultyEndpoint(log=tmp_path / "log.jsonl") as server:
        tree = Tree(tmp_path, environment(server))
        overrides = ["augment.rows_per_seed=3", "augment.rewrites_per_call=2", "augment.novelty=1", "api.in_flight=256"]
        write_seeds(tree, seeds)
        first_s = tree.run(*tree.graft("augment", RECIPE, *arguments(overrides)), timeout_s=900)
        before = set(server.report()["by_key"])
        assert len(before) >= seeds
        write_seeds(tree, seeds + 1)
        second_s = tree.run(*tree.graft("augment", RECIPE, *arguments(overrides)), timeout_s=900)
        truth = server.report()
        new = set(truth["by_key"]) - before
        artifact = Plan(tree.path / RECIPE, tuple(overrides), tree.path).latest("augment")
        families = {r["request"]: r["family"] for r in read_jsonl(artifact.path / "requests.jsonl")}
        added = next(f for f in set(families.values()) if int(f.split("-")[1]) == seeds // 2)
        assert new and {families[k] for k in new} == {added} and truth["requests"] == truth["unique"]
    print(f"{seeds} seeds, {len(before)} requests in {first_s:.0f} s; one seed more: {len(new)} sent, all of its own, in {second_s:.0f} s")


def test_one_seed_more_asks_for_itself_alone(tmp_path):
    grown(tmp_path, 400)


@pytest.mark.campaign
def test_one_seed_more_than_10000(tmp_path):
    grown(tmp_path, 10_000)
