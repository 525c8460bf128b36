"""What the tests of several rooms share: one local Ray cluster, and a small workspace with a hand-made augment artifact."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graft.core.rows import Row, write_jsonl
from graft.core.stages import Plan

from .hub import Client, Hub


def pytest_configure() -> None:
    # what a shell starts in the background ignores SIGINT, and so would every command that a test interrupts
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="run the long campaigns too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not {"slurm", "e2e", "test_two_process.py"} & set(item.path.parts))  # the long files first
    if not config.getoption("--campaign"):
        skip = pytest.mark.skip(reason="a long campaign: launch/test.sh --campaign")
        for item in items:
            if item.get_closest_marker("campaign"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray cluster for the whole session, with a home and a temporary folder of its own."""
    from graft.data.cluster import ray_cluster

    home = tempfile.mkdtemp(prefix="graft-")  # short: Ray's socket paths have a limit of 107 bytes
    patch = pytest.MonkeyPatch()
    patch.setenv("HOME", home)
    patch.delenv("RAY_ADDRESS", raising=False)
    try:
        with ray_cluster(temp_dir=f"{home}/ray", include_dashboard=False):
            yield
    finally:
        patch.undo()
        shutil.rmtree(home, ignore_errors=True)


RECIPE = """
name = "small"
seed = 3
[augment]
seeds = "seeds.jsonl"
[prepare]
validation = 0.2
[corpora.made]
kind = "grammar"
documents = 120
seed = 5
[corpora.notes]
path = "notes.jsonl"
clean = { min_chars = 2 }
[shard]
seq_len = 128
bins_per_shard = 8
[model]
precision = "fp32"
[base]
vocab_size = 400
hidden_size = 32
intermediate_size = 64
layers = 1
heads = 2
kv_heads = 1
[base.train]
corpora = ["made", "notes"]
lora = false
[cpt]
corpora = ["notes"]
[sft]
"""


def chat_row(label: str, family: int, n: int) -> Row:
    user = f"請畫出編號{family}之{n}的風景" if label == "call" else f"編號{family}之{n}的風景在哪個城市呢"
    answer = f'call("generate_image", {{"prompt": "編號{family}之{n}的風景"}})' if label == "call" else f"在第{n}個城市"
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"id": f"{label}-{family}-{n}", "messages": messages, "label": label, "family": f"{label}-{family:02d}", "parent": None, "request": None}


@pytest.fixture(scope="session")
def workspace() -> Callable[..., Plan]:
    """make(root, rows=…, notes=…, overrides=…): a recipe under `root` whose augment artifact holds `rows`."""

    def make(root: Path, rows: list[Row] | None = None, notes: list[str] | None = None, overrides: tuple[str, ...] = ()) -> Plan:
        if rows is None:
            rows = [chat_row(label, family, n) for label in ("call", "text") for family in range(4) for n in range(10)]
        if notes is None:
            notes = [json.dumps({"text": f"note {i}: " + "some prose about the sea and the hills. " * (i % 40 + 1)}) for i in range(60)]
        root.mkdir(parents=True, exist_ok=True)
        (root / "small.toml").write_text(RECIPE, encoding="utf-8")
        (root / "notes.jsonl").write_bytes(b"\n".join(n if isinstance(n, bytes) else n.encode() for n in notes))
        write_jsonl(root / "seeds.jsonl", [{"messages": chat_row(label, 0, 0)["messages"]} for label in ("call", "text")])
        plan = Plan(root / "small.toml", overrides, root)
        with plan.resolve("augment").writing() as draft:
            write_jsonl(draft.path / "rows.jsonl", rows)
        return plan

    return make


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub that holds nothing yet."""
    with Hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def client(hub: Hub) -> Iterator[Client]:
    """Processes that know no other hub, in a folder of a short name, for Ray's socket paths."""
    root = Path(tempfile.mkdtemp(prefix="graft-"))
    yield Client(hub, root)
    shutil.rmtree(root, ignore_errors=True)
