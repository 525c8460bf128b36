"""Files of [evaluate.tasks] become questions, and no training text may hold an n-gram of them."""

import json

import pytest

from graft.core.errors import ConfigError, DataError
from graft.core.rows import read_jsonl
from graft.core.stages import Plan
from graft.data import questions
from graft.data.sources import evaluation_sets

RECIPE = """
name = "asked"
[corpora.chats]
path = "chats.jsonl"
[model]
base = "base"
[sft]
corpora = ["chats"]
[evaluate.tasks.maths]
kind = "exact"
path = "maths.jsonl"
[evaluate.tasks.reading]
kind = "choice"
path = "reading.json"
rows = 2
[evaluate.tasks.chat]
kind = "generation"
path = "chats.jsonl"
[evaluate.tasks.texts]
kind = "perplexity"
path = "texts.txt"
"""
READING = {"article": "柴犬在海邊。", "question": "誰在海邊？", "option1": "貓", "option2": "柴犬", "option3": "人", "option4": "鳥", "answer": 2}


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE)
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    maths = [{"question": "1+1?", "answer": "one and one\n#### 2"}, {"question": "2+2?", "answer": "four"}, {"question": "", "answer": "#### 1"}]
    (tmp_path / "maths.jsonl").write_text("\n".join(map(json.dumps, maths)) + "\n{broken\n")
    (tmp_path / "reading.json").write_text(json.dumps([READING, READING | {"answer": 7}, READING | {"answer": "D"}, READING]))
    (tmp_path / "texts.txt").write_text("柴犬在海邊散步。\n\nThe sea.\n")

    def make(*overrides):
        return Plan(tmp_path / "r.toml", overrides, tmp_path)

    return make


def test_questions_are_read_as_their_kind_needs_them(plan):
    job = plan().resolve("questions")
    questions.run(job)
    found = {name: list(read_jsonl(job.artifact.path / f"{name}.jsonl")) for name in ("maths", "reading", "chat", "texts")}
    assert found["maths"] == [{"id": "0", "messages": [{"role": "user", "content": "1+1?"}], "wanted": "one and one\n#### 2"}]
    first, second = found["reading"]
    assert (first["right"], second["right"], second["id"]) == (1, 3, "2") and first["replies"][1] == "B. 柴犬" and first["options"][1] == "柴犬"
    assert found["chat"][0]["wanted"] == "hello" and [row["text"] for row in found["texts"]] == ["柴犬在海邊散步。", "The sea."]
    counts = job.artifact.counts
    assert counts["maths"]["refused"] == {"no final answer": 1, '"question" is empty': 1, "no JSON": 1} and counts["reading"]["rows"] == 2


def test_a_set_of_questions_alone_is_an_evaluation_set(plan):
    held_back = plan().path.parent / "held_back.jsonl"
    held_back.write_text(json.dumps({key: value for key, value in READING.items() if key != "answer"}))
    assert [own["layout"] for own in evaluation_sets(plan('decontaminate.sets=["held_back.jsonl"]'))] == ["mcq", "qa", "mcq", "messages", "text"]
    held_back.write_text('{"body": 1}')
    with pytest.raises(ConfigError, match=r"^decontaminate.sets: held_back.jsonl: no layout fits records with the keys 'body'"):
        evaluation_sets(plan('decontaminate.sets=["held_back.jsonl"]'))


def test_a_cloze_is_asked_without_a_conversation(plan):
    templates = {"prompt": '"{article}{question}"', "reply": '"{text}"'}
    job = plan("evaluate.tasks.reading.kind=cloze", *(f"evaluate.tasks.reading.mcq.{k}={v}" for k, v in templates.items())).resolve("questions")
    questions.run(job)
    first, _ = read_jsonl(job.artifact.path / "reading.jsonl")
    assert first == {"id": "0", "text": "柴犬在海邊。誰在海邊？", "replies": ["貓", "柴犬", "人", "鳥"], "right": 1}


def test_questions_are_evaluation_sets_by_themselves(plan):
    found = evaluation_sets(plan())
    assert [own["layout"] for own in found] == ["qa", "mcq", "messages", "text"]
    before = plan().external_input("evaluation")
    (plan().path.parent / "texts.txt").write_text("another\n")
    assert plan().external_input("evaluation") != before


@pytest.mark.parametrize("override", ["texts.text=body", "maths.layout=qa", "reading.mcq.article=question"])
def test_how_a_task_is_read_decides_what_is_kept_out_of_training(plan, override):
    as_it_is, otherwise = plan(), plan(f"evaluate.tasks.{override}")
    assert otherwise.resolve("prepare").fingerprint != as_it_is.resolve("prepare").fingerprint
    same = plan("evaluate.tasks.maths.rows=1", "evaluate.tasks.maths.max_new_tokens=9")
    assert same.resolve("prepare").fingerprint == as_it_is.resolve("prepare").fingerprint, "how much is asked is no matter of the gate"


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("evaluate.tasks.maths.kind=choice", ConfigError, r"evaluate.tasks.maths: .*layout 'qa', but kind = 'choice' is of options"),
        ("evaluate.tasks.texts.kind=exact", ConfigError, "is of conversations"),
        ("evaluate.tasks.maths.path=gone.jsonl", ConfigError, r"evaluate.tasks.maths.path names .*gone.jsonl, which is no file"),
        ("evaluate.tasks.maths.final=(", ConfigError, "no regular expression"),
        ('evaluate.tasks.maths.final="never"', DataError, "holds nothing that can be asked"),
        ("evaluate.tasks.maths.kinds=exact", ConfigError, "did you mean"),
    ],
)
def test_what_cannot_be_asked_is_one_line(plan, override, error, words):
    with pytest.raises(error, match=words):
        questions.run(plan(override).resolve("questions"))
