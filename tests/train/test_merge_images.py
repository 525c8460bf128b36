"""A merged Qwen2.5-VL is base + adapter, tower and language part, under the names that its files have everywhere."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.core.artifact import Artifact
from graft.core.errors import TrainError
from graft.core.recipe import Lora
from graft.data.tokenizer import VISION, train_tokenizer
from graft.model.base import load_base
from graft.model.images import ImageProcessor
from graft.model.lora import LoraLinear, in_tower, inject, read_adapter, save_adapter
from graft.model.stream import stored_as
from graft.train.merge import merge_folder

from ..model.tiny_vision import IMAGE, row, write


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(base, an adapter of it, tower included)."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    tokenizer = train_tokenizer(["What is drawn? 人人生而自由", "a bar chart"], 300, images=True)
    write(base, images={t: tokenizer.convert_tokens_to_ids(t) for t in VISION})
    tokenizer.save_pretrained(base, save_jinja_files=False)
    model = load_base(str(base), None, "fp32", "cpu")
    inject(model, lora := Lora(r=4, alpha=8), torch.float32, 0, vision=True)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.B, std=0.3)
    save_adapter(model, lora, adapter, str(base))
    return base, adapter


@torch.no_grad()
def logits(folder, adapter=None):
    model = load_base(str(folder), None, "fp32", "cpu")
    if adapter:
        inject(model, Lora(r=4, alpha=8), torch.float32, 0, vision=True)
        layers = dict(model.named_modules())
        for name, (a, b) in read_adapter(adapter)[1].items():
            layers[name].A.copy_(a)
            layers[name].B.copy_(b)
    ids, pixels, grids = row(ImageProcessor(str(folder), None), [(112, 112), (60, 90)])
    ids += (ids <= IMAGE) * (model.config.image_token_id - IMAGE)  # the three of images, in their order
    kinds = (ids == model.config.image_token_id).int()[None]
    return model(input_ids=ids[None], pixel_values=pixels, image_grid_thw=grids, mm_token_type_ids=kinds).logits[0]


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_the_merged_model_is_base_and_adapter(tiny, tmp_path, precision):
    base, adapter = tiny
    counts = merge_folder(adapter, str(base), None, precision, tmp_path / "merged")
    assert counts["layers"] == len(read_adapter(adapter)[1]) and any(map(in_tower, read_adapter(adapter)[1]))
    if precision == "fp32":
        wanted, got = logits(base, adapter), logits(tmp_path / "merged")
        assert (wanted - logits(base)).abs().max() > 0.1, "the adapter does something"
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    else:
        old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
        assert old.keys() == new.keys(), "the names of the base's own files"
        a, b = read_adapter(adapter)[1][name := "model.visual.blocks.0.attn.qkv"]
        wanted = old[f"{stored_as(name, load_base(str(base), None, 'fp32', 'cpu').config)}.weight"].bfloat16() + 2 * b @ a
        torch.testing.assert_close(new["visual.blocks.0.attn.qkv.weight"].float(), wanted, rtol=1e-2, atol=1e-2)  # a tower is not quantised
    artifact = Artifact.open(tmp_path / "merged")
    assert artifact.counts["logit_difference_max"] >= 0 and (tmp_path / "merged" / "preprocessor_config.json").is_file()


def test_a_tower_that_was_left_out_is_found(tiny, tmp_path, monkeypatch):
    base, adapter = tiny
    from graft.train.merge_weights import MergeBase

    whole = MergeBase.merged
    monkeypatch.setattr(MergeBase, "merged", lambda self, name, own: self.trained(name) if in_tower(name) else whole(self, name, own))
    with pytest.raises(TrainError, match="differs from base"):
        merge_folder(adapter, str(base), None, "fp32", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_names_that_transformers_gives_are_read_too(tiny, tmp_path):
    base, adapter = tiny
    other = tmp_path / "base"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = load_base(str(base), None, "fp32", "cpu").config
    names = {stored_as(name, config): name for name in load_base(str(base), None, "fp32", "cpu").state_dict()}
    save_file({names[k]: v for k, v in load_file(base / "model.safetensors").items()}, other / "model.safetensors", metadata={"format": "pt"})
    found = [merge_folder(adapter, str(b), None, "fp32", tmp_path / n) for n, b in (("one", base), ("two", other))]
    assert found[0]["kl_nats"] == found[1]["kl_nats"]
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["model_type"] == "qwen2_5_vl"
