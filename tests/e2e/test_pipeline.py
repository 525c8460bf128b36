"""One run of the whole pipeline, killed on the way: it ends complete, and a planted key is in no file, log, manifest, Ray API answer or wandb run.

One `graft run` with every key planted and the API's really asked for, while Ray's own API is read as anyone with the
cluster's token could; then runs against a server that repeats the header it was sent. Every byte left is searched.
"""

import base64
import gzip
import json
import re
import sqlite3
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from graft import cli
from graft.core.rows import read_jsonl
from graft.core.stages import Plan
from graft.core.tracking import group_of
from graft.data.endpoint import complete

from ..core.wandb_server import history, records
from .kills import assert_complete
from .leaks import PIECE, new_key, search
from .tree import RECIPE


# ---- the search ---------------------------------------------------------------------------------------------------------
def test_the_search_finds_what_is_hidden(tmp_path):
    key = new_key("OPENAI_API_KEY")
    plain = {"plain": key, "json": json.dumps({"a": [key]}), "quoted": quote(key, safe=""), "cut": "x" * 50 + key[:30], "tail": key[-30:]}
    for offset in range(3):
        plain[f"base64-{offset}"] = base64.b64encode(b"x" * offset + key.encode() + b"tail").decode()
    for name, text in plain.items():
        (tmp_path / name).write_text(text)
    with gzip.open(tmp_path / "log.gz", "wt") as f:
        f.write(f"header {key}")
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "log.gz", "inner/log.gz")
    with sqlite3.connect(tmp_path / "some.db") as db:
        db.execute("CREATE TABLE t (a TEXT)")
        db.execute("INSERT INTO t VALUES (?)", ("字" * 5000 + key,))
    (tmp_path / "innocent").write_text(new_key("OPENAI_API_KEY"))
    searched, found = search(tmp_path, {"key": key})
    assert searched.total() == len(plain) + 4
    names = {where for _, where in found}
    assert names >= {*plain, "log.gz, unpacked", "model.zip/inner/log.gz, unpacked", "some.db, rows"} and "innocent" not in names


# ---- the run ------------------------------------------------------------------------------------------------------------
def test_killed_in_training_the_next_run_goes_on_and_ends_complete(pipeline):
    assert_complete(pipeline, pipeline.overrides)
    began = [int(n) for n in re.findall(r"train base: \d+ steps(?:, resumed at step (\d+))?", pipeline.said()) for n in [n or "0"]]
    assert began[0] == 0 < began[1], "it went on from a checkpoint, maybe of the step at hand: the ranks outlive who is killed to write one"


def test_a_planted_key_is_in_no_file_and_in_no_answer_of_ray(pipeline):
    assert pipeline.statuses.keys() == {"200"}, "every request carried the key"
    searched, found = search(pipeline.root, {**pipeline.keys, "marker": pipeline.marker})
    plan = Plan(pipeline.path / RECIPE, pipeline.overrides, pipeline.path)
    places = {where for name, where in found if name == "marker"}
    rows = plan.latest("augment").path.relative_to(pipeline.root.resolve())
    assert {f"{rows}/rows.jsonl", "graft/data_shards/ledger.sqlite, rows"} <= places, "what is there is found"
    assert searched[".wandb"] >= 3 and searched[".safetensors"] >= 3 and searched[".log"] > 20 and searched[""] > 100, searched
    assert not [where for name, where in found if name != "marker"]
    for name in plan.stages:
        assert plan.latest(name).manifest["kind"] == name
    print(f"{searched.total()} files, {sum(map(len, pipeline.api.seen.values()))} answers of Ray, keys found: 0")


def test_wandb_has_each_stage_once_in_one_group(pipeline):
    plan = Plan(pipeline.path / RECIPE, pipeline.overrides, pipeline.path)
    told = {}
    for file in plan.home("checkpoints").glob("runs/*/wandb/offline-run-*/*.wandb"):
        (run,) = [r for r, kind in records(file) if kind == "run"]
        assert run.display_name not in told, "a launch replaces the one before"
        told[run.display_name] = (
            run.run_group,
            [line["_step"] for line in history(file) if "loss" in line],
            {r.name for r, kind in records(file) if kind == "artifact"},
        )
    stages = ("base", "cpt", "sft", "evaluate")
    assert told.keys() == {f"image-intent-tiny/{stage}" for stage in stages} and {group for group, _, _ in told.values()} == {group_of(plan)}
    for stage in stages:
        _, steps, linked = told[f"image-intent-tiny/{stage}"]
        assert steps == list(range(plan.latest(stage).counts.get("steps", 0))), "each step once, over the kill"
        assert {f"image-intent-tiny-{name}" for name in (stage, *plan.stages[stage].parents)} <= linked


def test_ray_was_really_asked(pipeline):
    seen = pipeline.api.seen
    assert all(seen.values()), [path for path, answers in seen.items() if not answers]
    actors = [a for answer in seen["/api/v0/actors?detail=1"] for a in json.loads(answer)["data"]["result"]["result"]]
    assert any("Caller" in a["class_name"] and a["state"] == "ALIVE" for a in actors)
    assert any("Replica" in a["class_name"] for a in actors), "the server's too"
    assert any(b"Caller" in answer for answer in seen["/api/v0/tasks?detail=1"])
    assert any(b"graft.cli run" in answer for answer in seen["/api/jobs/"])
    assert all(json.loads(answer)["data"]["result"]["total"] for answer in seen["/api/v0/workers?detail=1"])


