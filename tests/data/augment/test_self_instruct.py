"""The loop: what it asks is a matter of each family alone, every rewrite is accounted for, and every end has its reason."""

import hashlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.core.recipe import load
from graft.core.rows import read_seeds
from graft.data.api.request import Answer
from graft.data.augment.self_instruct import SelfInstruct
from graft.data.endpoint import complete

RECIPE = load(Path(__file__).parents[3] / "configs/recipes/image-intent-tiny.toml")
SEEDS = read_seeds(Path(__file__).parents[3] / "configs/recipes/image-intent/seeds.jsonl", RECIPE.task)


def recipe(**augment):
    return RECIPE.model_copy(update={"augment": RECIPE.augment.model_copy(update={"max_rounds": 1000, **augment})})


def drive(loop, answer, budget=10**9):
    """The loop to its end; every request's key in order. `answer` takes a body and returns a response, or None to fail."""
    keys = []
    while requests := loop.requests():
        assert len(keys) < 20_000, "the loop does not end"
        answers = []
        for request in requests:
            asked = len(keys) < budget
            response = answer(request.body) if asked else None
            answers.append(Answer(request.key, response, None if response or not asked else "500: out of order", asked))
            keys += [request.key] * asked
        loop.accept(answers)
    return keys


def test_what_was_not_answered_judges_no_family():
    """An outage of one generation retires no family; what the server refused does."""
    for unanswered in (True, False):
        loop = SelfInstruct(recipe(rows_per_seed=40), [seed(0), seed(1, "call")])
        first = loop.requests()
        answers = [Answer(r.key, strange_model(r.body, 0)) for r in first]
        of_one = [n for n, r in enumerate(first) if json.loads(r.body["messages"][-1]["content"].splitlines()[-1])["user"] == "一的種子"]
        for n in of_one:
            answers[n] = Answer(first[n].key, error="no answer after 4 attempts: 429", unanswered=unanswered)
        assert len(of_one) == RECIPE.augment.calls_per_generation
        loop.accept(answers)
        drive(loop, lambda body: strange_model(body, 0))
        assert loop.counts()["reasons"]["failed"] == len(of_one)
        assert loop.counts()["stopped"] == {"text": "target" if unanswered else "saturation", "call": "target"}


def grammar(body):
    status, response = complete(body)
    assert status == 200
    return response


