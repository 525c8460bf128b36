"""The same loop over image rows: exact resume, the same loss however a batch is split, images decoded beside the steps and verified."""

import json
import time

import numpy as np
import pytest
import torch

from graft.core.artifact import sha256_file
from graft.core.errors import ArtifactError, ConfigError
from graft.core.metrics import read_metrics
from graft.core.recipe import Train
from graft.core.shards import ShardSet
from graft.core.stages import Plan
from graft.model.base import random_llama
from graft.model.chat import IMAGE, load_tokenizer
from graft.model.images import ImageProcessor
from graft.model.lora import adapters, in_tower
from graft.model.vision import positions
from graft.train.build import build
from graft.train.feed import ImageFeed, feed_of
from graft.train.fit import refuse_misfits
from graft.train.pictures import Pictures

from ..model.test_lora_packed import SHAPE
from .forked import Host
from .small import curve
from .small_vision import vision_plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def host():
    started = Host()
    yield started
    started.close()


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return vision_plan(tmp_path_factory.mktemp("seen"))


@pytest.fixture(scope="module")
def model(plan):
    return build(*plan.base_model("sft"), "fp32", plan.recipe.train_stage("sft"), 0, CPU)


def pictures(plan, lm):
    folder = plan.artifact("shard-sft").path
    return Pictures(folder, ImageProcessor(str(plan.beside("base")), None, plan.recipe.shard.image_pixels), lm, 1), ShardSet.open(folder / "train")


def weights(plan):
    return sha256_file(plan.artifact("sft").path / "adapter_model.safetensors")


def numbers(plan):
    return [
        (m["step"], m["loss"], m["grad_norm"], m["lr"], m["targets"], m["images"], m.get("validation_loss"))
        for m in read_metrics(plan.artifact("sft").path / "metrics.jsonl")
    ]


@pytest.mark.parametrize(("world", "vision"), [(2, False), (1, True)])
def test_two_steps_and_two_more_are_four_bitwise(tmp_path, host, world, vision):
    overrides = ("sft.train_vision=true",) if vision else ()
    whole, resumed = (vision_plan(tmp_path / name, *overrides) for name in ("whole", "resumed"))
    host.train(whole, world)
    host.train(resumed, world, lose_after=2)
    assert resumed.resolve("sft").artifact is None
    host.train(resumed, world)
    assert weights(whole) == weights(resumed) and numbers(whole) == numbers(resumed)
    assert [m[0] for m in numbers(whole)] == [0, 1, 2, 3] and all(m[5] >= 2 for m in numbers(whole))
    told = json.loads((whole.artifact("sft").path / "parity.json").read_text())
    image = load_tokenizer(str(whole.beside("base"))).convert_tokens_to_ids(IMAGE)
    canaries = told["canaries"]
    assert {bool(c.get("images")) for c in canaries} == {True, False} and all((image in c["ids"]) == bool(c.get("images")) for c in canaries)


def test_full_weights_resume_bitwise_and_become_a_base_that_sees(tmp_path, host):
    plans = [vision_plan(tmp_path / name, "sft.lora=false", "sft.train_vision=true", "sft.lr=1e-3") for name in ("whole", "resumed")]
    host.train(plans[0], 2)
    host.train(plans[1], 2, lose_after=2)
    host.train(plans[1], 2)
    whole, resumed = (plan.artifact("sft").path for plan in plans)
    assert sha256_file(whole / "model.safetensors") == sha256_file(resumed / "model.safetensors")
    assert ImageProcessor(str(whole), None, 10_000).factor == 28
    before, after = (build(str(f), None, "fp32", Train(lora=None, train_vision=True), 0, CPU).lm for f in (plans[0].beside("base"), whole))
    for name, trained in after.named_parameters():
        assert not torch.equal(trained, before.get_parameter(name)), f"{name} is trained too"


