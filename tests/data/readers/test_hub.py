"""Corpora of the hub: downloaded by the real `datasets` from a hub of the test's own (tests/hub.py)."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ...hub import Client, Hub

NAME = "datasets/owner/tales"
README = """---
configs:
- config_name: short
  default: true
  data_files:
  - {split: train, path: "short/train-*"}
  - {split: test, path: "short/test-*"}
- config_name: long
  data_files:
  - {split: train, path: "long/train-*"}
  - {split: test, path: "long/test-*"}
---
# Tales
"""
READ = """
from graft.core.hub import commit_of, dataset_of
from graft.data.readers.files import pieces, records
from graft.data.readers.hub import hub_files
answer = {}
for path in sys.argv[1:]:
    named = dataset_of(path)
    files = hub_files(path, commit_of("dataset", named.name, named.revision))
    assert all(str(file).startswith(os.environ["HF_HOME"]) for file in files), files
    answer[path] = [r.value for file in files for piece in pieces(file) for r in records(piece)]
"""


def rows(config: str, split: str, count: int) -> list[dict[str, Any]]:
    return [{"text": f"{config} {split} 第{i} tale", "n": i} for i in range(count)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


WRITERS = {"jsonl": jsonl, "parquet": parquet}
ROWS = {(c, s): rows(c, s, n) for n, (c, s) in enumerate([("short", "train"), ("short", "test"), ("long", "train"), ("long", "test")], 5)}


def files(suffix: str, tag: str = "") -> dict[str, bytes]:
    """A repository of two configurations of two splits, the training split in two files; `tag` is in every text."""
    found = {"README.md": README.encode()}
    for (config, split), texts in ROWS.items():
        tagged = [row | {"text": tag + row["text"]} for row in texts]
        for n, part in enumerate((tagged[:3], tagged[3:]) if split == "train" else (tagged,)):
            found[f"{config}/{split}-{n}.{suffix}"] = WRITERS[suffix](part)
    return found


@pytest.mark.parametrize("suffix", WRITERS)
def test_configurations_and_splits_and_nothing_is_downloaded_twice(hub: Hub, client: Client, suffix: str) -> None:
    commit = hub.push(NAME, files(suffix))
    (client.root / "owner/tales").mkdir(parents=True)  # of the dataset's name, in the current folder
    (client.root / "owner/tales/train.jsonl").write_text('{"text": "not the hub\'s"}\n')
    both = {
        "hub:owner/tales": ROWS["short", "test"] + ROWS["short", "train"],  # in the order of the files' names
        "hub:owner/tales:train": ROWS["short", "train"],
        f"hub:owner/tales@{commit}/long:test": ROWS["long", "test"],
        "hub:owner/tales/long:train": ROWS["long", "train"],
    }
    assert client.asks(READ, *both) == both
    assert sorted(set(hub.downloads)) == sorted(hub.downloads), "a file was downloaded twice"
    assert {*hub.downloads} == files(suffix).keys()
    hub.downloads.clear()
    assert client.asks(READ, *both) == both
    assert not hub.downloads
    assert client.asks(READ, *both, HF_HUB_OFFLINE="1") == both
    assert not hub.downloads


def test_without_the_hub_no_other_commit_and_no_other_configuration_is_taken(hub: Hub, client: Client) -> None:
    """`datasets` alone would give what its cache got last."""
    first, second = hub.push(NAME, files("jsonl")), hub.push(NAME, files("jsonl", "new "))
    old, new, long = f"hub:owner/tales@{first}/short:test", "hub:owner/tales/short:test", "hub:owner/tales/long:test"
    got = client.asks(READ, new, long)
    assert got[new][0]["text"] == "new " + ROWS["short", "test"][0]["text"]
    assert client.asks(READ, "hub:owner/tales:test", HF_HUB_OFFLINE="1") == {"hub:owner/tales:test": got[new]}
    assert f"holds no commit {first[:12]}" in client.asks(READ, old, HF_HUB_OFFLINE="1")
    assert second in (client.home / "hub/datasets--owner--tales/refs/main").read_text()


# ---- what fails ------------------------------------------------------------------------------------------------------
def refused(client: Client, path: str, **extra: str) -> str:
    said = client.asks(READ, path, **extra)
    assert isinstance(said, str) and "\n" not in said and "hub:owner/tales" in said, said
    return said


def test_who_may_not_read_is_told_to_log_in(hub: Hub, client: Client) -> None:
    assert "is not on the hub, or is private: mend the name, or set HF_TOKEN" in refused(client, "hub:owner/tales")
    hub.push(NAME, files("jsonl"))
    for kind, without, with_other in (("private", "is private", "is private"), ("gated", "is gated: ask for access", "is gated: ask for access")):
        hub.access[NAME] = kind
        assert without in refused(client, "hub:owner/tales:test")
        assert with_other in (said := refused(client, "hub:owner/tales:test", HF_TOKEN="hf_other")) and "HF_TOKEN" in said
    assert not hub.downloads
    assert client.asks(READ, "hub:owner/tales:test", HF_TOKEN=hub.token) == {"hub:owner/tales:test": ROWS["short", "test"]}


def test_what_is_not_in_a_dataset_is_named(hub: Hub, client: Client) -> None:
    hub.push(NAME, files("jsonl"))
    assert "Unknown split" in refused(client, "hub:owner/tales:none")
    assert "'wide' not found" in refused(client, "hub:owner/tales/wide")
    assert "no such branch" in refused(client, "hub:owner/tales@next")
    assert "names no dataset of the hub" in client.asks(READ, "hub:one:two:three")
    hub.push(NAME, files("jsonl") | {"short/test-0.jsonl": b'{"text": broken}\n'})
    assert "JSON parse error" in refused(client, "hub:owner/tales")


def test_a_dataset_without_a_readme(hub: Hub, client: Client) -> None:
    hub.push(NAME, {"train.jsonl": jsonl(ROWS["long", "train"])})
    for extra in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert client.asks(READ, "hub:owner/tales", **extra) == {"hub:owner/tales": ROWS["long", "train"]}


def test_a_hub_that_is_down_or_out_of_reach(hub: Hub, client: Client) -> None:
    hub.push(NAME, files("jsonl"))
    hub.down = True
    assert "500" in (said := refused(client, "hub:owner/tales:test")) and "mend the name, the network" in said
    hub.down = False
    assert "offline" in refused(client, "hub:owner/tales:test", HF_HUB_OFFLINE="1").lower()
    assert client.asks(READ, "hub:owner/tales:test") == {"hub:owner/tales:test": ROWS["short", "test"]}
    hub.down = True
    assert client.asks(READ, "hub:owner/tales:test") == {"hub:owner/tales:test": ROWS["short", "test"]}, "the cache has it"


def test_a_connection_that_is_cut_goes_on_where_it_was(hub: Hub, client: Client) -> None:
    hub.push(NAME, files("parquet"))
    hub.cut_bytes = 100
    assert client.asks(READ, "hub:owner/tales:train") == {"hub:owner/tales:train": ROWS["short", "train"]}
    assert hub.cut_bytes is None and len(hub.downloads) == len(set(hub.downloads)) + 1


def test_a_network_that_goes_away_in_a_download_is_one_line_and_the_next_run_goes_on(hub: Hub, client: Client) -> None:
    hub.push(NAME, files("parquet"))
    hub.cut_bytes, hub.gone_after_cut = 100, True
    assert "disconnected" in refused(client, "hub:owner/tales:train")
    hub.gone = False
    assert client.asks(READ, "hub:owner/tales:train") == {"hub:owner/tales:train": ROWS["short", "train"]}
