"""One run that several tests look at: the whole recipe in small, every key planted, killed once on the way."""

import json
import secrets
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from ..data.api.faulty import FaultyEndpoint
from .kills import RAY_AGENTS, SMALL, begun, command, kill
from .leaks import new_key
from .rayapi import RayApi
from .tree import Tree

KEYS = ("OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "GRAFT_API_KEY")
OVERRIDES = [
    *SMALL,
    *(f"{stage}.max_steps=4" for stage in ("cpt", "sft")),
    "tracking.wandb=offline",
    "api.prices={gpt-4o-mini = {input = 1.0, output = 4.0}}",
]
KILLED_IN = "base"


@pytest.fixture(scope="session")
def pipeline():
    """A tree after `graft run`, a kill in training and `graft run` again, with `keys`, `marker` (in a seed's text) and `api`, what Ray said meanwhile."""
    root = Path(tempfile.mkdtemp(prefix="graft-"))  # short: Ray's socket paths have a limit of 107 bytes
    keys = {name: new_key(name) for name in KEYS}
    (root / "tmp").mkdir()
    report = {"RAY_metrics_report_interval_ms": "1000"}  # the default of 10 s is as long as the asking
    tree = Tree(root, {**keys, **report, "TMPDIR": str(root / "tmp"), "RAY_TMPDIR": str(root / "tmp")})
    tree.keys, tree.marker, tree.root, tree.overrides = keys, f"seed-{secrets.token_hex(20)}", root, tuple(OVERRIDES)
    seed = [{"role": "user", "content": f"請畫一座叫{tree.marker}的島"}, {"role": "assistant", "content": 'call("generate_image", {"prompt": "島"})'}]
    seeds = tree.path / "configs/recipes/image-intent/seeds.jsonl"  # at the head: the last families may not be needed
    seeds.write_text(json.dumps({"messages": seed}, ensure_ascii=False) + "\n" + seeds.read_text())
    tree.api = RayApi(tree, root / "tmp", root / "answers")
    with FaultyEndpoint(api_key=keys["OPENAI_API_KEY"], latency_s=3, log=root / "server.jsonl") as server:
        tree.extra["OPENAI_BASE_URL"] = server.base_url
        killed, asked_s = False, 0.0
        for _ in range(2):
            process = tree.start(*command(tree, OVERRIDES))
            deadline = time.monotonic() + 400
            while process.poll() is None and not (not killed and begun(tree, KILLED_IN)):
                assert time.monotonic() < deadline, tree.said()[-3000:]
                if time.monotonic() - asked_s >= 1:
                    tree.api.read()
                    asked_s = time.monotonic()
                time.sleep(0.1)
            if not killed:
                assert process.poll() is None, f"{KILLED_IN} was never seen: {tree.said()[-4000:]}"
                kill(tree, process, KILLED_IN, OVERRIDES)
                killed = True
        assert process.returncode == 0, tree.said()[-4000:]
        tree.statuses = server.report()["statuses"]
    tree.none_alive(within_s=60, but=RAY_AGENTS)
    yield tree
    shutil.rmtree(root, ignore_errors=True)
