"""A finished sft run says what its adapter does to its canaries, and is in the store under the recipe's name."""

import json

import numpy as np
import pytest

from graft.core.artifact import sha256_file
from graft.core.shards import Bin, ShardSet
from graft.core.stages import Plan
from graft.core.store import AdapterStore
from graft.engine.hf import HFEngine
from graft.model.chat import load_tokenizer
from graft.model.images import ImageProcessor
from graft.model.lora import in_tower, read_adapter
from graft.serve.canaries import seen
from graft.train import parity as training
from graft.train.parity import MOST_TARGETS, documents, packed, pictured

from .small import small_plan, train
from .small_vision import as_trained, vision_plan


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


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return vision_plan(tmp_path_factory.mktemp("seen"))


def effect(canary):
    return np.array(canary["adapter"]) - canary["base"]


def test_the_engine_finds_the_effect_on_rows_with_images_again(plan, tmp_path):
    version = AdapterStore(tmp_path / "served").add("seen", as_trained(plan, tmp_path / "adapter"), {})
    parity = json.loads((version.folder / "parity.json").read_text())
    base, pixels = str(plan.beside("base")), plan.recipe.shard.image_pixels
    assert parity["image_processor"] == ImageProcessor(base, None, pixels).settings() == ImageProcessor(str(version.folder), None, pixels).settings()
    engine = HFEngine(base, None, "fp32", {"a": version.folder}, load_tokenizer(str(version.folder)), device="cpu", image_pixels=pixels)
    kept = {f for c in parity["canaries"] for f in (image["file"] for image in c.get("images", []))}
    assert kept and kept == {f.name for f in version.folder.iterdir() if sha256_file(f) == f.stem}
    for canary in parity["canaries"]:
        first, images = min(canary["at"]), seen(version, canary, engine.processor)
        assert bool(images) == ("images" in canary) and np.abs(effect(canary)).max() > 0.01
        for name, recorded in (("a", canary["adapter"]), (None, canary["base"])):
            scores = engine.score(canary["ids"], first, name, images)
            assert np.abs(np.array([scores[at - first] for at in canary["at"]]) - recorded).max() < 1e-4


def test_an_adapter_of_the_tower_alone_has_an_effect_on_images_and_none_on_text(plan, tmp_path):
    of_tower = Plan(plan.path, ("sft.lora={ r = 4, alpha = 8, targets = [] }",), plan.root)
    folder = as_trained(of_tower, tmp_path / "adapter")
    canaries = json.loads((folder / "parity.json").read_text())["canaries"]
    assert all(map(in_tower, read_adapter(folder)[1]))
    assert {"images" in c for c in canaries} == {True, False}
    assert all(np.abs(effect(c)).max() > 0.01 if "images" in c else not effect(c).any() for c in canaries)


def test_the_smallest_images_are_canaries_and_one_at_least(plan, monkeypatch):
    folder = plan.artifact("shard-sft").path
    shards = ShardSet.open(folder / "train")
    size = {b.images: sum((folder / "images" / i.file).stat().st_size for i in b.images) for i in range(len(shards)) if (b := shards.bin(i)).images}
    smallest = sorted(size.values())
    assert [size[b.images] for b in pictured(shards, folder / "images")] == smallest[: training.IMAGE_ROWS]
    for most, kept in ((smallest[0] + smallest[1], 2), (1, 1)):
        monkeypatch.setattr(training, "IMAGE_BYTES", most)
        assert len(pictured(shards, folder / "images")) == kept
    for limit in ("MAX_IMAGES", "MAX_IMAGE_BYTES"):  # what a store would not take
        with monkeypatch.context() as patch:
            patch.setattr(training, limit, 0)
            assert not pictured(shards, folder / "images")
    monkeypatch.setattr(training, "MOST_TARGETS", 1)
    assert [int(b.loss_mask.sum()) for b in pictured(shards, folder / "images")] == [1]
