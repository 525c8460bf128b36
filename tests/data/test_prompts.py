"""Records of every layout are asked with or without their answers, and none is left out."""

import json

import pytest

from graft.core.errors import ConfigError
from graft.core.recipe import Recipe
from graft.data.prompts import source

RECIPE = {"name": "r", "corpora": {"notes": {"path": "notes"}}}
EXAM = {"article": "a", "question": "q", "option1": "w", "option2": "x", "option3": "y", "option4": "z"}
USER, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}


@pytest.fixture
def read(tmp_path):
    def rows(*records, name="f.jsonl", like=None, **recipe):
        path = tmp_path / name
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records))
        found = source(Recipe.model_validate(RECIPE | recipe), path, like)
        return found, list(found.rows())

    return rows


@pytest.mark.parametrize(
    ("layout", "asked", "answer"),
    [
        ("qa", {"question": "q"}, {"answer": "r"}),
        ("alpaca", {"instruction": "q"}, {"output": "r"}),
        ("ms-swift", {"query": "q"}, {"response": "r"}),
        ("messages", {"prompt": "q"}, {"completion": "r"}),
        ("messages", {"prompt": [USER]}, {"completion": [{"role": "assistant", "content": "r"}]}),
        ("messages", {"messages": [USER]}, {"messages": [USER, {"role": "assistant", "content": "r"}]}),
        ("messages", {"messages": [USER, {"role": "assistant", "content": ""}]}, {"messages": [USER, {"role": "assistant", "content": "r"}]}),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}]},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
        ),
    ],
)
def test_a_conversation_with_and_without_its_answer(read, layout, asked, answer):
    found, rows = read(asked, asked | answer, asked | {key: None for key in answer.keys() - asked.keys()})
    assert found.layout == layout and found.task.kind == "generation"
    assert [row["messages"] for row in rows] == [[USER]] * 3
    assert [row.get("reference") for row in rows] == [None, "r", None]


def test_a_system_column_is_asked_with(read):
    assert read({"question": "q", "system": "s"})[1][0]["messages"] == [SYSTEM, USER]


def test_options_with_and_without_their_answer(read):
    found, rows = read(EXAM, EXAM | {"answer": 3}, EXAM | {"answer": "0"}, EXAM | {"answer": ""})
    assert found.task.kind == "choice" and [row.get("reference") for row in rows] == [None, 3, None, None]
    assert rows[0]["options"] == list("wxyz") and rows[0]["replies"][1] == "B. x" and rows[0]["messages"][0]["content"].startswith("a\n\nq\nA. w")


def test_options_beside_an_image_that_cannot_be_shown_are_not_asked_without_it(read):
    _, (blind, plain) = read(EXAM | {"images": ["a.png"]}, EXAM | {"images": []})
    assert "images" in blind["refused"] and "refused" not in plain


def test_every_record_has_a_row_and_a_blank_line_is_none(read):
    _, rows = read({"question": "q", "Id": 7}, "", "{oops", {"question": ""}, {"question": "q", "id": "a b"}, {"question": "q", "id": " "}, "", "")
    assert [row["id"] for row in rows] == ["7", "2", "3", "a b", "5"]
    assert [row.get("refused") for row in rows] == [None, "no JSON", '"question" is empty', None, None]
    _, rows = read("ID,question", "x1,q", "x2,", name="f.csv")
    assert [row["id"] for row in rows] == ["x1", "x2"] and rows[1]["refused"] == '"question" is empty'


def test_the_recipe_says_how_options_are_asked(read):
    mcq = {"prompt": "{question}|{options}", "reply": "{number}", "option": "{text}"}
    found, rows = read(EXAM, corpora={"exam": {"path": "p", "mcq": mcq}, "notes": {"path": "p"}}, like="exam")
    assert found.name == "exam" and rows[0]["messages"][0]["content"] == "q|w\nx\ny\nz" and rows[0]["replies"] == list("1234")
    task = {"path": "p", "kind": "choice", "mcq": mcq, "max_new_tokens": 3}
    found, _ = read(EXAM, evaluate={"tasks": {"reading": task, "again": task}}, corpora={"exam": {"path": "p"}})
    assert found.name == "reading" and found.task.max_new_tokens == 3, "a task before a corpus, and two that are alike are one"
    with pytest.raises(ConfigError, match="read as exam or as notes says, which differ"):
        read(EXAM, corpora={"exam": {"path": "p", "mcq": mcq}, "notes": {"path": "p"}})
    renamed = mcq | {"question": "frage"}
    found, rows = read({"frage" if k == "question" else k: v for k, v in EXAM.items()}, evaluate={"tasks": {"reading": task | {"mcq": renamed}}})
    assert found.layout == "mcq" and rows[0]["messages"][0]["content"].startswith("q|")
