"""Answers as servers send them: read tolerantly, never shortened, refused with a reason of one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.core.errors import DataError
from graft.data.augment.answers import read, structured

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "string"}}},
    "required": ["a"],
    "additionalProperties": False,
}
ANY_OBJECT = {"type": "object"}


def response(content, finish="stop", **message):
    return {"choices": [{"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}]}


@pytest.mark.parametrize(
    "text",
    [
        '{"a": ["x", "y"]}',
        '\ufeff{"a": ["x", "y"]}',
        '```json\n{"a": ["x", "y"]}\n```',
        '好的，以下是 JSON：\n{"a": ["x", "y",],}\n希望有幫助！',
        "｛“a”：［“x”，“y”］｝",
        '{“a”: ["x"、 “y”]}',
        "{＂a＂：[＂x＂，＂y＂]}",
        '<think>使用 {n} 個，像 {"b": 1} 那樣 [1]</think>{"a": ["x", "y"]}',
        '{"a": ["x", "y"]}\n{"a": ["x", "y"]}',
    ],
)
def test_what_surrounds_the_values_is_forgiven(text):
    assert read(response(text), SCHEMA) == ({"a": ["x", "y"]}, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": ["他說“好，行”：{]"],}', "他說“好，行”：{]"),
        ("{“a”: [“他說“好”，行”],}", "他說“好”，行"),
        ('{“a”: [“he said "yes", ok”]}', 'he said "yes", ok'),
        ('{"a": ["一\n二"],}', "一\n二"),
        ('{"a": ["b\\\\"],}', "b\\"),
        ('{"a": ["call(\\"f\\", {\\"p\\": \\"１，２\\"})"],}', 'call("f", {"p": "１，２"})'),
    ],
)
def test_strings_are_left_as_they_are(text, value):
    assert read(response(text), SCHEMA) == ({"a": [value]}, None)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (response('{"a": ["x"', "length"), "truncated"),
        (response(None, "content_filter"), "filtered"),
        (response(None, refusal="I can't\nhelp"), "refused: I can't help"),
        (response("{}", "tool_calls"), "malformed: the answer ended by 'tool_calls'"),
        (response(" \n"), "malformed: the answer is empty"),
        (response(None), "malformed: the answer is empty"),
        (response([{"type": "text"}]), "malformed: the answer is empty"),
        (response("sorry"), "malformed: no JSON in the answer"),
        (response('{"a": NaN}'), "malformed: no JSON in the answer"),
        (response('{"a": ["x"]} {"a": ["y"]}'), "malformed: 2 different values fit the schema"),
        (response('{"a": ["x"], "a": ["y"]}'), "malformed: an object of the JSON has a key twice"),
        (response('{"a": ["\\ud800"]}'), "wrong schema: the answer holds half a character"),
        (response("\ud800"), "malformed: the answer holds half a character"),
        (response('{"a": [1]}'), "wrong schema: $.a[0]: 1 is not of type 'string'"),
        (response('{"b": []}'), "wrong schema: $: "),
        (response("[" * 100_000 + "]" * 100_000), "malformed: "),
        ({"choices": []}, "malformed: the response holds no message"),
        ({"choices": [{"message": None}]}, "malformed: the response holds no message"),
        ({"error": {"message": "overloaded"}}, "malformed: the server reports {'message': 'overloaded'}"),
        ([], "malformed: the response holds no message"),
    ],
)
def test_what_cannot_be_used_says_why_in_one_line(answer, reason):
    value, found = read(answer, SCHEMA)
    assert value is None and found.startswith(reason) and "\n" not in found and len(found) <= 200


def test_free_text_is_the_text():
    assert read(response(" 一隻狗 \n"), None) == ("一隻狗", None)
    assert read(response("", None), None) == (None, "malformed: the answer is empty")
    assert read(response("一隻", "length"), None) == (None, "truncated")


@pytest.mark.parametrize("finish", ["stop", None])
def test_a_cut_answer_never_becomes_a_shorter_one(finish):
    """At every place, also where the server does not say that it cut, and with a schema that an inner object fits."""
    whole = '好的 {"a": [{"u": "一，“二”", "v": [1, {"w": 2}]}, {"u": "x", "v": []}], "b": {"c": 1}}'
    cut = [read(response(whole[:n], finish), ANY_OBJECT) for n in range(1, len(whole))]
    assert all(value is None and reason for value, reason in cut)
    assert read(response(whole, finish), ANY_OBJECT)[1] is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), values), st.booleans(), st.sampled_from([None, 1]))
def test_json_between_prose_comes_back_whole(value, ascii_only, indent):
    text = "這是答案：\n" + json.dumps(value, ensure_ascii=ascii_only, indent=indent) + "\n完畢"
    assert read(response(text), ANY_OBJECT) == (value, None)


def test_a_schema_is_strict_where_strict_servers_take_it():
    assert structured(SCHEMA, "x") == {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    assert not structured(ANY_OBJECT, "x")["json_schema"]["strict"]
    nested = {**SCHEMA, "properties": {"a": {"type": "array", "items": ANY_OBJECT}}}
    assert not structured(nested, "x")["json_schema"]["strict"]
    with pytest.raises(DataError, match=r"'x' is no JSON Schema: \$\.type: 'objekt'"):
        structured({"type": "objekt"}, "x")
    with pytest.raises(DataError, match=r"refers to 'http://127\.0\.0\.1:1/x'"):
        read(response("{}"), {"$ref": "http://127.0.0.1:1/x"})
