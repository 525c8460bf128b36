"""Plans over a hub whose branches move (tests/hub.py): what is loaded, what a fingerprint says, who is told what."""

import pytest

from graft.core.errors import ConfigError
from graft.core.hub import HubDataset, dataset_of

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

    assert place.graft("check", "far.toml") == 0 and not hub.requests, "a recipe is validated without a network"
    assert place.graft("run", "far.toml", "--dry-run") == 0
    hub.access[BASE] = "gated"
    hub.push(BASE, {"config.json": b"{  }"})
    assert "model.base = 'owner/tiny' is gated: ask for access on its page, then set HF_TOKEN" in refused()
    assert place.graft("run", "far.toml", "--dry-run", HF_TOKEN=hub.token) == 0
    assert place.graft("augment", "far.toml", "--dry-run") == 0, "rows are made without the right to the base"
    assert "lacks config.json on the hub" in refused("--set", f"model.base='{hub_without_config(hub)}'")
    assert "hub:owner/gone is not on the hub, or is private" in refused("--set", "corpora.tales.path='hub:owner/gone'", HF_TOKEN=hub.token)


def hub_without_config(hub) -> str:
    hub.push("models/owner/weights", {"model.gguf": b"GGUF"})
    return "owner/weights"
