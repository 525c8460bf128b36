"""The engine against its peers (peft, transformers' generate) and against itself (a row alone, a row among others)."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_model import MAX_LENGTH

from graft.core.errors import ArtifactError, ConfigError, DataError
from graft.engine.hf import HFEngine
from graft.engine.protocol import Request, Scored, SlotsBusy
from graft.engine.text import HALF, Text
from graft.model.base import load_base
from graft.model.chat import load_tokenizer, render_prompt
from graft.model.lora import merge_into, read_adapter

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
            ours = logits_of(engine, prompt, name)
            seen = torch.ones(1, len(prompt), dtype=torch.long)  # else generate takes every token equal to the pad id for padding
            ends = sorted(engine.ends)
            tokens = model.generate(
                torch.tensor([prompt]), attention_mask=seen, max_new_tokens=24, do_sample=False, eos_token_id=ends, pad_token_id=0
            )
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert theirs.abs().max() > 1  # something was compared
        found = engine.generate([Request(prompt, 24, adapter=name)])[0]
        assert found.token_ids == [t for t in tokens[0, len(prompt) :].tolist() if t not in engine.ends]


@pytest.mark.parametrize("name", ["one", "two"])
def test_merged_weights_peft_and_the_engine_give_the_same_logits(tiny, engine, name):
    base, adapters = tiny
    prompt = render_prompt(engine.tokenizer, [{"role": "user", "content": PROMPTS[1]}])
    merged = load_base(str(base), None, "fp32", "cpu")
    layers = dict(merged.named_modules())
    for layer, weight in merge_into(lambda n: layers[n].weight.data, *read_adapter(adapters[name])).items():
        layers[layer].weight.data = weight
    peft = PeftModel.from_pretrained(load_base(str(base), None, "fp32", "cpu"), adapters[name]).eval()
    with torch.inference_mode():
        ours, theirs, whole = logits_of(engine, prompt, name), peft(torch.tensor([prompt])).logits, merged(torch.tensor([prompt])).logits
        plain = logits_of(engine, prompt, None)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - plain).abs().max() > 0.1


def logits_of(engine, prompt, name):
    """[1, length, vocabulary], without a cache."""
    slot = engine.slots.take(name)
    engine.slots.rows.use([slot], "cpu")
    with torch.inference_mode():
        logits = engine.model(torch.tensor([prompt])).logits
    engine.slots.release(slot)
    return logits


def test_rows_that_join_and_leave_at_any_step_change_no_other(engine, mixed):
    """Staggered: each joins while others are at any place, and some are given up on the way."""
    alone = [engine.generate([r])[0] for r in mixed]
    found, of, given_up = {}, {}, set()
    waiting = list(enumerate(mixed))
    steps = 0
    while waiting or engine.busy:
        for _ in range(1 + steps % 3 if waiting else 0):
            if waiting:
                index, request = waiting.pop(0)
                of[engine.add(request)] = index
        for chunk in engine.step():
            found.setdefault(of[chunk.row], []).append(chunk)
        steps += 1
        if steps in (9, 14):
            row = max(number for number, index in of.items() if not (found.get(index) and found[index][-1].finish_reason))
            given_up.add(of[row])
            engine.drop(row)
    assert len(given_up) == 2 and len(found) >= len(mixed) - 2
    for index, completion in enumerate(alone):
        chunks = found.get(index, [])
        tokens = [t for c in chunks for t in c.tokens]
        if index in given_up:
            assert tokens == completion.token_ids[: len(tokens)]
        else:
            assert (tokens, "".join(c.text for c in chunks), chunks[-1].finish_reason) == (
                completion.token_ids,
                completion.text,
                completion.finish_reason,
            )


def test_the_cache_stays_within_its_budget_and_all_rows_come_through(tiny, engine, mixed):
    base, adapters = tiny
    small = HFEngine(str(base), None, "fp32", adapters, engine.tokenizer, device="cpu", kv_tokens=300)
    wanted = [c.token_ids for c in engine.generate(mixed)]
    for request in mixed:
        small.add(request)
    held = []
    while small.busy:
        small.step()
        held.append(small._cache.lanes[0].keys.shape)
    assert 200 < max(lanes * tokens for lanes, _, tokens, _ in held) <= 300
    assert [c.token_ids for c in small.generate(mixed)] == wanted


def test_logprobs_are_those_of_the_model(engine):
    prompt = render_prompt(engine.tokenizer, [{"role": "user", "content": "sea"}])
    engine.add(Request(prompt, 8, temperature=0.9, seed=3, adapter="two", logprobs=3))
    chunks = []
    while engine.busy:
        chunks += engine.step()
    tokens = [t for c in chunks for t in c.tokens]
    wanted = logits_of(engine, prompt + tokens, "two")[0].log_softmax(-1)
    told = [of for c in chunks for of in c.told]
    for i, (token, of) in enumerate(zip(tokens, told, strict=True)):
        row = wanted[len(prompt) - 1 + i]
        assert abs(of.logprob - row[token]) < 1e-4
        assert [t for t, _ in of.top] == row.topk(3).indices.tolist()
        assert max(abs(p - q) for (_, p), q in zip(of.top, row.topk(3).values.tolist(), strict=True)) < 1e-4
    scores = engine.score(prompt + tokens, len(prompt), "two")
    assert max(abs(a - of.logprob) for a, of in zip(scores, told, strict=True)) < 1e-4


@pytest.mark.parametrize("name", [None, "one", "two"])
def test_scores_of_many_are_those_of_each_alone(engine, name, monkeypatch):
    draw = random.Random(5)
    ids = [[draw.randrange(4, 300) for _ in range(draw.choice([2, 3, 17, 40, MAX_LENGTH]))] for _ in range(24)]
    asked = [Scored(own, draw.randrange(1, len(own))) for own in ids]
    alone = [engine.score(own, first, name) for own, first, _ in asked]
    for own, (whole, first, _) in zip(alone, asked, strict=True):
        reference = logits_of(engine, whole, name)[0].log_softmax(-1)
        assert own == pytest.approx([reference[at - 1, whole[at]].item() for at in range(first, len(whole))], abs=1e-5)
    shapes = []
    monkeypatch.setattr(
        engine, "_forward", lambda given, *rest: shapes.append(tuple(given["input_ids"].shape)) or type(engine)._forward(engine, given, *rest)
    )
    together = engine.scores(asked, name)
    assert len(shapes) == 1 and shapes[0][0] == 24, "one forward"
    monkeypatch.setattr("graft.engine.hf.PROMPT_TOKENS", 300)
    monkeypatch.setattr("graft.engine.hf.SCORED_TOKENS", 60)
    in_parts = engine.scores(asked, name)
    assert len(shapes) > 6 and all(rows == 1 or rows * length <= 300 for rows, length in shapes[1:])
    for found in (together, in_parts):
        assert [len(own) for own in found] == [len(own) for own in alone]
        assert max(abs(a - b) for own, other in zip(found, alone, strict=True) for a, b in zip(own, other, strict=True)) < 1e-5
        assert max(abs(sum(own) - sum(other)) for own, other in zip(found, alone, strict=True) if len(own) < 20) < 1e-5, "nats of a reply"
    assert engine.scores([]) == []


def test_scores_leave_rows_under_way_as_they_are(engine, mixed):
    wanted = engine.generate(mixed[:4])
    of = {engine.add(request): n for n, request in enumerate(mixed[:4])}
    tokens = [[] for _ in wanted]
    while engine.busy:
        for chunk in engine.step():
            tokens[of[chunk.row]] += chunk.tokens
        engine.scores([Scored([5, 6, 7], 1), Scored([8] * 30, 4)], "one")
    assert tokens == [c.token_ids for c in wanted]


def test_what_cannot_be_scored_is_named(engine):
    with pytest.raises(DataError, match=f"request 1 has {MAX_LENGTH} prompt tokens"):
        engine.scores([Scored([5, 6], 1), Scored([5] * (MAX_LENGTH + 1), 1)])
    with pytest.raises(DataError, match="'three'"):
        engine.score([5, 6], 1, "three")


def test_top_k_draws_from_the_likeliest_alone(engine):
    prompt = render_prompt(engine.tokenizer, [{"role": "user", "content": "me"}])
    draws = engine.generate([Request(prompt, 1, temperature=3.0, top_k=2, seed=s) for s in range(60)])
    seen = {d.token_ids[0] if d.token_ids else min(engine.ends) for d in draws}
    assert seen == set(logits_of(engine, prompt, None)[0, -1].topk(2).indices.tolist())


def test_adapters_come_and_go_while_rows_run(tiny, engine):
    base, adapters = tiny
    live = HFEngine(str(base), None, "fp32", {}, engine.tokenizer, device="cpu", max_adapters=2)
    prompt = render_prompt(live.tokenizer, [{"role": "user", "content": "sea"}])
    wanted = {name: engine.generate([Request(prompt, 20, adapter=name)])[0].token_ids for name in (None, "one", "two")}
    found = {}

    def add(key, adapter):
        found[live.add(Request(prompt, 20, adapter=adapter))] = (key, [])

    def step():
        for chunk in live.step():
            found[chunk.row][1].extend(chunk.tokens)

    add("base", None)
    step()
    assert live.load("a", adapters["one"]) is None and live.load("b", adapters["two"]) is None
    add("a", "a")
    add("b", "b")
    for _ in range(5):
        step()
    with pytest.raises(SlotsBusy, match="all 2 slots"):
        live.load("c", adapters["one"])
    live.unload("a")  # goes on to its end
    with pytest.raises(DataError, match="'a'"):
        live.add(Request(prompt, 4, adapter="a"))
    while live.busy:
        step()
    assert {key: tokens for key, tokens in found.values()} == {"base": wanted[None], "a": wanted["one"], "b": wanted["two"]}
    assert live.load("c", adapters["one"]) is None and live.load("d", adapters["one"]) == "b"
    assert live.adapters == ["c", "d"]
    for name in ("c", "d"):
        assert live.generate([Request(prompt, 20, adapter=name)])[0].token_ids == wanted["one"], "nothing of the one before is left"


def test_an_adapter_of_too_high_a_rank_is_refused(tiny, engine):
    base, adapters = tiny
    with pytest.raises(ArtifactError, match=r"rank 8: this server takes 4 at most"):
        HFEngine(str(base), None, "fp32", adapters, engine.tokenizer, device="cpu", max_rank=4)


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
    p = (logits_of(engine, prompt, None)[0, -1] / 2.0).softmax(-1)
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
            seen[chunk.row].extend(chunk.tokens)
    assert len(seen[0]) == 3
    assert [t for t in seen[1] if t is not None] == engine.generate(requests)[1].token_ids


@settings(deadline=None, max_examples=150)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters=HALF), min_size=1), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_are_whole_characters_and_end_before_the_stop_text(engine, text, stops):
    tokens = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    row, pieces = Text(engine.tokenizer, tuple(stops)), []
    for token in tokens:
        piece, stopped = row.push(token, False)
        pieces.append(piece)
        if stopped:
            break
    else:
        pieces.append(row.end())
    so_far = (engine.tokenizer.decode(tokens[:n]).rstrip(HALF) for n in range(1, len(tokens) + 1))
    stopped = next((t for t in so_far if any(s in t for s in stops)), text)  # by the token that completes the first stop text
    expected = stopped[: min([i for s in stops if (i := stopped.find(s)) >= 0], default=len(stopped))]
    assert "".join(pieces) == expected
    assert HALF not in "".join(pieces)


def test_a_character_cut_by_the_length_is_left_out(engine):
    tokens = engine.tokenizer("sea海", add_special_tokens=False)["input_ids"]
    row, kept = Text(engine.tokenizer, ()), tokens[:-1]
    assert "".join(row.push(t, i == len(kept) - 1)[0] for i, t in enumerate(kept)) == "sea"


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
