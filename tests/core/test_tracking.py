"""wandb itself, offline and against a server: one curve over kills and resumes, manifests linked, nothing secret, never in the way."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graft.core.tracking import group_of

from ..e2e.leaks import new_key, search
from ..report.made import plan_in
from .wandb_server import WandbServer, history, records

OFFLINE, ONLINE = "tracking.wandb=offline", "tracking.wandb=online"
KEYS = ("WANDB_API_KEY", "GRAFT_API_KEY", "HF_TOKEN")


def start(root, *arguments, program=None, **variables):
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(root / "home"), **variables}
    (root / "home").mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, *(program or [str(Path(__file__).with_name("tracked.py"))]), *map(str, arguments)]
    return subprocess.Popen(argv, env=env, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def launch(root, *arguments, code=0, **variables):
    process = start(root, root / "graft", *arguments, **variables)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code, said[-3000:]
    return said


def folders(root):
    return sorted((root / "graft/checkpoints/made/runs").glob("sft-*/wandb/offline-run-*"))


def file_in(folder):
    return next(folder.glob("*.wandb"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Killed after seven steps, the fifth and later replayed; (root, the keys that lay in the environment)."""
    root = tmp_path_factory.mktemp("killed")
    keys = {name: new_key(name) for name in KEYS}
    launch(root, 0, 7, "kill", OFFLINE, code=-9, **keys)
    launch(root, 5, 9, "finish", OFFLINE, **keys)
    return root, keys


def test_a_killed_and_resumed_run_is_one_curve_with_each_step_once(killed):
    (folder,) = folders(killed[0])
    lines = [line for line in history(file_in(folder)) if "loss" in line]
    assert [(line["_step"], line["first"]) for line in lines] == [*((n, 0) for n in range(5)), *((n, 5) for n in range(5, 9))]
    assert lines[3]["skipped"] == "spike" and "validation_loss" not in lines[0]
    (run,) = [r for r, kind in records(file_in(folder)) if kind == "run"]
    plan = plan_in(killed[0] / "graft", OFFLINE)
    assert run.display_name == "made/sft" and run.run_group == group_of(plan) and run.job_type == "sft" and run.project == "graft"
    config = {entry.key: json.loads(entry.value_json) for entry in run.config.update}
    assert config["sft.lr"] == 2e-4 and config["fingerprint"] == plan.resolve("sft").fingerprint


def test_the_manifest_is_linked_with_those_it_was_made_of_and_no_weights(killed):
    found = [r for r, kind in records(file_in(folders(killed[0])[0])) if kind == "artifact" and r.name.startswith("made-")]
    assert [(a.name, a.use_after_commit) for a in found] == [("made-merge", True), ("made-shard-sft", True), ("made-sft", False)]
    plan = plan_in(killed[0] / "graft", OFFLINE)
    for artifact, stage in zip(found, ("merge", "shard-sft", "sft"), strict=True):
        (content,) = artifact.manifest.contents
        assert content.path == "manifest.json" and json.loads(artifact.metadata)["fingerprint"] == plan.resolve(stage).fingerprint
        assert content.local_path == str(plan.resolve(stage).directory / "manifest.json")
        assert set(artifact.aliases) == {"latest", plan.resolve(stage).fingerprint[:12]}


def test_figures_of_the_whole_run_stand_in_its_summary(killed):
    updates = {
        tuple(i.nested_key) or (i.key,): i.value_json for r, kind in records(file_in(folders(killed[0])[0])) if kind == "summary" for i in r.update
    }
    assert json.loads(updates["chat/adapter/rougeL",]) == 0.5 and any(key[0] == "evaluation" for key in updates)


def test_no_secret_no_command_line_no_host_and_no_code_is_in_it(killed):
    root, keys = killed
    searched, found = search(root / "graft/checkpoints/made/runs", {**keys, "argv": str(Path(__file__).with_name("tracked.py"))})
    assert searched[".wandb"] == 1 and not found
    (run,) = [r for r, kind in records(file_in(folders(root)[0])) if kind == "run"]
    assert not run.host and not run.HasField("git")
    kept = {p.name for p in folders(root)[0].rglob("*") if p.is_file()}
    assert not {"wandb-metadata.json", "requirements.txt"} & kept and not [name for name in kept if name.endswith(".py")]
    assert not search(root / "home", keys)[1]