def chat(content, finish="stop", **message):
    return {"choices": [{"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}]}


def rewrites(*pairs):
    return chat(json.dumps({"rewrites": [{"user": u, "assistant": a} for u, a in pairs]}, ensure_ascii=False))


def seed(n, label="text"):
    """A seed whose family's texts all begin with a character of their own."""
    mark = chr(0x4E00 + n)
    assistant = 'call("generate_image", {"prompt": "狗"})' if label == "call" else "好的"
    messages = [{"role": "user", "content": mark + "的種子"}, {"role": "assistant", "content": assistant}]
    return {"id": f"seed-{n}", "messages": messages, "label": label, "family": f"seed-{n}", "parent": None, "request": None}


def strange_model(body, faults=0.3, words=None):
    """Answers by the request alone, many of them bad. Texts keep their family's mark, or are drawn from `words` alone."""
    parent = json.loads(body["messages"][-1]["content"].splitlines()[-1])
    rng = random.Random(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest())
    if rng.random() < faults / 3:
        return rng.choice(
            [None, chat('{"rewr', "length"), chat(None, "content_filter"), chat(None, refusal="no"), chat("?"), chat('{"rewrites": []}')]
        )
    made = []
    for _ in range(rng.randint(1, 6)):
        text = rng.choice(words) if words else parent["user"][0] + "".join(chr(rng.randint(0x5000, 0x9000)) for _ in range(8))
        pair = {"user": parent["user"] if rng.random() < faults / 3 else text, "assistant": parent["assistant"]}
        made.append(rng.choice([{"user": text}, 7, {**pair, "assistant": "call("}]) if rng.random() < faults / 3 else pair)
    return chat(json.dumps({"rewrites": made}, ensure_ascii=False))


def check_accounts(loop):
    """In = accepted + rejected, by request and in all; every reject says what and why; rows and rejects are told apart."""
    counts, log, rejected, rows = loop.counts(), loop.log, loop.rejected, loop.rows()
    assert all(line["rewrites"] == line["accepted"] + line["rejected"] >= 1 for line in log)
    assert counts["rewrites"] == sum(line["rewrites"] for line in log) == counts["accepted"] + counts["rejected"]
    assert counts["rejected"] == len(rejected) == sum(counts["reasons"].values()) and len(log) == counts["requests"]
    assert counts["accepted"] == sum(row["request"] is not None for row in rows) and sum(counts["rows"].values()) == len(rows)
    assert all(r["id"] and r["request"] and r["reason"] for r in rejected)
    assert len(rows) == len({row["id"] for row in rows})
    ids = [(r["family"], r["id"]) for r in [*rows, *rejected]]  # two families may come to rewrite the same words: one request
    assert len(ids) == len(set(ids))
    known = {row_id for _, row_id in ids} | {row["id"] for row in SEEDS}
    assert all(row["parent"] in known for row in rows if row["request"])
    return counts


LOOPS = st.fixed_dictionaries(
    {
        "rewrites_per_call": st.integers(1, 5),
        "calls_per_generation": st.integers(1, 4),
        "saturation": st.sampled_from([0.0, 0.05, 0.5]),
        "rows_per_class": st.integers(4, 60),
    }
)


@settings(max_examples=60, deadline=None)
@given(LOOPS, st.integers(1, 5), st.integers(0, 3), st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from(["call", "text"]))
def test_a_seed_added_asks_for_its_own_family_alone(keys, texts, calls, faults, label):
    """A class's target: where no rewrite is like another family's, the other families' requests were all made before."""
    seeds = [seed(n) for n in range(texts)] + [seed(50 + n, "call") for n in range(calls)]
    before, after = SelfInstruct(recipe(**keys), seeds), SelfInstruct(recipe(**keys), [*seeds, seed(99, label)])
    old = drive(before, lambda body: strange_model(body, faults))
    drive(after, lambda body: strange_model(body, faults))
    assert {line["request"] for line in after.log if line["family"] != "seed-99"} <= set(old)
    check_accounts(after)


@settings(max_examples=60, deadline=None)
@given(LOOPS, st.integers(2, 8), st.sampled_from([0.0, 0.3]), st.integers(3, 60), st.integers(2, 12))
def test_with_a_target_a_seed_no_collision_changes_that(keys, families, faults, vocabulary, target):
    """Families that make each other's texts all the time: a seed added at the end still costs its own requests alone."""
    words = ["".join(chr(random.Random(n * 100 + i).randint(0x5000, 0x9000)) for i in range(6)) for n in range(vocabulary)]
    seeds = [seed(n, "call" if n % 2 else "text") for n in range(families)]
    run = recipe(**keys, rows_per_seed=target)
    before, after = SelfInstruct(run, seeds), SelfInstruct(run, [*seeds, seed(99)])
    old = drive(before, lambda body: strange_model(body, faults, words))
    drive(after, lambda body: strange_model(body, faults, words))
    assert [line["request"] for line in after.log if line["family"] != "seed-99"] == old
    assert [r for r in after.rows() if r["family"] != "seed-99"] == before.rows()
    check_accounts(after)


@settings(max_examples=40, deadline=None)
@given(LOOPS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_what_a_person_rejects_is_replaced_and_nothing_is_asked_anew(keys, families, rng):
    seeds = [seed(n) for n in range(families)]
    before = SelfInstruct(recipe(**keys), seeds)
    old = drive(before, strange_model)
    made = [row["id"] for row in before.rows() if row["request"]]
    review = {row_id: rng.choice(["keep", "reject"]) for row_id in made}
    after = SelfInstruct(recipe(**keys), seeds, review)
    new = drive(after, strange_model)
    assert new[: len(old)] == old
    refused = {row_id for row_id, decision in review.items() if decision == "reject"}
    assert {r["id"] for r in after.rejected if r["reason"] == "rejected by a person"} >= refused
    assert {row["id"] for row in after.rows()} >= set(made) - refused
    assert after.counts()["rows"] == before.counts()["rows"] or after.stopped == {"text": "saturation"}
    check_accounts(after)


@settings(max_examples=40, deadline=None)
@given(LOOPS, st.integers(0, 40))
def test_a_budget_ends_the_loop_and_more_of_it_takes_it_up(keys, budget):
    seeds = [seed(0), seed(1), seed(50, "call")]
    whole, cut = SelfInstruct(recipe(**keys), seeds), SelfInstruct(recipe(**keys), seeds)
    asked = drive(whole, strange_model)
    paid = drive(cut, strange_model, budget)
    counts = check_accounts(cut)
    assert paid == asked[:budget] and counts["requests"] == len(paid)
    if budget < len(asked):
        assert counts["unasked"] > 0 and set(cut.stopped.values()) <= {"budget", "target"} and "budget" in cut.stopped.values()
    else:
        assert cut.rows() == whole.rows()


@pytest.mark.parametrize("novelty", [0.7, 0.8, 1.0])
def test_the_tiny_recipe_reaches_its_target(novelty):
    loop, again = (SelfInstruct(recipe(novelty=novelty, language="zh-Hant"), SEEDS) for _ in range(2))
    asked = drive(loop, grammar)
    counts = check_accounts(loop)
    print(f"\nnovelty {novelty}: {counts}")
    assert counts["rows"] == {"call": 600, "text": 600} == loop.targets() and counts["stopped"] == {"call": "target", "text": "target"}
    assert len(asked) == len(set(asked)) < 400
    assert counts["reasons"].get("surplus", 0) < 2 * RECIPE.augment.rewrites_per_call, "a round asks for no more than is missing"
    assert drive(again, grammar) == asked and again.rows() == loop.rows(), "the same rows, whoever asks"
    by_family = [sum(row["family"] == s["family"] for row in loop.rows()) for s in SEEDS]
    assert max(by_family) <= 2 * min(by_family) + 8, "families take turns"
    generations = {line["generation"] for line in loop.log}
    parents = {row["parent"] for row in loop.rows() if row["request"]}
    assert len(generations) > 1 and parents - {s["id"] for s in SEEDS}, "accepted rewrites are rewritten in their turn"
    assert sum(map(len, loop.by_round())) == 1200 and loop.by_round()[0] == SEEDS


@pytest.mark.parametrize("last", [None, *range(0, 33, 8)])
def test_a_seed_added_to_the_real_ones(last):
    """Against the embedded endpoint, whose families do collide, with a target a seed."""
    added = SEEDS[-1] if last is None else SEEDS[last]
    seeds = [s for s in SEEDS if s is not added]
    run = recipe(rows_per_seed=20)
    before, after = SelfInstruct(run, seeds), SelfInstruct(run, [*seeds, added])
    old = set(drive(before, grammar))
    new = set(drive(after, grammar)) - old
    own = {line["request"] for line in after.log if line["family"] == added["family"]}
    print(f"\n{len(old)} requests made before, {len(new)} more for the seed added")
    assert new and new <= own


def test_faults_of_every_kind_are_told_by_their_reason():
    call = 'call("generate_image", {"prompt": "%s"})'
    answers = iter(
        [
            rewrites(("今天好嗎今天好嗎", "好"), ("", "好"), ("明天的明天呢", call % "狗"), ("一" * 5000, "好"), ("今天好嗎今天好嗎！", "好")),
            chat('{"rewrites": [{"user": "a', "length"),
            chat(None, "content_filter"),
            chat(None, refusal="I cannot\nhelp"),
            chat("對不起"),
            chat('{"rewrites": []}'),
            chat('{"rewrites": ["x", {"user": 1, "assistant": "b"}]}'),
            None,
            rewrites(("请画一只狗，谢谢你", "好"), ("How are you today", "fine thanks"), ("新的說法在這裡", "call(")),
            {"error": {"message": "overloaded"}},
        ]
    )
    loop = SelfInstruct(recipe(calls_per_generation=10, language="zh-Hant", rows_per_class=1000, saturation=0.5), [seed(0)])
    drive(loop, lambda body: next(answers))
    assert [r["reason"] for r in loop.rejected] == [
        "malformed: user or assistant is empty",
        "wrong kind: the answer is call, its seed's is text",
        "wrong length: 5001 characters, augment has 2 to 4096",
        f"not asked for: more than {RECIPE.augment.rewrites_per_call} rewrites",
        "truncated",
        "filtered",
        "refused: I cannot help",
        "malformed: no JSON in the answer",
        "malformed: no rewrites",
        "malformed: user or assistant is no text",
        "malformed: user or assistant is no text",
        "failed: 500: out of order",
        "wrong language: Simplified characters: 请画谢",
        "wrong language: not mostly Han: 0 of 6 words and characters",
        "wrong kind: the answer is malformed, its seed's is text",
        "malformed: the server reports {'message': 'overloaded'}",
    ]
    assert loop.rejected[4]["text"] == '{"rewrites": [{"user": "a' and loop.rejected[2]["user"] == "一" * 5000
    assert loop.rejected[3]["user"] == "今天好嗎今天好嗎！"
    counts = check_accounts(loop)
    assert counts["accepted"] == 1 and counts["failed"] == 1 and counts["stopped"] == {"text": "saturation"}


def test_every_end_has_its_reason():
    def ended(answer=grammar, budget=10**9, seeds=(seed(0), seed(50, "call")), **keys):
        loop = SelfInstruct(recipe(**keys), list(seeds))
        drive(loop, answer, budget)
        check_accounts(loop)
        return loop.stopped, loop.round

    both = lambda reason: {"text": reason, "call": reason}  # noqa: E731
    assert ended(rows_per_class=1) == (both("target"), 0)
    assert ended(lambda body: None, saturation=0.0) == (both("saturation"), 1), "a server that fails always ends it in one generation"
    assert ended(lambda body: rewrites(("種子", "好")), rows_per_class=9)[0] == both("saturation")
    assert ended(strange_model, max_rounds=2, rows_per_class=1000) == (both("rounds"), 2)
    assert ended(budget=0) == (both("budget"), 1)
    loop = SelfInstruct(recipe(rows_per_class=14), SEEDS)  # more seeds than rows wanted
    assert not loop.requests() and loop.counts()["rows"] == {"call": 14, "text": 14} and len(loop.rows()) == 28


def test_a_row_like_an_earlier_familys_gives_way_whenever_it_was_made():
    """Priority is the seed file's, not the clock's: the later family's row was accepted first and is dropped."""
    same = "兩個家族都會說的同一句話"
    made = {"一": iter([rewrites(("一家自己的話在這裡", "好"))]), "丁": iter([rewrites((same, "好"))])}

    def answer(body):
        return next(made[json.loads(body["messages"][-1]["content"].splitlines()[-1])["user"][0]])

    loop = SelfInstruct(recipe(calls_per_generation=1, rows_per_class=100, saturation=0.0), [seed(0), seed(1)])
    first = loop.requests()
    assert loop.requests() == first and loop.round == 1, "asking again plans nothing new"
    loop.accept([Answer(r.key, answer(r.body)) for r in first])
    assert [row["family"] for row in loop.rows() if row["request"]] == ["seed-0", "seed-1"]
    second = loop.requests()
    loop.accept([Answer(r.key, rewrites((same, "好"))) for r in second])
    [kept] = [row for row in loop.rows() if row["messages"][-2]["content"] == same]
    assert kept["family"] == "seed-0"
    [dropped] = [r for r in loop.rejected if r["family"] == "seed-1" and r["reason"].endswith(kept["id"])]
    assert dropped["reason"] == f"similar: 1.00 to {kept['id']}"
    check_accounts(loop)


def test_answers_in_another_order_are_refused():
    loop = SelfInstruct(recipe(), SEEDS)
    requests = loop.requests()
    with pytest.raises(ValueError, match="is due"):
        loop.accept([Answer(r.key, grammar(r.body)) for r in reversed(requests)])


def test_what_is_sent():
    def body(**api):
        run = RECIPE.model_copy(update={"api": RECIPE.api.model_copy(update=api), "seed": 3})
        return SelfInstruct(run, SEEDS).requests()[1].body

    plain = body()
    assert plain["seed"] == 3_000_000 and plain["max_tokens"] == 1024 and "service_tier" not in plain
    assert plain["response_format"]["json_schema"]["strict"] is True
    assert "4 則" in plain["messages"][1]["content"] and json.loads(plain["messages"][1]["content"].splitlines()[-1])["user"]
    other = body(output_limit="max_completion_tokens", service_tier="flex", response_format="none", max_output_tokens=7)
    assert other["max_completion_tokens"] == 7 and other["service_tier"] == "flex" and "response_format" not in other and "max_tokens" not in other
    assert body(response_format="json_object")["response_format"] == {"type": "json_object"}
