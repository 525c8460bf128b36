"""A recipe whose base and corpora lie on the hub, through the command line, from a hub of the test's own (tests/hub.py)."""

import json

import pyarrow.parquet as pq
import pytest

from graft.core.artifact import Artifact
from graft.core.recipe import EmbeddedBase, Train
from graft.model.base import random_llama

from ..engine.tiny_model import tiny_tokenizer

BASE, TALES, CHATS = "models/owner/tiny-llama", "datasets/owner/tales", "datasets/owner/chats"
RECIPE = """
name = "far"
deepspeed = "zero2.json"
[corpora.tales]
path = "hub:owner/tales/long:train"
[corpora.chats]
path = "hub:owner/chats"
[shard]
seq_len = 128
bins_per_shard = 8
[model]
base = "owner/tiny-llama"
precision = "fp32"
[cpt]
corpora = ["tales"]
[sft]
corpora = ["chats"]
"""
README = """---
configs:
- {config_name: long, data_files: [{split: train, path: "train.jsonl"}, {split: test, path: "test.jsonl"}]}
- {config_name: wide, data_files: [{split: train, path: "wide.jsonl"}]}
---
"""
OUTLOOK = """
from graft.core.stages import Plan
from graft.pipeline import outlook
answer = [stage for stage, _, artifact in outlook(Plan("far.toml", tuple(sys.argv[1:])), until="shard-sft") if artifact]
"""


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def texts(tag: str) -> list[str]:
    return [f"The {tag} tale of number {i}: " + f"{tag} came to the house of {i * 7919} and said so. " * 4 for i in range(40)]


def tales(tag: str) -> dict[str, bytes]:
    data = {name: lines({"text": text.strip()} for text in texts(of)) for name, of in (("train", tag), ("test", "other"), ("wide", "wide"))}
    return {"README.md": README.encode(), **{f"{name}.jsonl": some for name, some in data.items()}}


@pytest.fixture
def far(hub, client):
    (client.root / "far.toml").write_text(RECIPE)
    (client.root / "zero2.json").write_text("{}")
    folder, tokenizer = client.root / "base", tiny_tokenizer()
    shape = EmbeddedBase(hidden_size=32, intermediate_size=64, layers=1, heads=4, kv_heads=2, train=Train(lora=None))
    random_llama(shape, len(tokenizer), 128, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    client.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.push(BASE, client.files)
    hub.push(TALES, tales("first"))
    rows = [{"messages": [{"role": "user", "content": f"who is {i}"}, {"role": "assistant", "content": f"it is {i * 31}"}]} for i in range(30)]
    hub.push(CHATS, {"chats.jsonl": lines(rows)})
    return client


def run(client, *arguments: str, **extra: str) -> dict[str, Artifact]:
    """The stages' artifacts after `graft run far.toml --until shard-sft`."""
    assert client.graft("run", "far.toml", "--until", "shard-sft", *arguments, **extra) == 0, client.says[-4000:]
    return {name: Artifact.open((client.root / "data_shards/far" / name / "current").resolve()) for name in ("prepare", "shard-cpt", "shard-sft")}


def documents(artifact: Artifact) -> set[str]:
    return {text for path in (artifact.path / "corpora").glob("tales*") for text in pq.read_table(path)["text"].to_pylist()}


def test_a_run_from_the_hub_and_runs_after_its_branches_moved(hub, far):
    first = run(far)
    base, at = hub.branches[BASE, "main"], hub.branches[TALES, "main"]
    assert documents(first["prepare"]) == {text.strip() for text in texts("first")}
    assert first["prepare"].manifest["inputs"]["corpora"]["tales"] == f"hub:owner/tales@{at}"
    assert first["shard-cpt"].manifest["inputs"]["model"] == f"hub:owner/tiny-llama@{base}"
    assert first["shard-sft"].counts["kept"] == 30
    assert not {"wide.jsonl", "model.safetensors"} & {*hub.downloads}, "no other configuration, and no weights for a tokenizer"
    hub.requests.clear()
    assert {name: a.path for name, a in run(far, HF_HUB_OFFLINE="1").items()} == {name: a.path for name, a in first.items()}
    assert not hub.requests
    hub.push(BASE, far.files | {"README.md": b"# Tiny"})
    assert far.asks(OUTLOOK) == ["prepare"]
    assert far.asks(OUTLOOK, f"model.revision='{base}'") == ["prepare", "shard-cpt", "shard-sft"]
    hub.push(TALES, tales("second"))
    assert far.asks(OUTLOOK) == []
    second = run(far)
    assert documents(second["prepare"]) == {text.strip() for text in texts("second")}
    assert all(second[name].path != first[name].path for name in first)
    assert far.graft("inspect", "data_shards/far/shard-cpt/current", "--bin", "0", HF_HUB_OFFLINE="1") == 0, far.says
