"""JSON answers: every figure against one counted by hand, and against what must hold of any two values."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.evaluate.json_answers import judged, read

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string"}, "elements": {"type": "array"}},
    "required": ["answer", "elements"],
    "additionalProperties": False,
}
WANTED = '{"answer": "a form", "elements": [{"kind": "field", "text": "Name"}, {"kind": "button", "text": "Send"}]}'
METRICS = ("valid", "key_f1", "item_f1", "equal", "rougeL", "unreadable")


def scored(answer, wanted=WANTED, schema=None):
    found = judged(answer, wanted, schema)
    assert tuple(found) == METRICS and all(0 <= v <= 1 for v in found.values())
    return {k: found[k] for k in METRICS if k != "rougeL"}


@pytest.mark.parametrize(
    ("answer", "valid", "keys", "items", "equal"),
    [
        (WANTED, 1, 1, 1, 1),
        ('{"elements":[{"text":"Name","kind":"field"},{"text":"Send","kind":"button"}],"answer":"a form"}', 1, 1, 1, 1),
        ('{"answer": "a form", "elements": [{"kind": "button", "text": "Send"}, {"kind": "field", "text": "Name"}]}', 1, 1, 1, 0),
        # keys wanted: answer, elements, elements[].kind, elements[].text; said: answer, elements, elements[].kind. Items: 5 wanted, 2 said, 2 in common
        ('{"answer": "a form", "elements": [{"kind": "field"}]}', 1, 6 / 7, 4 / 7, 0),
        # a multiset: of two equal items one is wanted. Said: the answer, field twice
        ('{"answer": "a form", "elements": [{"kind": "field"}, {"kind": "field"}]}', 1, 6 / 7, 4 / 8, 0),
        # keys answer, elements; items: the answer, an empty list
        ('{"answer": "a table", "elements": []}', 1, 4 / 6, 0, 0),
        ('{"answer": "a form", "elements": [], "sure": true}', 0, 4 / 7, 2 / 8, 0),
        ('["a form"]', 0, 0, 0, 0),
        ('"a form"', 0, 0, 0, 0),
    ],
)
def test_figures_counted_by_hand(answer, valid, keys, items, equal):
    assert scored(answer, schema=SCHEMA) == {
        "valid": valid, "key_f1": pytest.approx(keys), "item_f1": pytest.approx(items), "equal": equal, "unreadable": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (' {"a": 1}\n', {"a": 1}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('Here it is:\n\n```\n{\n  "a": 1\n}\n```\nAnything else?', {"a": 1}),
        ("3", 3),
    ],
)
def test_json_is_read_whole_or_from_its_one_block(answer, value):
    assert read(answer) == value


@pytest.mark.parametrize(
    "answer",
    [
        "", "a form", '{"a": 1', '{"a": 1,}', "{'a': 1}", '{"a": 1} and more', '{"a": NaN}', "Infinity", '{"a": 1, "a": 2}', '"two\nlines"',
        '```json\n{"a": 1}\n```\n```json\n{"a": 1}\n```', "```json\n{\n```", "[" * 100_000, "[" * 2000, "1" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_json_is_unreadable_and_worth_nothing(answer):
    found = judged(answer, '{"a": 1}', SCHEMA)
    assert found == {"valid": 0, "key_f1": 0, "item_f1": 0, "equal": 0, "rougeL": found["rougeL"], "unreadable": 1}


def test_types_count_and_numbers_go_by_value():
    assert scored("1", "1.0") == scored("[1e0]", "[1]") == scored("1", "1")
    for said, wanted in (("1", "true"), ("0", "false"), ('"1"', "1"), ("null", "false"), ("[]", "{}"), ('""', "null")):
        assert scored(said, wanted) == {"valid": 1, "key_f1": 1, "item_f1": 0, "equal": 0, "unreadable": 0}
    assert judged("x", "{}")["rougeL"] == 0 and judged('{"b": "a c"}', '{"b": "a d"}')["rougeL"] == pytest.approx(2 / 3)


def test_a_very_deep_answer_ends_well():
    deep = "[" * 900 + "]" * 900
    assert scored(deep, deep)["equal"] == scored(deep, deep, SCHEMA)["item_f1"] == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=4),
    max_leaves=12,
)


def same(a, b):
    """Equality of JSON values, by their definition."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def shuffled(value, rng, lists):
    if isinstance(value, dict):
        return {k: shuffled(value[k], rng, lists) for k in rng.sample(list(value), len(value))}
    if isinstance(value, list):
        inner = [shuffled(v, rng, lists) for v in value]
        return rng.sample(inner, len(inner)) if lists else inner
    return value


@given(VALUES, VALUES, st.integers(0, 99))
def test_what_must_hold_of_any_two_values(a, b, seed):
    rng = random.Random(seed)
    here, there = (scored(json.dumps(x), json.dumps(y)) for x, y in ((a, b), (b, a)))
    assert here == there, "which of the two is wanted is all the same to an F1"
    assert here["equal"] == same(a, b)
    assert here["equal"] <= (here["key_f1"] == here["item_f1"] == 1)
    perfect = dict.fromkeys(METRICS, 1.0) | {"unreadable": 0.0}
    del perfect["rougeL"]
    assert scored(json.dumps(shuffled(a, rng, lists=False), indent=2, ensure_ascii=False), json.dumps(a)) == perfect
    anyhow = scored(json.dumps(shuffled(a, rng, lists=True)), json.dumps(a))
    assert (anyhow["item_f1"], anyhow["key_f1"]) == (1, 1), "the order of lists is another matter"
    assert scored(json.dumps([a]), json.dumps([a, b]))["item_f1"] < 1
