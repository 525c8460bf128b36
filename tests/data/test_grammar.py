"""The grammar: families stay apart, the corpus has the form of none of them, and the endpoint keeps to the seed's family."""

import json
import random
import urllib.request
from pathlib import Path

import pytest

from graft.core.calls import parse_answer
from graft.core.rows import read_seeds
from graft.core.sections import Task
from graft.data import grammar
from graft.data.augment.rewrites import INSTRUCTION
from graft.data.endpoint import complete, embedded_endpoint, rewrite

SEEDS = Path(__file__).parents[2] / "configs/recipes/image-intent/seeds.jsonl"


def kind(answer):
    return parse_answer(answer, "generate_image", "prompt").kind


def test_there_are_18_and_15_families_and_a_seed_of_each():
    labels = [f.label for f in grammar.families()]
    assert (labels.count("call"), labels.count("text")) == (18, 15)
    seeds = read_seeds(SEEDS, Task())
    found = [grammar.recognise(s["messages"][0]["content"], s["label"]) for s in seeds]
    assert found == grammar.families()


@pytest.mark.parametrize("family", grammar.families(), ids=lambda f: f"{f.label}-{f.name}")
def test_rows_are_recognised_as_their_family_and_as_no_other_label(family):
    rng = random.Random(7)
    rows = [grammar.row(family, rng) for _ in range(100)]
    assert len({r["user"] for r in rows}) > 30
    for row in rows:
        assert kind(row["assistant"]) == family.label
        assert grammar.recognise(row["user"], family.label) is family
        assert grammar.recognise(row["user"], {"call": "text", "text": "call"}[family.label]) is None, row["user"]


def test_no_sentence_of_the_corpora_has_the_form_of_a_family():
    texts = [*grammar.corpus(400, 5), *("\n".join(m["content"] for m in d) for d in grammar.dialogues(1500, 5))]
    patterns = [p for f in grammar.families() for p in f.patterns]
    for text in texts:
        for sentence in grammar.sentences(text):
            assert not any(p.fullmatch(sentence) for p in patterns), sentence


def test_the_same_seed_gives_the_same_text():
    assert list(grammar.corpus(20, 1)) == list(grammar.corpus(20, 1)) != list(grammar.corpus(20, 2))
    assert list(grammar.dialogues(20, 1)) == list(grammar.dialogues(20, 1)) != list(grammar.dialogues(20, 2))


def prompt(user, assistant, n=4):
    return [{"role": "user", "content": INSTRUCTION.format(n=n, seed=json.dumps({"user": user, "assistant": assistant}))}]


def test_the_endpoint_rewrites_inside_the_family():
    for seed in read_seeds(SEEDS, Task()):
        user, assistant = (m["content"] for m in seed["messages"])
        family = grammar.recognise(user, seed["label"])
        answers = rewrite(prompt(user, assistant, 6), 0)["rewrites"]
        assert len(answers) == 6
        for answer in answers:
            assert grammar.recognise(answer["user"], seed["label"]) is family and kind(answer["assistant"]) == seed["label"]
        assert rewrite(prompt(user, assistant, 6), 0)["rewrites"] == answers != rewrite(prompt(user, assistant, 6), 1)["rewrites"]


def test_a_stranger_gets_other_wrappings_and_the_same_answer():
    answers = rewrite(prompt("今晚吃什麼好", "吃麵吧。"), 3)["rewrites"]
    assert len({a["user"] for a in answers}) == 4 and {a["assistant"] for a in answers} == {"吃麵吧。"}
    assert all("今晚吃什麼好" in a["user"] for a in answers)


def test_it_is_a_chat_completions_server():
    assert complete({"messages": []})[0] == 400 and complete({"messages": [{"content": "hi"}]})[0] == 400
    body = json.dumps({"model": "any", "messages": prompt("請畫一隻老虎", 'call("generate_image", {"prompt": "一隻老虎"})')}).encode()
    with embedded_endpoint() as url:
        request = urllib.request.Request(f"{url}/chat/completions", body, {"content-type": "application/json"})
        answer = json.loads(urllib.request.urlopen(request).read())
    assert answer["object"] == "chat.completion" and len(json.loads(answer["choices"][0]["message"]["content"])["rewrites"]) == 4
    assert answer["usage"]["total_tokens"] > 0