def test_however_a_batch_is_split_loss_and_gradient_are_the_same(tmp_path, host):
    found = {}
    for world, micro in ((1, 4), (1, 1), (2, 2), (4, 1)):
        plan = vision_plan(tmp_path / f"{world}-{micro}", f"sft.micro_batch={micro}")
        host.train(plan, world)
        found[world, micro] = np.array([row[1:3] for row in curve(plan.artifact("sft").path)])
    for split, rows in found.items():
        np.testing.assert_allclose(rows, found[1, 4], rtol=1e-5, err_msg=str(split))


def test_adapters_frozen_towers_and_trained_ones(plan, model):
    assert not any(in_tower(name) for name, *_ in adapters(model.lm))
    for vision, trained in ((False, False), (True, True)):
        lm = build(*plan.base_model("sft"), "fp32", Train(lora=None, train_vision=vision), 0, CPU).lm
        assert {p.requires_grad for name, p in lm.named_parameters() if in_tower(name)} == {trained}
        assert all(p.requires_grad for name, p in lm.named_parameters() if not in_tower(name))


def test_a_base_of_text_is_refused_in_one_line(plan, tmp_path):
    random_llama(SHAPE, 300, 256, 0).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no vision tower: leave it out, or name a Qwen2\.5-VL model"):
        build(str(tmp_path), None, "fp32", Train(train_vision=True), 0, CPU)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((plan.beside("base") / name).read_bytes())
    folder = plan.artifact("shard-sft").path / "train"
    with pytest.raises(ConfigError, match=r"has rows with images, and .* sees none"):
        refuse_misfits([(folder, ShardSet.open(folder))], Plan(plan.path, (f"model.base='{tmp_path}'",), plan.root), "sft")


def test_a_micro_batch_is_cut_to_its_longest_row_and_counted_as_the_model_does(plan, model):
    maker, shards = pictures(plan, model.lm)
    rows = [shards.bin(i) for i in range(4)]
    batch = maker.collate(rows)
    longest = max(int(b.doc_lens[0]) for b in rows)
    assert batch.text.input_ids.shape[1] == min(-(-longest // 64) * 64, 192)
    for n, b in enumerate(rows):
        used = int(b.doc_lens[0])
        ids, grids = torch.from_numpy(b.input_ids[:used]).long(), torch.tensor([i.grid for i in b.images], dtype=torch.long).view(-1, 3)
        assert torch.equal(batch.text.position_ids[:, n, :used], positions(model.lm, ids, grids))
    assert batch.pixels.shape == (sum(int(np.prod(i.grid)) for b in rows for i in b.images), 1176)


def test_images_are_decoded_before_their_step(plan, model):
    job = plan.resolve("sft")
    shards = ShardSet.open(plan.artifact("shard-sft").path / "train")
    feed = feed_of(job, model.lm, 3, shards, 0, 4, 2, 1, 0, CPU)
    assert isinstance(feed, ImageFeed)
    feed.take(0)
    waiting = [f for some in feed.pictures._waiting.values() for f in some]
    assert len(waiting) >= 4, "of the two steps that follow"
    end = time.monotonic() + 60
    while not all(f.done() for f in waiting) and time.monotonic() < end:
        time.sleep(0.01)
    decoded = feed.pictures._patches
    feed.pictures._patches = None  # whoever decoded now would fail
    feed.take(1)
    feed.take(2)
    feed.pictures._patches = decoded
    assert not feed.pictures._waiting, "nothing beyond the last step"


def test_an_altered_a_lost_and_another_image_are_named(tmp_path):
    plan = vision_plan(tmp_path)
    lm = build(*plan.base_model("sft"), "fp32", plan.recipe.train_stage("sft"), 0, CPU).lm
    maker, shards = pictures(plan, lm)
    b = next(b for i in range(len(shards)) if (b := shards.bin(i)).images)
    path = maker.folder / b.images[0].file
    maker.processor = ImageProcessor(str(plan.beside("base")), None, 4000)
    with pytest.raises(ArtifactError, match=r"becomes 16 patches, the shards say \(1, 8, 8\): shard.image_pixels or the base changed"):
        maker.collate([b])
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ArtifactError, match="was altered: its SHA-256 is not its name; make the shards again"):
        maker.collate([b])
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{path.name} cannot be read"):
        maker.collate([b])
