"""The worst case is never passed, bills follow the price list, estimates learn from the ledger."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from graft.core.sections import Api, Price
from graft.data.api.spending import Usage, cost_usd, estimate, usage_of, worst_case, worst_prompt_tokens

PRICE = Price(input=2.0, cached_input=0.5, output=8.0, batch=0.5)
API = Api(model="m", prices={"m": PRICE}, max_output_tokens=100)


def body(text):
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


@pytest.fixture(scope="module")
def byte_level():
    """The worst tokenizer there is for us: byte-level without a single merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        ["x"], trainers.BpeTrainer(vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    return tokenizer


@given(text=st.text(max_size=200))
def test_no_tokenizer_counts_more_than_the_bound(byte_level, text):
    assert len(byte_level.encode(text).ids) <= worst_prompt_tokens(body(text), 0)


def test_a_bill_with_cached_tokens_and_at_batch_price():
    usage = Usage(prompt=1000, cached=400, completion=100, tier=None)
    assert cost_usd(usage, PRICE) == pytest.approx((600 * 2 + 400 * 0.5 + 100 * 8) / 1e6)
    assert cost_usd(Usage(1000, 400, 100, "flex"), PRICE) == pytest.approx(cost_usd(usage, PRICE) / 2)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 100))
def test_the_worst_case_is_the_worst(prompt, cached, completion):
    usd, tokens = worst_case(body("字" * 10), API)
    usage = Usage(min(prompt, tokens - 100), cached, completion, None)
    assert cost_usd(usage, PRICE) <= usd and usage.tokens <= tokens


def test_images_count_at_their_bound():
    content = [{"type": "image_url", "image_url": {"url": "sha256:00"}}, {"type": "text", "text": "?"}]
    assert worst_prompt_tokens({"messages": [{"role": "user", "content": content}]}, 26_000) >= 26_001


@pytest.mark.parametrize("raw", ["", "{", "[]", "{}", '{"usage": null}', '{"usage": {"prompt_tokens": "many"}}'])
def test_an_answer_without_a_usable_usage_has_none(raw):
    assert usage_of(raw) is None


def test_the_estimate_learns_from_what_was_paid():
    bodies = [body("請改寫" * 40)] * 10
    blind = estimate(bodies, API, [])
    assert blind.requests == 10 and blind.usd <= blind.worst_usd and blind.completion_tokens == 1000
    response = json.dumps({"usage": {"prompt_tokens": 200, "completion_tokens": 30}})
    taught = estimate(bodies, API, [(json.dumps(bodies[0]), response)] * 5)
    assert taught.prompt_tokens == 2000 and taught.completion_tokens == 300 and "5 earlier" in taught.method
    assert taught.usd == pytest.approx((2000 * 2 + 300 * 8) / 1e6) and taught.usd < blind.usd
