"""The half of cpt.py that needs graft whole: documents apart that nothing is trained on, packed shards of the others, and what will be asked.

The base reads Wikipedia articles (DRCD) and GSM8K, and so does its tokenizer: no Taigi. The news are cut into their articles, cleaned and deduplicated by
graft's own prepare; a draw then sets whole articles apart, and a second prepare leaves out of the others what still shares an n-gram with one of those. The
cloze is of the articles set apart, one question each: four phrases, of which one is the next. 1 minute on two cores.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from small_base import TINY_BASE, Base, articles, hand_over, size


@dataclass(frozen=True)
class Scale(Base):
    """Of the data, the base and its CPT."""

    documents: int = 100_000  # of news and of articles, at most
    problems: int = 10_000  # at most
    held_out: int = 640  # articles of the news, and a fifteenth as many of Wikipedia's, which are longer
    items: int = 500  # of the cloze, at least
    batch: int = 8  # bins
    lr: float = 1e-3
    epochs: float = 3.0
    every: int = 50  # steps between two validations
    r: int = 64
    alpha: float = 128


TINY = Scale(**TINY_BASE | {"base_epochs": 1}, documents=90, problems=200, held_out=45, items=20, batch=4, lr=1e-2, every=10, r=8, alpha=16)
CHOICES = 4
PHRASE = range(6, 25)  # letters and digits of a phrase that is asked for
SHOWN = 8  # phrases before it, at most, and the headline
BEFORE = 3  # at least
APART = """
name = "cpt-apart"
[corpora.taigi]
path = "taigi.jsonl"
clean = {{ max_chars = 1000000 }}
documents = {documents}
[corpora.mandarin]
path = "mandarin.jsonl"
clean = {{ merge_by = "title", max_chars = 1000000 }}
documents = {documents}
"""
RECIPE = """
name = "cpt"
[corpora.taigi]
path = "taigi.jsonl"
clean = {{ max_chars = 1000000 }}
[corpora.mandarin]
path = "mandarin.jsonl"
clean = {{ max_chars = 1000000 }}
[corpora.maths]
path = "maths.jsonl"
[shard]
seq_len = {seq_len}
[base]  # of which the tokenizer alone is wanted
vocab_size = {vocabulary}
hidden_size = 8
layers = 1
heads = 1
kv_heads = 1
[base.train]
corpora = ["mandarin", "maths"]
weights = {{ mandarin = 2.0 }}
lora = false
[cpt]
corpora = ["taigi"]
[sft]  # no recipe ends before it
corpora = ["maths"]
[evaluate.tasks.taigi]
kind = "perplexity"
path = "taigi-apart.jsonl"
[evaluate.tasks.mandarin]
kind = "perplexity"
path = "mandarin-apart.jsonl"
[evaluate.tasks.cloze]
kind = "cloze"
path = "cloze.jsonl"
mcq = {{ prompt = "{{article}}\\n{{question}}\\n", reply = "{{text}}" }}
"""


def prepare(folder: Path, data: Path, scale: Scale) -> None:
    """Write folder/tokenizer, folder/base and folder/cpt with train and validation shards, folder/questions, the recipe and counts.json."""
    from graft import pipeline
    from graft.core.rows import read_jsonl, write_jsonl
    from graft.core.stages import Plan
    from graft.data.prepare import documents

    if folder.exists():
        sys.exit(f"{folder} exists: remove it, or name another folder")
    with tempfile.TemporaryDirectory(prefix="graft-") as own:
        first, second = Path(own) / "apart", Path(own) / "cpt"
        write_jsonl(first / "taigi.jsonl", ({"text": text} for text in news((data / "taigi_news.txt").read_text(encoding="utf-8"))))
        write_jsonl(first / "mandarin.jsonl", articles(data))
        (first / "recipe.toml").write_text(APART.format(**asdict(scale)), encoding="utf-8")
        plan = Plan(first / "recipe.toml", (), first)
        pipeline.run(plan)
        prepared = plan.artifact("prepare")
        apart, others = {}, {}
        for name, count in (("taigi", scale.held_out), ("mandarin", max(5, scale.held_out // 15))):
            apart[name], others[name] = drawn(list(documents(prepared.path, name)), count)
            write_jsonl(second / f"{name}.jsonl", ({"text": text} for text in others[name]))
            write_jsonl(second / f"{name}-apart.jsonl", ({"text": text} for text in apart[name]))
        items, left_out = cloze(apart["taigi"], others["taigi"])
        write_jsonl(second / "cloze.jsonl", items)
        problems = list(read_jsonl(data / "gsm8k_train.jsonl"))[: scale.problems]
        write_jsonl(second / "maths.jsonl", ({"text": f"{row['question']}\n{row['answer']}"} for row in problems))
        (second / "recipe.toml").write_text(RECIPE.format(**asdict(scale)), encoding="utf-8")
        plan = Plan(second / "recipe.toml", (), second)
        pipeline.run(plan, until="shard-cpt")
        hand_over(plan, folder, ["base", "cpt"])
        shutil.copytree(plan.artifact("questions").path, folder / "questions")
        shutil.copy(plan.path, folder)
        counts = {
            "deduplicated": prepared.counts["corpora"],
            "apart": {name: len(texts) for name, texts in apart.items()},
            "decontaminated": plan.artifact("prepare").counts["corpora"],
            "cloze": {"items": len(items), "left out": left_out},
            "shards": {stage: plan.artifact(f"shard-{stage}").counts["train"] for stage in ("base", "cpt")},
        }
        (folder / "counts.json").write_text(json.dumps(counts, ensure_ascii=False, indent=1), encoding="utf-8")
    print(size(folder))


def news(text: str) -> Iterator[str]:
    """The articles of the news, a phrase a line, the headline first: it stands before the line that names the reporter, which is left out."""
    lines = [line.strip() for line in text.splitlines()]
    heads = [n for n, line in enumerate(lines[1:]) if line.endswith("報導") and len(line) < 60]
    for head, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        yield "\n".join([lines[head], *lines[head + 2 : end]])


def drawn(texts: list[str], count: int) -> tuple[list[str], list[str]]:
    """(so many of the texts, the others), each in their order."""
    chosen = set(random.Random(0).sample(range(len(texts)), min(count, len(texts) // 2)))
    return [text for n, text in enumerate(texts) if n in chosen], [text for n, text in enumerate(texts) if n not in chosen]


# ---- the cloze --------------------------------------------------------------------------------------------------------
class Phrase(NamedTuple):
    article: int
    line: int
    text: str
    letters: str


def cloze(held_out: list[str], trained: list[str]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(an item an article where it has one, what was left out by reason): headline, phrases before, the next phrase and three of other articles.

    The four end with the same mark and differ by two letters in length at most; none stands in a training text or earlier in the article.
    """
    rng, left_out = random.Random(0), Counter[str]()
    known = "\n".join(map(letters_of, trained))
    pool: dict[str, list[Phrase]] = defaultdict(list)  # by the mark at the end
    candidates: list[list[Phrase]] = []
    whole = [letters_of(text) for text in held_out]
    for article, text in enumerate(held_out):
        lines = text.split("\n")
        found = [Phrase(article, n, line, letters_of(line)) for n, line in enumerate(lines)][1 + BEFORE :]
        found = [phrase for phrase in found if len(phrase.letters) in PHRASE]
        new = [phrase for phrase in found if phrase.letters not in known]
        left_out["phrases that stand in a training text"] += len(found) - len(new)
        new = [phrase for phrase in new if whole[article].count(phrase.letters) == 1]
        candidates.append(new)
        for phrase in new:
            pool[mark_of(phrase.text)].append(phrase)
    items: list[dict[str, Any]] = []
    for article, own in enumerate(candidates):
        rng.shuffle(own)
        for right in own:
            if len(wrong := others_like(right, pool[mark_of(right.text)], whole[article], rng)) == CHOICES - 1:
                items.append(item(held_out[article].split("\n"), right, wrong, rng))
                break
        else:
            left_out["articles without an item"] += 1
    return items, dict(left_out)


def others_like(right: Phrase, pool: list[Phrase], article: str, rng: random.Random) -> list[Phrase]:
    """Three phrases of three other articles, none of which stands in this one; fewer where there are not so many."""
    like = [p for p in pool if p.article != right.article and abs(len(p.letters) - len(right.letters)) <= 2 and p.letters not in article]
    rng.shuffle(like)
    return list({p.article: p for p in {p.letters: p for p in like}.values()}.values())[: CHOICES - 1]


def item(lines: list[str], right: Phrase, wrong: list[Phrase], rng: random.Random) -> dict[str, Any]:
    """In graft's layout of questions with options (`mcq`): the article is its headline, the question what was said before."""
    options = [right, *wrong]
    rng.shuffle(options)
    named = {f"option{n}": phrase.text for n, phrase in enumerate(options, 1)}
    before = lines[max(1, right.line - SHOWN) : right.line]
    return {"article": lines[0], "question": "\n".join(before), **named, "answer": options.index(right) + 1}


def letters_of(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def mark_of(phrase: str) -> str:
    """What a phrase ends with, where that is no letter."""
    return "" if phrase[-1].isalnum() else phrase[-1]
