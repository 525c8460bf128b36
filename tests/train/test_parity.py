"""A finished sft run says what its adapter does to its canaries, and is in the store under the recipe's name."""

import json

import numpy as np
import pytest

from graft.core.shards import Bin
from graft.core.store import AdapterStore
from graft.engine.hf import HFEngine
from graft.model.chat import load_tokenizer
from graft.train.parity import MOST_TARGETS, documents, packed

from .small import small_plan, train


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_engine_finds_the_recorded_effect_again(tmp_path, keep):
    more = ("sft.keep=best",) if keep == "best" else ()
    plan = small_plan(tmp_path, "sft.lora={ r = 4, alpha = 8, dropout = 0.3 }", "sft.max_steps=8", *more)
    artifact = train(plan, 1)
    parity = json.loads((artifact.path / "parity.json").read_text())
    assert parity["base"] == plan.base_identity() and parity["precision"] == "fp32" and parity["special_tokens"]["3"] == "<|pad|>"
    version = AdapterStore(plan.served).verified("small")
    assert version.about["lineage"]["fingerprint"] == artifact.manifest["fingerprint"] and "parity.json" in version.about["files"]
    engine = HFEngine(str(tmp_path / "base"), None, "fp32", {"a": version.folder}, load_tokenizer(str(version.folder)), device="cpu")
    count = 0
    for canary in parity["canaries"]:
        first = min(canary["at"])
        for name, recorded in (("a", canary["adapter"]), (None, canary["base"])):
            scores = engine.score(canary["ids"], first, name)
            assert np.abs(np.array([scores[at - first] for at in canary["at"]]) - recorded).max() < 1e-4
        count += len(canary["at"])
        assert np.abs(np.array(canary["adapter"]) - canary["base"]).max() > 0.01
    assert count >= 2


def test_canaries_are_packed_as_far_as_they_fit():
    found = packed([([1, 2, 3], [0, 1, 1]), ([4] * 9, [0] * 8 + [1]), ([5, 6], [1, 0]), ([7, 8], [0, 1])], 6)
    assert found.doc_lens.tolist() == [3, 2] and found.input_ids.tolist() == [1, 2, 3, 7, 8, 0] and found.loss_mask.tolist() == [0, 1, 1, 0, 1, 0]
    assert packed([([1] * 9, [1] * 9)], 6) is None
    assert packed(documents(Bin(np.arange(6), np.ones(6, np.uint8), np.array([2, 3]))), 6).doc_lens.tolist() == [2, 3]
    long = packed([([1] * 900, [1] * 900), ([2] * 20, [1] * 20)], 4096)
    assert long.doc_lens.tolist() == [900, 20] and long.loss_mask.sum() == MOST_TARGETS and not long.loss_mask[0]
