"""Rows with images through a tiny random Qwen2.5-VL: transformers' own forward is what everything is held against."""

import json

import pytest
import torch
import torch.nn.functional as F

from graft.core.recipe import Lora
from graft.model.base import load_base
from graft.model.blocks import fuse_blocks
from graft.model.images import ImageProcessor
from graft.model.lora import adapters, in_tower, inject, merge_into, read_adapter, save_adapter
from graft.model.packed import PackedBatch
from graft.model.stream import load_fused
from graft.model.tower import Borders, attend, fuse_tower, laid_out
from graft.model.vision import ImageBatch, VisionLM, positions, tower
from graft.train.sizing.needs import Shape

from .tiny_vision import IMAGE, row, tiny, write

CPU = torch.device("cpu")
SIZES = {"one": [(112, 112)], "two of other shapes": [(140, 56), (300, 200)], "none": []}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def processor(base):
    return ImageProcessor(base, None, 100_000)


def batch(lm, rows, length):
    """Rows of (ids, pixels, grids), padded to `length`; every token but the first is a target."""
    ids, where = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(3, len(rows), length, dtype=torch.long)
    ends, at, targets = [0], [], []
    for n, (own, _, grids) in enumerate(rows):
        ids[n, : len(own)], where[:, n, : len(own)] = own, positions(lm, own, grids)
        ends += [n * length + len(own), (n + 1) * length]
        at += range(n * length, n * length + len(own) - 1)
        targets += own[1:].tolist()
    text = PackedBatch(ids, where, torch.tensor(ends, dtype=torch.int32), torch.tensor(length), torch.tensor(at), torch.tensor(targets))
    pixels = [p for _, p, grids in rows if len(grids)]
    if not pixels:
        return ImageBatch(text, torch.empty(0), None)
    return ImageBatch(text, torch.cat(pixels), laid_out(lm.config.vision_config, torch.cat([grids for *_, grids in rows])))


