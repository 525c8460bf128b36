"""The engine against its peers (peft, transformers' generate) and against itself (a row alone, a row among others)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_model import MAX_LENGTH
from transformers import DynamicCache

from graft.core.errors import ArtifactError, ConfigError, DataError
from graft.engine.hf import HALF, HFEngine, _left_pad, _Row
from graft.engine.protocol import Request
from graft.model.base import load_base
from graft.model.chat import load_tokenizer, render_prompt

PROMPTS = ["Draw", "What is the weather like today?", "幫我畫一隻在海邊散步的柴犬", "a" * 60, "sea", "今天", "me", "walking by the sea"]


@pytest.fixture(scope="module")
def mixed(engine):
    """Base and both adapters, greedy and sampled, of many lengths: more rows than one batch holds."""
    ids = [render_prompt(engine.tokenizer, [{"role": "user", "content": p}]) for p in PROMPTS]
    return [
        Request(p, 6 + 3 * i, temperature=t, top_p=0.95, seed=i, adapter=a)
        for i, p in enumerate(ids)
        for a, t in ((None, 0.0), ("one", 0.0), ("two", 0.0), ("two", 1.3))
    ]


def test_a_row_does_not_depend_on_its_batch_mates(engine, mixed):
    together = engine.generate(mixed)
    assert together == [engine.generate([r])[0] for r in mixed]
    by_adapter = [tuple(c.token_ids for c in together[k::4]) for k in range(4)]
    assert len(set(map(str, by_adapter))) == 4  # the base, both adapters and sampling all differ
    assert {c.finish_reason for c in together} == {"stop", "length"}


@pytest.mark.parametrize("name", [None, "one", "two"])
def test_logits_and_greedy_tokens_equal_those_of_peft(tiny, engine, name):
    base, adapters = tiny
    model = load_base(str(base), None, "fp32", "cpu")
    if name:
        model = PeftModel.from_pretrained(model, adapters[name]).eval()
    for text in PROMPTS[:4]:
        prompt = render_prompt(engine.tokenizer, [{"role": "user", "content": text}])
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt])).logits
            engine.rows.slots = torch.tensor([engine.slot_of[name]])
            ours = engine.model(torch.tensor([prompt])).logits
            seen = torch.ones(1, len(prompt), dtype=torch.long)  # else generate takes every token equal to the pad id for padding
            ends = sorted(engine.ends)
            tokens = model.generate(
                torch.tensor([prompt]), attention_mask=seen, max_new_tokens=24, do_sample=False, eos_token_id=ends, pad_token_id=0
            )
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert theirs.abs().max() > 1  # something was compared
        found = engine.generate([Request(prompt, 24, adapter=name)])[0]
        assert found.token_ids == [t for t in tokens[0, len(prompt) :].tolist() if t not in engine.ends]


def test_padding_changes_no_logits(engine):
    prompts = [[5, 6, 7], list(range(10, 50))]
    rows = [_Row(i, Request(p, 1, adapter="two"), engine) for i, p in enumerate(prompts)]
    engine.rows.slots = torch.tensor([engine.slot_of[r.request.adapter] for r in rows])
    ids, mask = _left_pad(prompts, engine.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        padded = engine.model(ids, attention_mask=mask, position_ids=positions, past_key_values=DynamicCache(config=engine.model.config)).logits[
            0, -1
        ]
        engine.rows.slots = torch.tensor([2])
        torch.testing.assert_close(padded, engine.model(torch.tensor(prompts[:1])).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_the_turn_ends_at_an_end_token_and_at_a_stop_text(engine):
    prompt = render_prompt(engine.tokenizer, [{"role": "user", "content": "sea"}])
    whole = engine.generate([Request(prompt, 30, temperature=1.0, seed=4)])[0]
    assert whole.completion_tokens > 12
    ends, engine.ends = engine.ends, frozenset({whole.token_ids[7]})
    cut = engine.generate([Request(prompt, 30, temperature=1.0, seed=4)])[0]
    engine.ends = ends
    first = whole.token_ids.index(whole.token_ids[7])
    assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:first], "stop")
    stop = whole.text[5:7]
    stopped = engine.generate([Request(prompt, 30, temperature=1.0, seed=4, stop=("never there", stop))])[0]
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert stopped.completion_tokens < whole.completion_tokens


def test_sampling_follows_the_seed_the_temperature_and_the_nucleus(engine):
    request = Request(render_prompt(engine.tokenizer, [{"role": "user", "content": "me"}]), 20, temperature=1.5)
    runs = [engine.generate([replace(request, seed=s)])[0].token_ids for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    greedy = engine.generate([replace(request, temperature=0.0)])[0].token_ids
    assert engine.generate([replace(request, top_p=1e-6)])[0].token_ids == greedy
    assert engine.generate([replace(request, temperature=1e-4)])[0].token_ids == greedy


def test_draws_have_the_distribution_of_the_softmax(engine):
    prompt = render_prompt(engine.tokenizer, [{"role": "user", "content": "me"}])
    draws = engine.generate([Request(prompt, 1, temperature=2.0, seed=s) for s in range(600)])
    engine.rows.slots = torch.tensor([0])
    with torch.inference_mode():
        p = (engine.model(torch.tensor([prompt])).logits[0, -1] / 2.0).softmax(-1)
    count = torch.zeros_like(p)
    for d in draws:
        count[d.token_ids[0] if d.token_ids else min(engine.ends)] += 1
    for token in p.topk(3).indices:
        sigma = (p[token] * (1 - p[token]) * 600).sqrt()
        assert abs(count[token] - 600 * p[token]) < 4 * sigma


def test_streaming_gives_the_text_of_generate(engine, mixed):
    texts, reasons = [""] * len(mixed), [None] * len(mixed)
    for chunks in engine.stream(mixed):
        for chunk in chunks:
            assert reasons[chunk.row] is None  # nothing follows the last chunk
            texts[chunk.row] += chunk.text
            reasons[chunk.row] = chunk.finish_reason
    assert [(c.text, c.finish_reason) for c in engine.generate(mixed)] == list(zip(texts, reasons, strict=True))


def test_a_dropped_row_leaves_and_the_others_do_not_notice(engine):
    prompt = render_prompt(engine.tokenizer, [{"role": "user", "content": "sea"}])
    requests = [Request(prompt, 10), Request(prompt, 10, adapter="two")]
    seen = [[], []]
    for chunks in engine.stream(requests, dropped=lambda row: row == 0 and len(seen[0]) >= 3):
        for chunk in chunks:
            seen[chunk.row].append(chunk.token)
    assert len(seen[0]) == 3
    assert [t for t in seen[1] if t is not None] == engine.generate(requests)[1].token_ids


@settings(deadline=None, max_examples=150)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters=HALF), min_size=1), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_are_whole_characters_and_end_before_the_stop_text(engine, text, stops):
    tokens = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    row, pieces = _Row(0, Request([1], len(tokens) + 1, stop=tuple(stops)), engine), []
    for token in [*tokens, min(engine.ends)]:
        chunk = row.push(token)
        pieces.append(chunk.text)
        if chunk.finish_reason:
            break
    expected = text[: min([i for s in stops if (i := text.find(s)) >= 0], default=len(text))]
    assert "".join(pieces) == expected
    assert HALF not in "".join(pieces)


def test_a_character_cut_by_the_length_is_left_out(engine):
    tokens = engine.tokenizer("sea海", add_special_tokens=False)["input_ids"]
    row = _Row(0, Request([1], len(tokens) - 1), engine)
    chunks = [row.push(t) for t in tokens[:-1]]
    assert ("".join(c.text for c in chunks), chunks[-1].finish_reason) == ("sea", "length")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter": "three"}, "'three'"),
        ({"prompt_ids": []}, "0 prompt tokens"),
        ({"max_new_tokens": 0}, "asks for 0"),
        ({"max_new_tokens": MAX_LENGTH}, f"the model holds {MAX_LENGTH}"),
    ],
)
def test_a_request_that_cannot_run_is_named(engine, change, words):
    with pytest.raises(DataError, match=words):
        engine.generate([Request([1], 4), replace(Request([1], 4), **change)])


def test_an_adapter_of_another_base_is_refused(tiny, engine, tmp_path):
    base, adapters = tiny
    tensors = load_file(adapters["one"] / "adapter_model.safetensors")
    first = sorted(tensors)[0]

    def refused(changed, words):
        folder = tmp_path / "changed"
        shutil.copytree(adapters["one"], folder, dirs_exist_ok=True)
        save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ArtifactError, match=words):
            HFEngine(str(base), None, "fp32", {"x": folder}, engine.tokenizer, device="cpu")

    refused({**tensors, first: torch.zeros(4, 3)}, "this base needs")
    refused({k.replace("layers.1.", "layers.9."): t for k, t in tensors.items()}, "layers.9.*no linear layer")
    refused({k: t for k, t in tensors.items() if k != first}, "lacks the tensor")


def test_a_tokenizer_of_another_base_is_refused(tiny):
    tokenizer = load_tokenizer(str(tiny[0]))
    tokenizer.add_tokens([f"<new{i}>" for i in range(400)])
    with pytest.raises(ConfigError, match="do not belong together"):
        HFEngine(str(tiny[0]), None, "fp32", {}, tokenizer, device="cpu")


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_every_precision_generates(tiny, precision):
    base, adapters = tiny
    engine = HFEngine(str(base), None, precision, adapters, load_tokenizer(str(base)), device="cpu")
    replies = [c.token_ids for c in engine.generate([Request([5, 6, 7], 12, adapter=a) for a in (None, "one", "two")])]
    assert all(replies) and replies[0] != replies[2]


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 4}}, {"use_dora": True}])
def test_an_adapter_that_would_be_scaled_wrongly_is_refused(tiny, engine, tmp_path, change):
    base, adapters = tiny
    shutil.copytree(adapters["one"], tmp_path / "x")
    file = tmp_path / "x" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ArtifactError, match="no plain LoRA adapter"):
        HFEngine(str(base), None, "fp32", {"x": tmp_path / "x"}, engine.tokenizer, device="cpu")