def test_sync_sends_one_run_and_what_was_sent_goes_on_offline_as_another(killed, tmp_path):
    root, _ = killed
    (folder,) = folders(root)
    with WandbServer() as server:
        sync = start(root, "sync", "--yes", str(folder), program=["-m", "wandb"], **server.variables())
        said, _ = sync.communicate(timeout=120)
        assert sync.returncode == 0, said[-3000:]
        (name,) = server.runs
        run = server.runs[name]
        assert [line["_step"] for line in run["history"] if "loss" in line] == list(range(9)) and run["name"] == "made/sft" and "host" not in run
        assert {n for n, _ in server.artifacts if n.startswith("made-")} == {"made-merge", "made-shard-sft", "made-sft"} and server.used == 2
    (root / "graft/checkpoints/made/sft/current").resolve().rename(tmp_path / "away")
    said = launch(root, 9, 11, "finish", OFFLINE)
    assert f"run {name} was sent already" in said and len(folders(root)) == 2
    assert [line["_step"] for line in history(file_in(folders(root)[1])) if "loss" in line] == list(range(11))


def test_online_a_killed_and_resumed_run_is_one_curve_too_and_no_secret_is_sent(tmp_path):
    keys = {name: new_key(name) for name in KEYS if name != "WANDB_API_KEY"}
    with WandbServer() as server:
        launch(tmp_path, 0, 7, "kill", ONLINE, code=-9, LINGER_S="3", **keys, **server.variables())
        (name,) = server.runs
        had = len(server.runs[name]["history"])
        said = launch(tmp_path, 5, 9, "finish", ONLINE, "tracking.weights=true", **keys, **server.variables())
        lines = [line for line in server.runs[name]["history"] if "loss" in line]
        assert list(server.runs) == [name] and [line["_step"] for line in lines] == list(range(9)), said
        assert [line["first"] for line in lines] == [5 if n >= max(had, 5) else 0 for n in range(9)], "what the server has stays"
        assert {n for n, _ in server.artifacts} >= {"made-sft", "made-sft-weights"} and server.used == 2
        assert not {n for n in server.files if not n.startswith("media/table/")} - {"wandb-summary.json", "config.yaml"}
        (tmp_path / "sent").mkdir()
        (tmp_path / "sent/bodies").write_bytes(b"\n".join(server.received))
    wanted = {**keys, "wandb": server.variables()["WANDB_API_KEY"], "argv": str(Path(__file__).with_name("tracked.py"))}
    assert not search(tmp_path / "sent", wanted)[1] and len((tmp_path / "sent/bodies").read_bytes()) > 10_000


def test_a_network_that_is_lost_in_mid_run_stops_nothing(tmp_path):
    with WandbServer() as server:
        process = start(tmp_path, tmp_path / "graft", 0, 3, "cut", ONLINE, PATIENCE_S="3", **server.variables())
        while "begun" not in process.stdout.readline():
            assert process.poll() is None
        server.stop()
        began = time.monotonic()
        said, _ = process.communicate("\n", timeout=120)
    assert process.returncode == 0 and "finished" in said and time.monotonic() - began < 90, said[-3000:]
    assert (tmp_path / "graft/checkpoints/made/sft/current/manifest.json").is_file()


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, "finds no API key: set WANDB_API_KEY or run `wandb login`, or set tracking.wandb = 'offline'"),
        ({"WANDB_API_KEY": "b2" * 20, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "does not begin"),
        ({"WANDB_API_KEY": "of another form"}, "mend WANDB_API_KEY"),
    ],
)
def test_online_without_a_key_or_a_network_is_one_line_before_the_first_step(tmp_path, variables, wanted):
    began = time.monotonic()
    said = launch(tmp_path, 0, 3, "finish", ONLINE, code=1, PATIENCE_S="1", **variables)
    lines = [line for line in said.splitlines() if line.startswith("graft: ")]
    assert (
        len(lines) == 1
        and wanted in lines[0]
        and "Traceback" not in said
        and not any(v in said for k, v in variables.items() if k == "WANDB_API_KEY")
        and time.monotonic() - began < 90
    ), said
    assert not list(tmp_path.glob("graft/checkpoints/made/sft"))


def test_without_the_package_it_is_one_line(tmp_path):
    gone = "import sys; sys.modules['wandb'] = None; sys.argv[0] = 'tracked.py'"
    program = f"{gone}; sys.path.insert(0, {str(Path(__file__).parent)!r}); import tracked; tracked.main(*sys.argv[1:])"
    process = start(tmp_path, tmp_path / "graft", 0, 3, "check", OFFLINE, program=["-c", program])
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "needs the package wandb" in said and "pip install 'wandb>=0.31'" in said and said.count("\n") == 1, said


def test_a_group_is_of_one_recipe_run(tmp_path):
    plan = plan_in(tmp_path)
    same = (plan_in(tmp_path, *o) for o in (["sft.save_every=7"], [OFFLINE], ["evaluate.max_new_tokens=9"], ["serve.port=9"]))
    assert {group_of(p) for p in same} == {group_of(plan)} and group_of(plan).startswith("made-")
    assert len({group_of(plan_in(tmp_path, o)) for o in ("seed=4", "sft.lr=1e-3", "cpt.lr=1e-3", "augment.rows_per_class=7")} | {group_of(plan)}) == 5
