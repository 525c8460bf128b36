"""Each layout to messages, detected and forced, and each way in which a record is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.core.errors import ConfigError
from graft.core.rows import is_unicode, wrong_roles
from graft.core.sections import LAYOUTS, Corpus, Mcq
from graft.data.readers.layouts import detect, excerpt, layout_of, to_messages, to_text

U, A, S = ({"role": role, "content": content} for role, content in (("user", "問"), ("assistant", "答"), ("system", "你是助手")))
MORE = [{"role": "user", "content": "又問"}, {"role": "assistant", "content": "又答"}]
MCQ = {"article": "文", "question": "何？", "option1": "甲", "option2": "乙", "option3": "丙", "option4": "丁", "answer": 2}

GOOD: list[tuple[str, dict[str, Any], list[dict[str, str]]]] = [
    ("messages", {"messages": [S, U, A, *MORE]}, [S, U, A, *MORE]),
    ("messages", {"messages": [{"role": "system", "content": ""}, U, {**A, "weight": 1, "tool_calls": None}], "tools": "[]", "images": []}, [U, A]),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "問"}]}, A]}, [U, A]),
    ("messages", {"messages": [{**U, "weight": 0}, {**A, "weight": 1.0}]}, [U, A]),
    ("messages", {"messages": [{**U, "images": []}, {**A, "reasoning_content": None, "thinking": "\n"}]}, [U, A]),
    ("messages", {"messages": [{"role": "user", "content": "<image>?"}, A]}, [{"role": "user", "content": "<image>?"}, A]),
    ("messages", {"prompt": "問", "completion": "答"}, [U, A]),
    ("messages", {"prompt": [S, U], "completion": [A]}, [S, U, A]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "問"}, {"from": "gpt", "value": "答"}], "system": "你是助手"}, [S, U, A]),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "你是助手"}, {"from": "user", "value": "問"}, {"from": "chatgpt", "value": "答"}]},
        [S, U, A],
    ),
    ("sharegpt", {"conversations": [U, A], "system": None, "tools": ""}, [U, A]),
    ("alpaca", {"instruction": "問", "input": "", "output": "答"}, [U, A]),
    ("alpaca", {"instruction": "問", "input": "這個", "output": "答", "system": "你是助手"}, [S, {"role": "user", "content": "問\n這個"}, A]),
    ("alpaca", {"instruction": "又問", "output": "又答", "history": [["問", "答"]]}, [U, A, *MORE]),
    ("ms-swift", {"query": "又問", "response": "又答", "history": [["問", "答"]], "system": "你是助手"}, [S, U, A, *MORE]),
    ("ms-swift", {"query": "問", "response": "答", "history": None}, [U, A]),
    (
        "ms-swift",
        {"conversation": [{"human": "問", "assistant": "答"}, {"human": "又問", "assistant": "又答"}], "system": "你是助手"},
        [S, U, A, *MORE],
    ),
    ("mcq", MCQ, [{"role": "user", "content": "文\n\n何？\nA. 甲\nB. 乙\nC. 丙\nD. 丁"}, {"role": "assistant", "content": "B. 乙"}]),
]


@pytest.mark.parametrize(("layout", "value", "messages"), GOOD)
def test_each_layout_is_detected_and_read(layout: str, value: dict[str, Any], messages: list[dict[str, str]]) -> None:
    assert detect([value, {**value, "id": 7}]) == layout
    assert to_messages(value, layout, Mcq()) == (messages, "")


def test_the_messages_form_of_ms_swift_and_a_layout_that_is_forced() -> None:
    assert to_messages({"messages": [U, A]}, "ms-swift", Mcq()) == ([U, A], "")
    both = {"messages": [U, A], "text": "問答"}
    assert detect([both]) == "messages"
    assert layout_of(Corpus(path="x", layout="text"), [both]) == "text"
    assert layout_of(Corpus(path="x", text="body"), [{"body": "a"}]) == "text"


BAD: list[tuple[str, Any, str]] = [
    ("messages", {}, 'no "messages"'),
    ("messages", {"messages": None}, '"messages" is null'),
    ("messages", {"messages": "[]"}, '"messages" is no list'),
    ("messages", {"messages": []}, "unbalanced roles"),
    ("messages", {"messages": [U]}, "unbalanced roles"),
    ("messages", {"messages": [A, U]}, "unbalanced roles"),
    ("messages", {"messages": [U, A, S, *MORE]}, "unbalanced roles"),
    ("messages", {"messages": [U, "x"]}, "a message is no object"),
    ("messages", {"messages": [U, {"role": "critic", "content": "x"}]}, "unknown role"),
    ("messages", {"messages": [U, {"role": ["user"], "content": "x"}]}, "unknown role"),
    ("messages", {"messages": [U, {"role": "assistant", "content": " \n"}]}, "empty message"),
    ("messages", {"messages": [U, {"role": "assistant", "content": None}]}, "empty message"),
    ("messages", {"messages": [U, {"role": "assistant", "content": 3}]}, "a message is no text"),
    ("messages", {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "tool calls"),
    ("messages", {"messages": [U, A, {"role": "tool", "content": "4"}, A]}, "tool calls"),
    ("messages", {"messages": [U, A], "tools": [{"name": "f"}]}, "tool calls"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A]}, "images, audio or video"),
    ("messages", {"messages": [U, A], "images": ["a.png"]}, "images, audio or video"),
    ("messages", {"messages": [U, {**A, "weight": 0}]}, "a turn that is not to be trained"),
    ("messages", {"messages": [U, {**A, "loss": False}]}, "a turn that is not to be trained"),
    ("messages", {"messages": [U, {**A, "reasoning_content": "因為"}]}, "reasoning beside the answer"),
    ("messages", {"prompt": [U], "completion": [{**A, "thinking": "因為"}]}, "reasoning beside the answer"),
    ("sharegpt", {"conversations": [U, {**A, "reasoning": ["因為"]}]}, "reasoning beside the answer"),
    ("messages", {"messages": [{**U, "images": ["a.png"]}, A]}, "images, audio or video"),
    ("messages", {"messages": [{**U, "audio": {"path": "a.wav"}}, A]}, "images, audio or video"),
    ("messages", {"messages": [{"role": "user", "content": "<image>何？"}, A], "images": []}, "<image> in a text, and no image beside"),
    ("mcq", {**MCQ, "image": "a.png"}, "images, audio or video"),
    ("messages", {"messages": [U, {"role": "assistant", "content": "\ud800"}]}, "lone surrogate"),
    ("messages", {"prompt": "問"}, 'no "completion"'),
    ("sharegpt", {"conversations": [{"from": "human", "value": "問"}, {"from": "function_call", "value": "{}"}]}, "tool calls"),
    ("alpaca", {"instruction": "", "output": "答"}, "empty message"),
    ("alpaca", {"instruction": "問", "output": None}, '"output" is null'),
    ("alpaca", {"instruction": 3, "output": "答"}, '"instruction" is no text'),
    ("alpaca", {"instruction": "問", "output": "答", "history": [["問"]]}, '"history" is no list of pairs'),
    ("ms-swift", {"query": "問"}, 'no "response"'),
    ("ms-swift", {"conversation": ["x"]}, "a message is no object"),
    ("mcq", {**MCQ, "option3": None}, '"option3" is null'),
    ("mcq", {**MCQ, "article": " "}, '"article" is empty'),
    ("mcq", {**MCQ, "question": "\udfff"}, "lone surrogate"),
    ("mcq", {**MCQ, "answer": 5}, "the answer names no option"),
    ("mcq", {**MCQ, "answer": True}, '"answer" is no text'),
    ("mcq", {**MCQ, "answer": 0}, "the answer is 0, options count from 1"),
    ("mcq", {**MCQ, "answer": "戊"}, "the answer names no option"),
    ("mcq", {**MCQ, "option1": "2", "answer": "2"}, "the answer names two options"),
    ("mcq", {**MCQ, "option1": "乙", "answer": "乙"}, "the answer names two options"),
]


@pytest.mark.parametrize(("layout", "value", "reason"), BAD)
def test_what_cannot_be_used_has_a_short_reason(layout: str, value: dict[str, Any], reason: str) -> None:
    assert to_messages(value, layout, Mcq()) == (None, reason)


def test_of_a_question_alone_nothing_is_learned() -> None:
    for own in ({"reasoning_content": "因為"}, {"weight": 0}):
        assert to_messages({"messages": [U, {**A, **own}]}, "messages", Mcq(), answered=False) == ([U, A], "")
    asked = {key: value for key, value in MCQ.items() if key != "answer"}
    assert to_messages(asked, "mcq", Mcq(), answered=False) == ([{"role": "user", "content": "文\n\n何？\nA. 甲\nB. 乙\nC. 丙\nD. 丁"}], "")


@pytest.mark.parametrize("answer", [2, 2.0, "2", "B", "b", "(B)", "B.", "Ｂ", "２", "②", "乙", " 乙 "])
def test_the_ways_to_name_an_option(answer: Any) -> None:
    messages, _ = to_messages({**MCQ, "answer": answer}, "mcq", Mcq())
    assert messages is not None and messages[1]["content"] == "B. 乙"


def test_mcq_keys_and_templates_of_the_recipe() -> None:
    mcq = Mcq(
        article="a",
        question="q",
        options=("x", "y"),
        answer="n",
        prompt="{question}|{options}",
        option="({number}) {text}",
        reply='{{"answer": "{letter}"}}',
    )
    value = {"a": "文", "q": "{何}", "x": 3, "y": 4.0, "n": "4"}
    assert detect([value], mcq=mcq) == layout_of(Corpus(path="x", mcq=mcq), [value]) == "mcq"
    messages, _ = to_messages(value, "mcq", mcq)
    assert messages is not None and [m["content"] for m in messages] == ["{何}|(1) 3\n(2) 4", '{"answer": "B"}']


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"prompt": "{artcle} {question} {options}"}, r"mcq\.prompt = .* cannot be filled: it may hold \{article\}"),
        ({"prompt": "{article} {question}"}, r"mcq\.prompt = .* leaves out \{options\}"),
        ({"reply": '{"answer": {letter}}'}, r"mcq\.reply = .* cannot be filled"),
        ({"reply": "ok"}, r"mcq\.reply = 'ok' is the same for every record"),
        ({"option": "{letter}"}, r"mcq\.option = .* leaves out \{text\}"),
        ({"options": ("one",)}, r"mcq\.options names 1 keys"),
    ],
)
def test_templates_that_cannot_be_used_are_one_line(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        layout_of(Corpus(path="x", layout="mcq", mcq=Mcq(**keys)), [])


def test_an_option_that_may_follow_the_prompt_need_not_stand_in_it() -> None:
    assert layout_of(Corpus(path="x", layout="mcq", mcq=Mcq(prompt="{article}{question}", reply="{text}")), []) == "mcq"


def test_detection_is_by_most_records_and_by_keys_that_are_not_null() -> None:
    chat, text = {"messages": [U, A]}, {"text": "a"}
    assert detect([text, chat, chat]) == "messages"
    assert detect([{"messages": None, "text": "a"}]) == "text"
    assert detect([{"text": None}] * 3) == "text"
    with pytest.raises(ConfigError, match=r"keys 'text', 'messages': .*force a layout: mcq, messages, sharegpt"):
        detect([text, chat])
    with pytest.raises(ConfigError, match="none of the first records can be read"):
        detect([])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, 'no "t"'),
        ({"t": None}, '"t" is null'),
        ({"t": 3}, '"t" is no text'),
        ({"t": " \u3000"}, '"t" is empty'),
        ({"t": "a\udc80"}, "lone surrogate"),
    ],
)
def test_texts(value: dict[str, Any], reason: str) -> None:
    assert to_text(value, "t") == ("", reason)
    assert to_text({"t": " 文 "}, "t") == (" 文 ", "")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=3), s, max_size=3),
    max_leaves=8,
)
KEYS = [
    "messages",
    "conversations",
    "conversation",
    "role",
    "from",
    "content",
    "value",
    "instruction",
    "output",
    "query",
    "response",
    "history",
    "system",
    "prompt",
    "completion",
    "tools",
    *MCQ,
]
RECORDS = st.dictionaries(st.sampled_from(KEYS), JSON | st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), max_size=3), max_size=6)


@settings(deadline=None)
@given(value=RECORDS, layout=st.sampled_from([name for name in LAYOUTS if name not in ("auto", "text")]))
def test_any_record_gives_a_sound_conversation_or_a_reason(value: dict[str, Any], layout: str) -> None:
    messages, reason = to_messages(value, layout, Mcq())
    assert (messages is None) == bool(reason)
    assert messages is None or (wrong_roles(messages) is None and all(is_unicode(m["content"]) for m in messages))
    assert len(excerpt(value)) <= 200
