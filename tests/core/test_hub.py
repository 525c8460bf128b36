"""Plans over a hub whose branches move (tests/hub.py): what is loaded, what a fingerprint says, who is told what."""

import json
import socket
import subprocess
import sys

import pytest

from graft.core.errors import ConfigError
from graft.core.hub import HubDataset, dataset_of
from graft.model.shapes import ON_THE_HUB, SHAPES

BASE, TALES = "models/owner/tiny", "datasets/owner/tales"
RECIPE = """
name = "far"
deepspeed = "zero2.json"
[augment]
seeds = "seeds.jsonl"
[corpora.tales]
path = "hub:owner/tales"
[model]
base = "owner/tiny"
[cpt]
corpora = ["tales"]
[sft]
"""
SEEDS = """{"messages": [{"role": "user", "content": "畫貓"}, {"role": "assistant", "content": "call(\\"generate_image\\", {\\"prompt\\": \\"貓\\"})"}]}
{"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]}
"""
INPUTS = """
from graft.core.stages import Plan
plan = Plan("far.toml", tuple(sys.argv[1:]), hub=os.environ.get("HUB", "ask"))
answer = [plan.external_base(), plan.external_input("model"), plan.external_input("corpora")["tales"]]
if "KEEP" in os.environ:
    plan.home("data_shards").mkdir(parents=True, exist_ok=True)
    plan.record_commits()
"""


@pytest.fixture
def place(hub, client):
    (client.root / "far.toml").write_text(RECIPE)
    (client.root / "seeds.jsonl").write_text(SEEDS)
    (client.root / "zero2.json").write_text("{}")
    hub.push(BASE, {"config.json": b"{}"})
    hub.push(TALES, {"train.jsonl": b'{"text": "a tale"}\n'})
    return client


def test_names_of_datasets():
    assert dataset_of("hub:a/b") == HubDataset("a/b", None, None, None)
    assert dataset_of("hub:a/b:s") == HubDataset("a/b", None, None, "s")
    assert dataset_of("hub:a/b@v1.0/c-d:s_1") == HubDataset("a/b", "v1.0", "c-d", "s_1")
    for wrong in ("hub:a", "hub:a/b/c/d", "hub:a/b:", "hub:a/b:s@v1", "hub: a/b"):
        with pytest.raises(ConfigError, match="names no dataset of the hub"):
            dataset_of(wrong)


def test_inputs_are_named_by_the_commit_of_the_moment(hub, place):
    first, tales = hub.branches[BASE, "main"], hub.branches[TALES, "main"]
    assert place.asks(INPUTS, KEEP="1") == [["owner/tiny", first], f"hub:owner/tiny@{first}", f"hub:owner/tales@{tales}"]
    second, more = hub.push(BASE, {"config.json": b"{ }"}), hub.push(TALES, {"train.jsonl": b'{"text": "another"}\n'})
    before = [["owner/tiny", first], f"hub:owner/tiny@{first}", f"hub:owner/tales@{tales}"]
    hub.requests.clear()
    assert place.asks(INPUTS, HUB="recorded") == before and not hub.requests, "a rank loads what its run saw"
    assert place.asks(INPUTS, HF_HUB_OFFLINE="1") == before, "the hub's cache knows nothing newer"
    now = [["owner/tiny", second], f"hub:owner/tiny@{second}", f"hub:owner/tales@{more}"]
    assert place.asks(INPUTS) == now
    assert place.asks(INPUTS, HF_HUB_OFFLINE="1") == now
    pinned = (f"model.revision='{first}'", f"corpora.tales.path='hub:owner/tales@{tales}'")
    assert place.asks(INPUTS, *pinned) == before
    assert place.asks(INPUTS, "model.revision='next'") == f"model.base = 'owner/tiny' {NO_BRANCH}"


NO_BRANCH = "has no such branch, tag or commit on the hub: mend the revision"


