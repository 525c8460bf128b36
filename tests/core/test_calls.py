"""The call parser: form is free, meaning is not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.core.calls import format_call, parse_answer


def parse(text):
    return parse_answer(text, "generate_image", "prompt")


@pytest.mark.parametrize(
    "text",
    [
        'call("generate_image", {"prompt": "貓"})',
        "call('generate_image', {'prompt': '貓'})",
        ' call ( "generate_image" ,{ "prompt":"貓" } ) ',
        'call("generate_image", {"size": [1, 2], "prompt": "貓"})',
        'call("generate_image", {"prompt": "貓", "hd": true})。',
        'Call（"generate_image"，{"prompt"："貓"}）',
    ],
)
def test_free_forms_are_calls(text):
    answer = parse(text)
    assert answer.kind == "call" and answer.arguments["prompt"] == "貓", answer.reason


@pytest.mark.parametrize(
    "text",
    [
        'call("generate_image", {"prompt": "貓"}',
        'call("generate_image", {"prompt": "貓)',
        'call("generate_image")',
        'call("generate_image", {"text": "貓"})',
        'call("generate_image", {"prompt": ""})',
        'call("generate_image", {"prompt": 3})',
        'call("draw", {"prompt": "貓"})',
        '好的：call("generate_image", {"prompt": "貓"})',
        'call("generate_image", {"prompt": "貓"}) 給你',
        'call(generate_image, {"prompt": "貓"})',
        'call("generate_image", {"prompt": "貓",})',
        "call(",
    ],
)
def test_broken_calls_are_malformed_with_a_reason(text):
    answer = parse(text)
    assert answer.kind == "malformed" and answer.reason


@pytest.mark.parametrize("text", ["你好", "", "我 call 你", "recall (x) 是召回率", "Call me later"])
def test_plain_text(text):
    assert parse(text).kind == "text"


@given(st.text(min_size=1).filter(str.strip))
def test_round_trip(value):
    answer = parse(format_call("generate_image", "prompt", value))
    assert answer.kind == "call" and answer.arguments == {"prompt": value}


@given(st.text())
def test_never_raises(text):
    assert parse(text).kind in ("call", "text", "malformed")
    assert parse("call(" + text).kind != "text"
    json.dumps(text)
