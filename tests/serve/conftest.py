from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))  # for tiny_model: pytest imports by file and adds no folder

import uvicorn
from tiny_model import build as build_tiny
from tiny_model import random_adapter, recorded

from graft.core.recipe import Lora
from graft.core.stages import Plan
from graft.core.store import AdapterStore
from graft.model.chat import load_tokenizer
from graft.serve.api import build
from graft.serve.app import wait_until_ready
from graft.serve.runner import Runner
from graft.serve.spec import ServeSpec

from ..model.tiny_vision import write_adapter, write_speaking
from ..ports import free_port

RECIPE = """
name = "tiny"
deepspeed = "zero2.json"
[augment]
seeds = "seeds.jsonl"
[model]
base = "base"
precision = "fp32"
[sft]
{lora}
[evaluate]
max_new_tokens = 16
[serve]
port = {port}
prompt = "畫 sea"
max_batch = 4
"""


IDENTITY = "hub:tiny/base@0"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(base folder, {adapter name: its folder, with what training would have recorded of it})"""
    base, adapters = build_tiny(tmp_path_factory.mktemp("served"))
    for folder in adapters.values():
        recorded(base, folder, IDENTITY)
    return base, adapters


@pytest.fixture(scope="session")
def spec(tiny, tmp_path_factory):
    base, adapters = tiny
    store = AdapterStore(tmp_path_factory.mktemp("store"))
    for name, folder in adapters.items():
        store.add(name, folder, {"recipe": name})
    return ServeSpec(str(base), None, "fp32", IDENTITY, str(adapters["one"]), str(store.root), ("one", "two"), max_batch=4)


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    """Of a base that sees images, and its adapter "words", which is served without a verdict."""
    root = tmp_path_factory.mktemp("seeing")
    base = write_speaking(root / "base")
    words = write_adapter(base, root / "words", Lora(r=4, alpha=8, targets=("q_proj", "v_proj", "down_proj")), seed=1)
    load_tokenizer(str(base)).save_pretrained(words, save_jinja_files=False)
    store = AdapterStore(root / "store")
    store.note(store.add("words", words, {}).id, override="it was never trained")
    return ServeSpec(str(base), None, "fp32", "hub:tiny/seeing@0", str(base), str(store.root), ("words",), max_batch=8, image_pixels=40_000)


@pytest.fixture(scope="session")
def eight(tiny, tmp_path_factory):
    """Folders of eight adapters, a0 to a7."""
    root = tmp_path_factory.mktemp("eight")
    for seed in range(8):
        folder = random_adapter(tiny[0], Lora(r=4 + 4 * (seed % 2), alpha=8), root / f"a{seed}", 10 + seed)
        recorded(tiny[0], folder, IDENTITY)
    return [root / f"a{seed}" for seed in range(8)]


class Listening:
    """An app on a port of its own, in a thread."""

    def __init__(self, app):
        self.port = free_port()
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error", backlog=1024))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        wait_until_ready("127.0.0.1", self.port, None, time.monotonic() + 60)
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture(scope="module")
def listening(spec, eight, tmp_path_factory):
    """serve(**settings) -> a context that gives the URL of a server of the base and eight adapters."""
    store = AdapterStore(tmp_path_factory.mktemp("listening"))
    for folder in eight:
        store.add(folder.name, folder, {})

    def serve(**settings):
        own = {"store": str(store.root), "ready": tuple(f.name for f in eight), **settings}
        return Listening(build(Runner(dataclasses.replace(spec, **own))))

    return serve


@pytest.fixture(scope="module")
def finished(spec):
    """make(trained folder, line of [sft]) -> the Plan of a recipe whose every stage before `serve` is complete."""
    roots = []

    def make(trained, lora=""):
        roots.append(root := Path(tempfile.mkdtemp(prefix="graft-")))  # not pytest's folder: Ray's sockets need a short path
        shutil.copytree(spec.base, root / "base")
        (root / "seeds.jsonl").write_text("{}\n")
        (root / "zero2.json").write_text("{}")
        (root / "tiny.toml").write_text(RECIPE.format(port=free_port(), lora=lora))
        plan = Plan(root / "tiny.toml", root=root)
        for stage in ("augment", "prepare", "shard-sft", "sft"):
            with plan.resolve(stage).writing() as draft:
                if stage == "sft":
                    shutil.copytree(trained, draft.path, dirs_exist_ok=True)
                    if (draft.path / "parity.json").exists():
                        recorded(spec.base, draft.path, plan.base_identity())
        return plan

    yield make
    for root in roots:
        shutil.rmtree(root)


@pytest.fixture(scope="session")
def process():
    """launch(code, plan): Python in a process of its own, with Ray's home and sessions in the plan's folder.

    Ray's token mode outlives `ray.shutdown` in a process and its token lies in HOME: one process, one home, one Ray.
    """

    def launch(code, plan):
        env = {
            k: v for k, v in os.environ.items() if k not in ("GRAFT_API_KEY", "GRAFT_ADMIN_KEY", "OPENAI_BASE_URL", "RAY_ADDRESS", "RAY_AUTH_MODE")
        }
        env |= {"HOME": str(plan.root), "RAY_TMPDIR": str(plan.root), "OMP_NUM_THREADS": "1"}
        code = "import sys; from graft.core.stages import Plan; plan = Plan(sys.argv[1], root=sys.argv[2])\n" + code
        return subprocess.Popen([sys.executable, "-c", code, plan.path, plan.root], stdout=subprocess.PIPE, text=True, env=env)

    return launch
