"""The last stage of a recipe, run on artifacts as the stages before it would have left them."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from graft.core.errors import ServeError
from graft.core.store import AdapterStore
from graft.serve import probe
from graft.serve.app import spec_of

SCENE = """
import dataclasses, ray
from graft.core.errors import ServeError
from graft.serve import probe
from graft.serve.app import spec_of, start
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
try:
    start(dataclasses.replace(spec_of(plan), ready=("nobody",)))
except ServeError as e:
    (plan.root / "said").write_text(str(e))
probe.run(plan.resolve("serve"))
assert ray.is_initialized() and not ray.util.list_named_actors(all_namespaces=True)
ray.shutdown()
"""


@pytest.mark.campaign  # in the suite the quickstart runs this very stage
def test_the_stage_asks_the_served_adapter_and_keeps_the_reply(tiny, finished, process):
    """In a process that has a Ray of its own, which must outlive both a start that fails and one that works."""
    plan = finished(tiny[1]["two"])
    served = spec_of(plan)
    own = AdapterStore(Path(served.store)).get("tiny")
    assert (served.ready, served.own, served.base_name, served.base) == ((own.id,), own.id, "base", str(plan.root / "base"))
    assert own.about["lineage"]["fingerprint"] == plan.artifact("sft").manifest["fingerprint"]
    assert process(SCENE, plan).wait(150) == 0
    said = (plan.root / "said").read_text()
    assert "cannot be served" in said and "'nobody' does not exist" in said
    made = plan.artifact("serve")
    reply = json.loads((made.path / "reply.json").read_text())
    assert (reply["model"], reply["prompt"], reply["path"]) == (own.id, "畫 sea", "/v1/chat/completions")
    assert 0 < reply["first_token_s"] < 10 and made.counts["start_s"] > 0
    assert made.counts["reply"] == reply["reply"] != ""


def test_a_port_in_use_leaves_nothing_half_written(tiny, finished):
    job = finished(tiny[1]["one"]).resolve("serve")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", job.recipe.serve.port))
        taken.listen()
        with pytest.raises(ServeError, match="is in use"):
            probe.run(job)
    assert job.artifact is None and list(job.directory.parent.iterdir()) == []


def test_a_model_trained_whole_is_served_under_the_recipes_name(spec, finished):
    served = spec_of(finished(spec.base, "lora = false"), port=9)
    assert (served.base_name, served.own, served.ready, served.store) == ("tiny", "tiny", (), None) and served.port == 9
    assert served.base == served.tokenizer
