"""Augmented rows: split by family, cleaned, and of each user text the first."""

import random
from pathlib import Path

import pytest

from graft.core.errors import DataError
from graft.core.recipe import Recipe, load
from graft.core.sections import Decontaminate
from graft.data.decontaminate import Gate
from graft.data.seed_rows import families_held_out, hold_out_rows, select, tidy, told_by

RECIPE = Recipe.model_validate({"name": "r", "augment": {"seeds": "s"}, "sft": {}, "corpora": {}, "model": {"base": "x"}})


def row(n, label="text", family="text-00"):
    return {"id": f"r{n}", "label": label, "family": family}


def chat(name, user, assistant="好的", label="text", family="text-00"):
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"id": name, "messages": messages, "label": label, "family": family, "parent": None, "request": None}


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [("  e\u0301 \r\n b\t\n\n\n\nc ", "é\n b\n\nc"), ("\ufeffa\x00b\u200bc\x7f", "abc"), ("\u3000好\u3000\n", "好"), ("\n \n", "")],
)
def test_a_message_is_tidied(raw, wanted):
    assert tidy(raw) == wanted == tidy(wanted)


def test_families_are_held_out_by_class():
    rows = [row(i, label, f"{label}-{i:02d}") for label, n in (("call", 18), ("text", 3)) for i in range(n)]
    chosen = families_held_out(rows, 0.25, 0)
    assert sorted(f[:4] for f in chosen) == ["call"] * 5 + ["text"], "4.5 and 0.75 families, rounded"
    assert families_held_out(random.Random(1).sample(rows, len(rows)), 0.25, 0) == chosen, "the rows' order does not matter"
    assert families_held_out(rows, 0.25, 1) != chosen
    assert len(families_held_out(rows, 0.0, 0)) == 2 and len(families_held_out(rows, 0.99, 0)) == 19, "at least one, never all"
    with pytest.raises(DataError, match="class 'text' has 1 seed families"):
        families_held_out([r for r in rows if r["label"] == "call"] + [row(0)], 0.25, 0)


def test_validation_rows_are_chosen_by_id():
    rows = [row(i) for i in range(2000)]
    train, held = hold_out_rows(rows, 0.1)
    assert 150 < len(held) < 250 and len(train) + len(held) == 2000
    fewer = hold_out_rows(rows[::2], 0.1)[1]
    assert fewer == [r for r in held if r in rows[::2]], "a row's side does not depend on the others"
    assert [len(x) for x in hold_out_rows(rows[:2], 0.0001)] == [1, 1]
    assert [len(x) for x in hold_out_rows(rows, 0.0)] == [2000, 0]


def test_rows_are_kept_or_rejected_with_a_reason():
    test = chat("test", "請幫我看看今天的天氣", family="text-01")
    rows = [
        test,
        chat("first", "第一個問題在這裡"),
        chat("same", "第一個問題在這裡"),
        chat("same-user", "第一個問題在這裡", "不好"),
        chat("leak", "他說：請幫我，看看今天的天氣！"),
        chat("call-labelled", "另一個問題在這裡", 'call("generate_image", {"prompt": "山"})'),
        chat("long", "長" * 5000),
        chat("surrogate", "abc \ud800 def"),
        {**chat("roles", "還有問題"), "messages": [{"role": "user", "content": "還有問題"}]},
    ]
    gate = Gate.of(told_by(test, RECIPE.prepare, RECIPE.task), Decontaminate())
    kept, rejected = select(rows, {"text-01"}, gate, RECIPE)
    assert [r["id"] for r in kept["test"]] == ["test"] and [r["id"] for r in kept["train"] + kept["validation"]] == ["first"]
    assert {r["id"]: r["reason"] for r in rejected} == {
        "same": "duplicate",
        "same-user": "duplicate user text",
        "leak": "contaminated",
        "call-labelled": "the answer is call, the label text",
        "long": "too long",
        "surrogate": "invalid UTF-8",
        "roles": "unbalanced roles",
    }
    assert len(rows) == sum(map(len, kept.values())) + len(rejected)


def test_the_full_size_recipe_splits_3000_rows_as_its_system_did_but_by_whole_families():
    """2,160 / 240 / 600 there; 4 of 18 and 3 of 15 seeds are as near as families come."""
    full = load(Path(__file__).parents[2] / "configs/recipes/image-intent-8b.toml")
    seeds, made = {"call": 18, "text": 15}, full.augment.rows_per_class
    rows = [row(n + made * (label == "text"), label, f"{label}-{n % count:02d}") for label, count in seeds.items() for n in range(made)]
    test = families_held_out(rows, full.prepare.test_families, full.seed)
    train, validation = hold_out_rows([r for r in rows if r["family"] not in test], full.prepare.validation)
    assert len(rows) == 3000 and len(test) == 7 and len(rows) - len(train) - len(validation) == pytest.approx(600, rel=0.06)
    assert len(train) == pytest.approx(2160, rel=0.03) and len(validation) == pytest.approx(240, rel=0.15)