def test_the_panels_numbers_are_rays_metrics_while_it_runs(pipeline):
    values: dict[str, list[float]] = {}
    for answer in pipeline.api.seen["metrics"]:
        for name, labels, value in re.findall(r"^ray_graft_augment_(\w+)\{(.*)\} (\S+)$", answer.decode(), re.MULTILINE):
            assert 'recipe="image-intent-tiny"' in labels
            label = re.search(r'label="(\w+)"', labels)
            values.setdefault(name + (f" {label[1]}" if label else ""), []).append(float(value))
    names = {"spent_usd", "projected_usd", "accept_rate", "requests_per_minute", "tokens_per_minute", "in_flight", "retries"}
    assert values.keys() == names | {"rows call", "rows text"}
    assert max(values["in_flight"]) > 1 and max(values["spent_usd"]) > 0 and max(values["rows call"]) == max(values["rows text"]) == 60
    assert max(values["projected_usd"]) > 0 and max(values["accept_rate"]) > 0.5 and max(values["tokens_per_minute"]) > 1000


# ---- a server that tells ----------------------------------------------------------------------------------------------
class Telltale(BaseHTTPRequestHandler):
    """Repeats the Authorization header in whatever it refuses, and in a 200 that holds an error; answers half of the requests."""

    protocol_version = "HTTP/1.1"
    refuse_all = False
    told = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        n = Telltale.told
        Telltale.told += 1
        status = 401 if Telltale.refuse_all else (400, 500, 200, 429)[n // 2 % 4] if n % 2 == 0 else 0
        if status:
            sent = self.headers["Authorization"]
            error = {"message": f"{'x' * (n % 5 * 40)} not with\n{sent}", "type": "odd", "param": sent, "code": sent[7:]}
            reply = {"error": error, "headers": dict(self.headers), "choices": None}
        else:
            status, reply = complete(body)
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def telltale(pipeline):
    with ThreadingHTTPServer(("127.0.0.1", 0), Telltale) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pipeline.extra["OPENAI_BASE_URL"] = f"http://127.0.0.1:{server.server_port}/v1"
        yield Telltale
        server.shutdown()


def augment(tree, workspace):
    """(exit code, what was said) of `graft augment` in a workspace of its own."""
    log = tree.root / "output.log"
    at = log.stat().st_size
    command = tree.graft("augment", RECIPE, "--set", "augment.rows_per_class=60", "--workspace", workspace)
    code = tree.start(*command).wait(200)
    return code, log.read_bytes()[at:].decode()


def test_what_a_server_repeats_is_cut_out(pipeline, telltale):
    code, said = augment(pipeline, "telltale")
    assert code == 0 and telltale.told > 20, said[-3000:]
    artifact = Plan(pipeline.path / RECIPE, ("augment.rows_per_class=60",), pipeline.path / "telltale").latest("augment")
    reasons = [r["reason"] for r in read_jsonl(artifact.path / "rejected.jsonl")]
    assert any("400" in r and "Bearer …" in r for r in reasons) and any("the server reports" in r and "Bearer …" in r for r in reasons)
    with sqlite3.connect(pipeline.path / "telltale/data_shards/ledger.sqlite") as db:
        assert any("Bearer …" in json.loads(raw)["error"]["message"] for (raw,) in db.execute("SELECT response FROM answers") if '"error"' in raw)
    assert not search(pipeline.root, pipeline.keys)[1]


def test_a_wrong_key_is_refused_in_one_line_that_does_not_hold_it(pipeline, telltale, monkeypatch):
    monkeypatch.setattr(telltale, "refuse_all", True)
    code, said = augment(pipeline, "refused")
    lines = [line for line in said.splitlines() if line.startswith("graft: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said, said[-3000:]
    assert "the API refused the key: 401" in lines[0] and "…" in lines[0]
    assert not search(pipeline.root, pipeline.keys)[1]


@pytest.mark.parametrize("address", ["http://me:{}@127.0.0.1:9/v1", "https://{}@example.com/v1", "https://example.com/v1?api-key={}"])
def test_a_key_in_the_address_is_refused_in_one_line_that_does_not_hold_it(tmp_path, monkeypatch, capsys, address):
    key = new_key("OPENAI_API_KEY").replace("/", "-")
    monkeypatch.setenv("OPENAI_BASE_URL", address.format(key))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    recipe = Path(__file__).parents[2] / RECIPE
    assert cli.main(["augment", str(recipe), "--workspace", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "OPENAI_BASE_URL holds more than the address" in said.err and said.out == ""
    assert key[:PIECE] not in said.err and not search(tmp_path, {"key": key})[1]


@pytest.mark.parametrize("end", ["\n", "\r\nX-Other: 1", "ä"])
def test_a_key_that_no_header_takes_is_refused_before_anything_is_sent(tmp_path, monkeypatch, capsys, end):
    key = new_key("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", key + end)
    assert cli.main(["augment", str(Path(__file__).parents[2] / RECIPE), "--workspace", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "OPENAI_API_KEY holds a line break" in said.err and key[:PIECE] not in said.err