def test_what_cannot_be_had_is_told_before_anything_runs(hub, place):
    def refused(*arguments: str, **extra: str) -> str:
        assert place.graft("run", "far.toml", "--dry-run", *arguments, **extra) == 2
        assert place.says.startswith("graft: ") and place.says.count("\n") == 1, place.says
        return place.says

    assert place.graft("run", "far.toml", "--dry-run") == 0
    hub.access[BASE] = "gated"
    hub.push(BASE, {"config.json": b"{  }"})
    assert "model.base = 'owner/tiny' is gated: ask for access on its page, then set HF_TOKEN" in refused()
    assert place.graft("run", "far.toml", "--dry-run", HF_TOKEN=hub.token) == 0
    assert place.graft("augment", "far.toml", "--dry-run") == 0, "rows are made without the right to the base"
    assert "lacks config.json on the hub" in refused("--set", f"model.base='{hub_without_config(hub)}'")
    assert "hub:owner/gone is not on the hub, or is private" in refused("--set", "corpora.tales.path='hub:owner/gone'", HF_TOKEN=hub.token)


def checked(place, *arguments: str, code: int = 0, **extra: str) -> str:
    """What `graft check` says."""
    environment = place.environment(**extra)
    done = subprocess.run(
        [sys.executable, "-m", "graft.cli", "check", "far.toml", *arguments], env=environment, cwd=place.root, capture_output=True, text=True
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stderr if code else done.stdout


def test_check_looks_at_the_hub_and_says_what_it_could_not(hub, place):
    whole = checked(place)
    assert whole.startswith("far.toml: ok, stages") and "not looked at" not in whole
    hub.access[BASE] = "gated"
    hub.push(BASE, {"config.json": b"{  }"})
    gated = checked(place)
    assert "not looked at: owner/tiny (it is gated)\n" in gated and ": ok" not in gated and "tales" not in gated, "the data set was"
    assert "not looked at" not in checked(place, HF_TOKEN=hub.token)
    hub.access[BASE] = "private"
    for extra in ({}, {"HF_TOKEN": "hf_another"}):
        assert "model.base = 'owner/tiny' is not on the hub, or is private" in checked(place, code=2, **extra)
    assert "hub:owner/gone is not on the hub" in checked(place, "--set", "corpora.tales.path='hub:owner/gone'", code=2, HF_TOKEN=hub.token)
    assert "has no such branch" in checked(place, "--set", "model.revision='next'", code=2, HF_TOKEN=hub.token)


@pytest.mark.parametrize("extra", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}, {"down": "1"}])
def test_without_a_network_a_recipe_is_checked_all_the_same(hub, place, extra):
    hub.down = bool(extra.pop("down", None))
    said = checked(place, **extra)
    reason = "the hub cannot be reached" if extra else "the hub answers 500"
    assert f"not looked at: owner/tiny ({reason})\n" in said and f"not looked at: hub:owner/tales ({reason})\n" in said
    assert "did you mean" in checked(place, "--set", "sft.epoch=3", code=2, **extra)


def test_memory_and_time_are_told_of_a_base_whose_shape_is_known(hub, place):
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    said = checked(place, "--gpus", "1xH100", "--set", "model.base='meta-llama/Llama-3.1-8B'", **away)
    assert "by the shape that meta-llama/Llama-3.1-8B is known to have (llama-3.1-8b)" in said and "sft: micro_batch" in said and "a step" in said
    unknown = checked(place, "--gpus", "1xH100", **away)
    assert "not predicted, the shape of owner/tiny is known by its config.json alone" in unknown and "sft: micro" not in unknown
    hub.push("models/meta-llama/Llama-3.1-8B", {"config.json": json.dumps(SHAPES["llama-3.1-8b"]).encode()})
    seen = checked(place, "--gpus", "1xH100", "--set", "model.base='meta-llama/Llama-3.1-8B'")
    assert "is known to have" not in seen and said.splitlines()[-2:] == seen.splitlines()[-2:], "the same prediction"


def test_a_hub_that_never_answers_is_given_up(hub, place):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code = "import graft.core.hub as h\nh.TIMEOUT_S = 0.3\n" + INPUTS + "answer = plan.unseen"
        away = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HUB": "look"}
        assert place.asks(code, **away) == {"owner/tiny": "the hub cannot be reached", "hub:owner/tales": "the hub cannot be reached"}


def test_every_name_has_a_shape():
    assert set(ON_THE_HUB.values()) <= SHAPES.keys()


def hub_without_config(hub) -> str:
    hub.push("models/owner/weights", {"model.gguf": b"GGUF"})
    return "owner/weights"
