"""Bad input through the command line: exit code 2, one line that names what, where and the mend, no artifact."""

import json
import shutil
import signal
import socket
from pathlib import Path

import pytest

from graft import cli
from graft.cli import main
from graft.core.errors import ConfigError
from graft.core.stages import Plan

CONFIGS = Path(__file__).parents[1] / "configs"
CALL = {"messages": [{"role": "user", "content": "畫貓"}, {"role": "assistant", "content": 'call("generate_image", {"prompt": "貓"})'}]}
TEXT = {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]}


@pytest.fixture
def work(tmp_path, monkeypatch):
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "GRAFT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def recipe(name="tiny"):
    return f"configs/recipes/image-intent-{name}.toml"


def seeds(work, *rows):
    (work / "configs/recipes/image-intent/seeds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def refused(capsys, *arguments):
    """The one line on stderr; nothing was made."""
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("graft: ") and err.count("\n") == 1 and "Traceback" not in err
    assert not list(Path().glob("*/*/*/*/manifest.json")) and not list(Path().glob("*/*/*/.*draft*"))
    return err


def test_unknown_key_names_the_nearest(work, capsys):
    assert "sft.epochs" in refused(capsys, "run", recipe(), "--set", "sft.epoch=3")


def test_wrong_type(work, capsys):
    assert "sft.lr" in refused(capsys, "run", recipe(), "--set", "sft.lr=fast")


def test_missing_recipe(work, capsys):
    assert "image-intent-tiny.toml" in refused(capsys, "run", "configs/recipes/tiny.toml")


def test_missing_seeds(work, capsys):
    assert "gone.jsonl" in refused(capsys, "run", recipe(), "--set", "augment.seeds=gone.jsonl")


def test_empty_seeds(work, capsys):
    seeds(work)
    assert "seeds.jsonl" in refused(capsys, "run", recipe())


@pytest.mark.parametrize("row", [CALL, TEXT])
def test_one_class_only(work, capsys, row):
    seeds(work, row, row)
    assert "add rows" in refused(capsys, "run", recipe())


def test_seed_that_is_no_json(work, capsys):
    (work / "configs/recipes/image-intent/seeds.jsonl").write_text(json.dumps(CALL) + "\n{oops\n")
    assert "seeds.jsonl:2" in refused(capsys, "check", recipe())


def test_base_folder_that_is_no_model(work, capsys):
    assert "config.json" in refused(capsys, "run", recipe("8b"), "--set", "model.base=image-intent")


def test_remote_endpoint_without_a_key(work, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.example.com/v1")
    assert "OPENAI_API_KEY" in refused(capsys, "run", recipe())


def test_port_in_use_is_found_before_anything_runs(work, capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(1)
        port = s.getsockname()[1]
        assert f"port {port}" in refused(capsys, "run", recipe(), "--set", f"serve.port={port}")


def test_unknown_stage_and_missing_artifacts(work, capsys):
    assert "no stage 'sfft'" in refused(capsys, "run", recipe(), "--from", "sfft")
    assert "needs 'augment'" in refused(capsys, "serve", recipe())
    assert "manifest.json" in refused(capsys, "lineage", "configs")


def test_a_damaged_artifact_is_named(work, capsys):
    job = Plan(recipe()).resolve("augment")
    with job.writing() as draft:
        (draft.path / "rows.jsonl").write_text("{}\n")
    (job.directory / "rows.jsonl").write_text("")
    assert main(["run", recipe()]) == 2
    err = capsys.readouterr().err
    assert "rows.jsonl has 0 bytes" in err and err.count("\n") == 1


def test_dry_run_prints_the_plan_and_makes_nothing(work, capsys):
    assert main(["run", recipe(), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == list(Plan(recipe()).stages)
    assert not list(Path().glob("*/*/*/*/manifest.json"))


@pytest.mark.parametrize("made_of_it", [KeyboardInterrupt, ValueError, ConfigError])
def test_ctrl_c_is_said_whatever_a_library_makes_of_it(work, capsys, monkeypatch, made_of_it):
    def verb(args):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise made_of_it("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    monkeypatch.setattr(cli, "_merge", verb)
    assert main(["merge", "adapter", "--base", "base", "--out", "out"]) == 130
    assert capsys.readouterr().err == "graft: interrupted; what is complete stays, run the same command to go on\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_without_ctrl_c_is_no_interruption(work, monkeypatch):
    def verb(args):
        raise ValueError("a fault")

    monkeypatch.setattr(cli, "_merge", verb)
    with pytest.raises(ValueError, match="a fault"):
        main(["merge", "adapter", "--base", "base", "--out", "out"])
