"""benchmarks/cpt.py: what is held out is apart, a cloze that asks no more than the next phrase, the figures, and both halves at a tiny scale."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib import import_module
from math import exp, inf, log, nan
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graft.core.recipe import Recipe
from graft.core.rows import read_jsonl, write_jsonl
from graft.data.grammar import corpus
from graft.data.readers.mcq import choices

from .halves import BENCHMARKS, problem, without_data_stages


@pytest.fixture
def cpt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("cpt")


@pytest.fixture
def cpt_data(cpt: ModuleType) -> ModuleType:
    return import_module("cpt_data")


# ---- the data ---------------------------------------------------------------------------------------------------------
def test_an_article_begins_with_its_headline_and_names_no_reporter(cpt_data: ModuleType) -> None:
    text = "before\n頭一篇\n民視新聞報導\n一 ，\n報導 講 二 。\n第二篇\n記者 甲 報導\n三 。"
    assert list(cpt_data.news(text)) == ["頭一篇\n一 ，\n報導 講 二 。", "第二篇\n三 。"]


def test_what_is_drawn_is_apart_from_the_others(cpt_data: ModuleType) -> None:
    texts = [f"text {n}" for n in range(30)]
    apart, others = cpt_data.drawn(texts, 12)
    assert len(apart) == 12 and sorted([*apart, *others]) == sorted(texts) and cpt_data.drawn(texts, 12) == (apart, others)
    assert [len(part) for part in cpt_data.drawn(texts, 100)] == [15, 15]


def texts_of(count: int, seed: int) -> list[str]:
    """A headline and ten phrases each, a third of them with a full stop behind."""
    rng = random.Random(seed)
    letters = [chr(0x4E00 + n) for n in range(500)]

    def phrase() -> str:
        return "".join(rng.choices(letters, k=rng.randint(4, 12))) + rng.choice([" ，", " ，", " 。"])

    return ["\n".join(["頭", *(phrase() for _ in range(10))]) for _ in range(count)]


def test_the_four_differ_in_nothing_but_where_they_are_from(cpt_data: ModuleType) -> None:
    held_out, trained = texts_of(60, 0), texts_of(30, 1)
    trained[0] += "\n" + held_out[0].split("\n", 1)[1]
    items, left_out = cpt_data.cloze(held_out, trained)
    assert 50 <= len(items) < 60 and len(items) + left_out["articles without an item"] == 60
    assert left_out["phrases that stand in a training text"] >= 3 and all(held_out[0] not in f"{i['question']}" for i in items)
    assert len({i["answer"] for i in items}) == 4
    asked = Recipe.model_validate({"name": "r", "corpora": {"c": {"path": "c"}}, "evaluate": {"tasks": {"cloze": tasks(cpt_data)["cloze"]}}})
    articles = set()
    for item in items:
        context, replies, options, right = choices(item, asked.evaluate.tasks["cloze"].mcq)
        assert replies == options and len(set(replies)) == 4 and right == item["answer"] - 1
        (article,) = [text for text in held_out if item["question"] in text]
        assert f"{item['question']}\n{replies[right]}" in article and context == f"頭\n{item['question']}\n"
        assert sum(reply in article for reply in replies) == 1 and not any(reply in text for reply in replies for text in trained)
        assert len({reply[-1] for reply in replies}) == 1
        assert all(abs(len(cpt_data.letters_of(reply)) - len(cpt_data.letters_of(replies[right]))) <= 2 for reply in replies)
        assert len({text for text in held_out for reply in replies if reply in text}) == 4, "of four articles"
        articles.add(article)
    assert len(articles) == len(items), "one question an article: the rows of an interval do not depend on each other"


def tasks(cpt_data: ModuleType) -> dict[str, Any]:
    import tomllib
    from dataclasses import asdict

    found: dict[str, Any] = tomllib.loads(cpt_data.RECIPE.format(**asdict(cpt_data.TINY)))["evaluate"]["tasks"]
    return found


# ---- what is said -----------------------------------------------------------------------------------------------------
def answers(nats: float, right: float, rows: int = 40) -> dict[str, dict[str, list[float]]]:
    """Of texts of 10 to 49 tokens of two characters, each token of so many nats; of a cloze whose first share is right."""
    tokens = [10.0 + n for n in range(rows)]
    texts = {"nats": [nats * t for t in tokens], "tokens": tokens, "characters": [2 * t for t in tokens]}
    correct = [float(n < right * rows) for n in range(rows)]
    metrics = ("correct_loglikelihood", "correct_loglikelihood_per_character")
    return {"taigi": texts, "mandarin": texts, "cloze": dict.fromkeys(metrics, correct) | {"questions": [1.0] * rows}}


def figures(cpt: ModuleType, *seeds: tuple[float, float]) -> dict[str, dict[str, Any]]:
    systems = {None: answers(3.0, 0.25), **{n: answers(*given) for n, given in enumerate(seeds)}}
    return {measure.name: cpt.compared(measure, systems) for measure in cpt.MEASURES}


def test_seeds_stand_together_and_alone_beside_the_base(cpt: ModuleType) -> None:
    found = figures(cpt, (2.0, 0.5), (1.0, 0.75))
    perplexity, bits, cloze = (found[f"{name}"] for name in ("Taigi, perplexity a token", "Taigi, bits a character", "cloze, by log-likelihood"))
    means = {system: mean["mean"] for system, mean in perplexity["systems"].items()}
    assert means == pytest.approx({"base": exp(3), "seed 0": exp(2), "seed 1": exp(1), "cpt": exp(1.5)})
    assert perplexity["systems"]["cpt"]["std"] == pytest.approx((exp(2) - exp(1)) / 2**0.5)
    assert bits["systems"]["seed 1"]["mean"] == pytest.approx(0.5 / log(2)) and bits["paired"]["difference"] == pytest.approx(
        -0.75 / log(2), abs=1e-5
    )
    assert perplexity["paired"]["difference"] == pytest.approx(-1.5) and perplexity["paired"]["p"] == 0
    assert cloze["systems"]["cpt"]["mean"] == 0.625 and cloze["paired"]["difference"] == 0.375
    assert cloze["systems"]["base"]["low"] < 0.25 < cloze["systems"]["base"]["high"]
    rows = cpt.table(found).splitlines()
    assert rows[0].endswith("| seed 0 | seed 1 |") and len({row.count("|") for row in rows}) == 1 and len(rows) == 2 + len(cpt.MEASURES)
    assert rows[2].startswith(
        "| Taigi, perplexity a token | 40 | 20.1 (20.1 to 20.1) | 4.5 (4.5 to 4.5) ± 3.3 | -1.500 nats (-1.500 to -1.500), p < 0.001 |"
    )
    assert "+37.5% (" in rows[6]


@pytest.mark.parametrize(
    ("seed", "curve", "base", "items", "why"),
    [
        ((3.5, 0.1), {10: 2.0}, {10: 2.0}, 40, []),  # worse than the base, which is an outcome
        ((2.0, 0.5), {10: 2.0}, {10: 2.0}, 41, ["the cloze has 40 questions, not 41"]),
        ((2.0, 0.5), {10: nan}, {10: 2.0}, 40, ["seed 0: a loss of nan"]),
        ((2.0, 0.5), {10: 2.0}, {10: inf}, 40, ["base: a loss of inf"]),
    ],
)
def test_a_run_is_broken_by_what_is_not_finite_never_by_its_outcome(cpt, seed, curve, base, items, why) -> None:
    assert cpt.broken(figures(cpt, seed), {0: curve}, base, items) == why


def test_a_perplexity_that_is_not_finite_is_named(cpt: ModuleType) -> None:
    why = cpt.broken(figures(cpt, (nan, 0.5)), {}, {}, 40)
    assert len(why) == 8 and why[0].startswith("Taigi, perplexity a token, seed 0: ")


def test_letters_in_common_need_no_model(cpt: ModuleType) -> None:
    rows = [{"text": "甲乙丙", "replies": ["丁戊", "甲戊 ，", "乙丙 。", "己"], "right": 2}, {"text": "甲", "replies": ["甲", "乙"], "right": 1}]
    assert cpt.in_common(rows) == 0.5


# ---- both halves ------------------------------------------------------------------------------------------------------
@pytest.mark.campaign
def test_both_halves_at_a_tiny_scale(tmp_path: Path) -> None:
    """On the CPU: 2 minutes on two cores."""
    data, texts = tmp_path / "data", [text for text in corpus(900, 0) if len(text) > 100]
    data.mkdir()
    phrases = [text.replace("，", " ，\n").replace("。", " 。\n").strip() for text in texts[:200]]
    (data / "taigi_news.txt").write_text("\n".join(f"頭 {n}\n民視新聞報導\n{text}" for n, text in enumerate(phrases)), encoding="utf-8")
    found = [{"title": f"{n}", "paragraphs": [{"context": text}]} for n, text in enumerate(texts[200:])]
    (data / "drcd_dev.json").write_text(json.dumps({"data": found}))
    write_jsonl(data / "gsm8k_train.jsonl", (problem(random.Random(n)) for n in range(200)))
    program = [sys.executable, str(BENCHMARKS / "cpt.py"), "--tiny"]
    subprocess.run([*program, "--prepare", str(tmp_path / "made"), "--data", str(data)], check=True)
    (tmp_path / "made").rename(tmp_path / "moved")
    environment = without_data_stages(tmp_path / "absent")
    subprocess.run([*program, "--train", str(tmp_path / "moved"), "--out", str(tmp_path / "out"), "--seeds", "0"], env=environment, check=True)
    result = json.loads((tmp_path / "out/cpt.json").read_text())
    systems = result["measures"]["Taigi, perplexity a token"]["systems"]
    assert list(systems) == ["seed 0", "base", "cpt"] and systems["seed 0"]["mean"] < systems["base"]["mean"]
    assert result["data"]["cloze"]["items"] == result["measures"]["cloze, by log-likelihood"]["rows"] >= 20
    assert len(list(read_jsonl(tmp_path / "out/predictions/seed 0/predictions-taigi.jsonl"))) == result["data"]["apart"]["taigi"]
    assert (tmp_path / "out/cpt.png").stat().st_size > 10_000 and "| cloze, by log-likelihood |" in (tmp_path / "out/cpt.md").read_text()