def logits(lm, ids, pixels, grids):
    """transformers' plain forward of one row."""
    seen = {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": (ids == IMAGE).int()[None]} if len(grids) else {}
    return lm(input_ids=ids[None], **seen).logits[0]


@pytest.mark.parametrize("backend", [None, "reference"])
@torch.no_grad()
def test_logits_and_loss_are_those_of_the_plain_forward(processor, backend):
    lm = tiny()
    rows = [row(processor, sizes, seed) for seed, sizes in enumerate(SIZES.values())]
    wanted = [logits(lm, *r) for r in rows]
    model, b = VisionLM(lm, backend), batch(lm, rows, 192)
    found = lm.lm_head(model._supervised(b))
    torch.testing.assert_close(found, torch.cat([w[:-1] for w in wanted]), rtol=1e-5, atol=1e-5)
    loss = sum(F.cross_entropy(w[:-1], own[1:], reduction="sum") for w, (own, *_) in zip(wanted, rows, strict=True))
    torch.testing.assert_close(model(b), loss, rtol=1e-5, atol=1e-4)
    changed = batch(lm, [(own, pixels * 0.5, grids) for own, pixels, grids in rows], 192)
    assert (lm.lm_head(model._supervised(changed))[: len(rows[0][0]) - 1] - wanted[0][:-1]).abs().max() > 1e-3, "it sees the pixels"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_windows_of_a_gpu_are_those_of_the_cpu(processor):
    at, draw = laid_out(tiny().config.vision_config, torch.tensor([[1, 20, 26], [1, 8, 6]])), torch.Generator().manual_seed(0)
    given = [torch.randn(568, 4, 80, generator=draw).bfloat16() for _ in range(3)]
    for borders in (at.windows, at.whole):
        on_gpu = Borders(borders.cu.cuda(), borders.longest)
        found = attend(*(x.cuda() for x in given), on_gpu, 0.1).cpu().float()
        assert (found - attend(*(x.float() for x in given), borders, 0.1)).norm() < 1e-2 * found.norm()


@torch.no_grad()
def test_a_batch_of_text_alone_is_taken_as_a_text_models(processor):
    lm = tiny()
    own, pixels, grids = row(processor, [])
    seen = batch(lm, [(own, pixels, grids)], 16)
    plain = seen.text._replace(position_ids=seen.text.position_ids[0])
    torch.testing.assert_close(VisionLM(lm)(plain), VisionLM(lm)(seen), rtol=1e-6, atol=1e-6)


def test_adapters_are_on_the_language_part_alone_unless_the_recipe_says_otherwise(base, processor):
    for vision in (False, True):
        lm = load_base(base, None, "fp32", CPU)
        inject(lm, Lora(r=4), torch.float32, 0, vision)
        names = [name for name, *_ in adapters(lm)]
        assert any(map(in_tower, names)) is vision and sum(not in_tower(n) for n in names) == 7 * 2
        assert all(p.requires_grad is (n.rpartition(".")[2] in "AB") for n, p in lm.named_parameters())
        if vision:
            assert sum(map(in_tower, names)) == 5 * 3 + 2, "of each block qkv, proj and the MLP, and two of the merger"


@pytest.mark.parametrize("vision", [False, True])
def test_the_layers_of_a_gpu_give_the_loss_and_gradients_of_transformers(base, processor, vision):
    lora = Lora(r=4, alpha=8)
    plain = load_base(base, None, "fp32", CPU)
    inject(plain, lora, torch.float32, 3, vision)
    fused = load_fused(base, None, "fp32", lora, CPU, 3, vision)
    fuse_blocks(fused)
    assert all(all(layer.halves) for layer in fused.model.language_model.layers)
    if not vision:
        fuse_tower(tower(fused))
    pairs = {name: pair for name, *pair in adapters(plain)}
    for name, a, b in adapters(fused):
        assert torch.equal(a, pairs[name][0])
        with torch.no_grad():
            pairs[name][1].normal_(std=0.1)
            b.copy_(pairs[name][1])
    rows = [row(processor, sizes, seed) for seed, sizes in enumerate(SIZES.values())]
    loss = sum(F.cross_entropy(logits(plain, *given)[:-1], given[0][1:], reduction="sum") for given in rows)
    found = VisionLM(fused, "reference")(batch(plain, rows, 192))
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    loss.backward()
    found.backward()
    held = fused.adapters.flat
    held.data = held.grad  # of which every pair is a view
    for name, *pair in adapters(fused):
        for one, other in zip(pair, pairs[name], strict=True):
            assert (one - other.grad).norm() < 1e-4 * other.grad.norm(), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_as_the_whole_model_says_whatever_its_text_part_says(tied, tmp_path):
    model = tiny()
    model.config.tie_word_embeddings, model.config.text_config.tie_word_embeddings = tied, not tied
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del told["text_config"]["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(told), encoding="utf-8")
    lm = load_fused(str(tmp_path), None, "fp32", None, CPU, 0)
    assert torch.equal(lm.lm_head.weight, model.lm_head.weight)
    assert (lm.lm_head.weight is lm.model.language_model.embed_tokens.weight) is tied
    assert Shape.of(told).tied is tied


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nf4"])
def test_a_tower_is_not_quantised(base, processor, precision):
    rows = [row(processor, [(112, 112)])]
    for of_gpu in (False, True):
        lm = load_fused(base, None, precision, Lora(r=4), CPU, 0) if of_gpu else load_base(base, None, precision, CPU)
        kinds = {type(m).__name__ for name, m in lm.named_modules() if in_tower(name) and hasattr(m, "in_features")}
        assert kinds == {"Linear"} and lm.model.visual.patch_embed.proj.weight.dtype == torch.bfloat16
        if of_gpu:
            fuse_blocks(lm)
            fuse_tower(tower(lm))
        with torch.no_grad():
            torch.testing.assert_close(
                VisionLM(lm, "reference" if of_gpu else None)(batch(lm, rows, 64)), VisionLM(tiny())(batch(lm, rows, 64)), rtol=0.05, atol=0
            )


@pytest.mark.parametrize("vision", [False, True])
def test_peft_and_merged_weights_give_the_saved_adapters_logits(base, processor, tmp_path, vision):
    peft = pytest.importorskip("peft")
    lm = load_base(base, None, "fp32", CPU)
    inject(lm, Lora(r=4, alpha=8), torch.float32, 0, vision)
    with torch.no_grad():
        for _, _, b in adapters(lm):
            b.normal_(std=0.2)
    save_adapter(lm, Lora(r=4, alpha=8), tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(load_base(base, None, "fp32", CPU), tmp_path)
    given = row(processor, [(112, 112)])
    merged = load_base(base, None, "fp32", CPU)
    for name, w in merge_into(lambda name: merged.get_submodule(name).weight.data, *read_adapter(tmp_path)).items():
        merged.get_submodule(name).weight.data = w
    with torch.no_grad():
        own = lm.lm_head(VisionLM(lm)._supervised(batch(lm, [given], 64)))
        for other in (theirs, merged, lm):
            torch.testing.assert_close(logits(other, *given)[:-1], own, rtol=1e-5, atol=1e-5)
        assert (logits(tiny(), *given)[:-1] - own).abs().max() > 1e-3


def test_a_trained_tower_has_gradients_of_rows_without_images_too(base, processor):
    given = batch(tiny(), [row(processor, [])], 16)
    lm = tiny()
    frozen = VisionLM(lm)(given)
    for trained in (False, True):
        lm.model.visual.requires_grad_(trained)
        lm.zero_grad()
        loss = VisionLM(lm)(given)
        loss.backward()
        assert torch.equal(loss, frozen)
        gradients = [p.grad for p in lm.model.visual.parameters()]
        assert all(g is not None and not g.any() for g in gradients) if trained else gradients == [None] * len(gradients)
