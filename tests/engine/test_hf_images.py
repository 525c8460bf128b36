"""Rows with images in the engine, against transformers' generate and peft, and against themselves alone."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from PIL import Image

from graft.core.errors import ConfigError, DataError
from graft.core.recipe import Lora
from graft.data import drawings
from graft.engine.hf import HFEngine
from graft.engine.prompt import prompt
from graft.engine.protocol import Request, Scored
from graft.engine.start import start
from graft.model.base import load_base
from graft.model.chat import load_tokenizer

from ..model.tiny_vision import write_adapter, write_speaking

MOST = 40_000  # pixels
LORAS = {"words": (Lora(r=4, alpha=8, targets=("q_proj", "v_proj", "down_proj")), False), "sight": (Lora(r=8, alpha=8, targets=("o_proj",)), True)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_speaking(tmp_path_factory.mktemp("seeing") / "base")


@pytest.fixture(scope="module")
def adapters(base):
    return {name: write_adapter(base, base.parent / name, lora, seed, vision) for seed, (name, (lora, vision)) in enumerate(LORAS.items())}


@pytest.fixture(scope="module")
def engine(base, adapters):
    return HFEngine(str(base), None, "fp32", adapters, load_tokenizer(str(base)), device="cpu", max_batch=5, image_pixels=MOST)


def pictures(*sizes):
    rows = drawings.rows(len(sizes), seed=sum(w for w, _ in sizes))
    return [Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB").resize(size) for row, size in zip(rows, sizes, strict=True)]


def asked(engine, text, images, **other):
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    ids, seen = prompt(engine.tokenizer, [{"role": "user", "content": parts}], engine.processor, images)
    return Request(ids, **({"max_new_tokens": 9} | other), images=seen, ends=())


@pytest.fixture(scope="module")
def mixed(engine):
    """With no image, one or two, of several sizes, of the base and both adapters, greedy and sampled; more rows than one batch holds."""
    shown = [[], [(112, 112)], [(60, 200)], [(300, 80), (56, 56)], [(112, 112)]]
    return [
        asked(engine, "What is drawn?"[: 9 + n], pictures(*sizes), adapter=adapter, temperature=t, seed=n, max_new_tokens=6 + n)
        for n, sizes in enumerate(shown)
        for adapter, t in ((None, 0.0), ("words", 0.0), ("sight", 0.0), ("sight", 1.2))
    ]


def test_a_row_does_not_depend_on_its_batch_mates(engine, mixed):
    together = engine.generate(mixed)
    assert together == [engine.generate([r])[0] for r in mixed]
    by_adapter = [tuple(map(tuple, (c.token_ids for c in together[4 + k :: 4]))) for k in range(4)]
    assert len(set(by_adapter)) == 4, "the base, both adapters and sampling all differ"


@pytest.mark.parametrize("name", [None, *LORAS])
def test_greedy_tokens_and_scores_equal_those_of_peft(base, adapters, engine, mixed, name):
    model = load_base(str(base), None, "fp32", "cpu")
    if name:
        model = PeftModel.from_pretrained(model, adapters[name]).eval()
    for request in [r for r in mixed if r.adapter == name and not r.temperature]:
        ids = torch.tensor([request.prompt_ids])
        given = {"attention_mask": torch.ones_like(ids)}
        if request.images:
            kinds = (ids == engine.model.config.image_token_id).int()
            pixels = torch.cat([torch.from_numpy(i.patches) for i in request.images])
            given |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([i.grid for i in request.images]), "mm_token_type_ids": kinds}
        with torch.inference_mode():
            wanted = model.generate(
                input_ids=ids, **given, max_new_tokens=request.max_new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0].tolist()
        found = engine.generate([request])[0].token_ids
        assert request.prompt_ids + found == wanted
        given["attention_mask"] = torch.ones(1, len(wanted), dtype=torch.long)
        if request.images:
            given["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, len(found))], 1)
        with torch.inference_mode():
            logprobs = model(input_ids=torch.tensor([wanted]), **given).logits[0].log_softmax(-1)
        first = len(request.prompt_ids)
        reference = [logprobs[at - 1, wanted[at]].item() for at in range(first, len(wanted))]
        assert engine.score(wanted, first, name, request.images) == pytest.approx(reference, abs=2e-5)


def test_scores_of_many_are_those_of_each_alone(engine, mixed):
    texts = [Scored(r.prompt_ids, len(r.prompt_ids) - 6, r.images) for r in mixed[::4]]
    together = engine.scores(texts, "sight")
    for own, text in zip(together, texts, strict=True):
        assert own == pytest.approx(engine.score(text.ids, text.first, "sight", text.images), abs=1e-5)


def test_it_sees_the_pixels_and_their_place(engine):
    one, other = pictures((112, 112), (112, 112))
    asks = [asked(engine, "Which?", [a, b]) for a, b in ((one, other), (other, one), (one, one))]
    assert len({tuple(engine.score(r.prompt_ids, len(r.prompt_ids) - 3, None, r.images)) for r in asks}) == 3


def test_what_cannot_be_shown_is_named(engine, tiny):
    whole = asked(engine, "What?", pictures((112, 112)))
    needed = engine.processor.tokens(whole.images[0].grid)
    with pytest.raises(DataError, match=f"holds {needed} tokens that stand for images, and its 0 images need 0"):
        engine.generate([replace(whole, images=())])
    with pytest.raises(DataError, match=f"holds {needed} .* 2 images need {2 * needed}"):
        engine.generate([replace(whole, images=whole.images * 2)])
    with pytest.raises(ConfigError, match=r'serve\.engine = "hf"'):
        start("vllm", str(engine.model.config._name_or_path), None, "fp32", engine.tokenizer, max_batch=1, max_adapters=0, max_rank=8)
    text_alone, _ = tiny
    blind = HFEngine(str(text_alone), None, "fp32", {}, load_tokenizer(str(text_alone)), device="cpu")
    with pytest.raises(DataError, match="sees none"):
        prompt(blind.tokenizer, [{"role": "user", "content": [{"type": "image"}]}], blind.processor, pictures((56, 56)))
    with pytest.raises(DataError, match="shows none to its model"):
        blind.generate([replace(whole, prompt_ids=[5, 6])])
