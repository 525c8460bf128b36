"""The grammar behind the embedded endpoint and the `grammar` corpus: no language model, the same text for the same seed.

`grammar.toml` holds a lexicon, seed families with their forms, and third-person passages. A family's rewrite always
comes from that family's own forms, so lineage by seed stays true; the passages have the form of no family.
About 30,000 sentences a second.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

from graft.core.calls import format_call

_TOKEN = re.compile(r"\{([A-Za-z]+)\}|\[([^\[\]]*)\]")
# an upper-case word is bound once a row; it expands as the lower-case word named here
_BOUND = {"S": "s", "T": "topic", "C": "city", "F": "food", "R": "relative", "P": "phrase", "L": "language", "N": "number", "A": "name", "B": "name"}


@dataclass(frozen=True)
class Family:
    name: str
    label: str  # "call" | "text"
    forms: tuple[str, ...]
    replies: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]  # one a form; groups are the open content words


@cache
def _tables() -> tuple[dict[str, list[str]], list[Family], list[str], list[list[str]]]:
    tree = tomllib.loads(resources.files("graft.data").joinpath("grammar.toml").read_text(encoding="utf-8"))
    words = {k: v.split("|") for k, v in {**tree["lexicon"], **tree["words"]}.items()}
    families = []
    functional = {k: words[k] for k in ("please", "thanks", "soon")}
    for label in ("call", "text"):
        for name, entry in tree[label].items():
            patterns = tuple(re.compile(_regex(form, functional)) for form in entry["forms"])
            families.append(Family(name, label, tuple(entry["forms"]), tuple(entry.get("replies", ())), patterns))
    return words, families, tree["corpus"]["passages"], tree["dialogue"]["turns"]


def _regex(form: str, functional: dict[str, list[str]]) -> str:
    """A pattern of the form: content words are open groups, function words and choices are their alternatives."""
    out, at = "", 0
    for m in _TOKEN.finditer(form):
        out += re.escape(form[at : m.start()])
        choices = m[2].split("|") if m[2] is not None else functional.get(m[1])
        out += "(?:" + "|".join(re.escape(c) for c in choices) + ")" if choices else "(.+?)"
        at = m.end()
    return out + re.escape(form[at:])


def families() -> list[Family]:
    return _tables()[1]


def expand(form: str, rng: random.Random, bound: dict[str, str]) -> str:
    """One sentence of `form`; `bound` keeps the values of upper-case words."""
    words = _tables()[0]

    def value(m: re.Match[str]) -> str:
        if m[2] is not None:
            return expand(rng.choice(m[2].split("|")), rng, bound)
        word = m[1]
        if word not in _BOUND:
            return expand(rng.choice(words[word]), rng, bound)
        if word not in bound:
            choices = [w for w in words[_BOUND[word]] if w not in bound.values()]
            bound[word] = expand(rng.choice(choices), rng, bound)
        return bound[word]

    return _TOKEN.sub(value, form)


def row(family: Family, rng: random.Random) -> dict[str, str]:
    """A user sentence of the family with its answer: {"user", "assistant"}."""
    bound: dict[str, str] = {}
    user = expand(rng.choice(family.forms), rng, bound)
    if family.label == "call":
        return {"user": user, "assistant": format_call("generate_image", "prompt", bound["S"])}
    replies = [r for r in family.replies if all(w in bound for w in re.findall(r"\{([A-Z])\}", r))]
    return {"user": user, "assistant": expand(rng.choice(replies), rng, bound)}


def recognise(sentence: str, label: str) -> Family | None:
    """The family whose form the sentence has; of several the one that spells out more of it. None for a stranger's."""
    best: tuple[int, Family] | None = None
    for family in families():
        for pattern in family.patterns if family.label == label else ():
            if match := pattern.fullmatch(sentence):
                literal = len(sentence) - sum(map(len, match.groups()))
                if best is None or literal > best[0]:
                    best = (literal, family)
    return best[1] if best else None


def corpus(documents: int, seed: int) -> Iterator[str]:
    """`documents` passages of three to six sentences in the third person."""
    rng = random.Random(f"corpus-{seed}")
    passages = _tables()[2]
    for _ in range(documents):
        yield "".join(expand(rng.choice(passages), rng, {}) for _ in range(rng.randint(3, 6)))


def dialogues(documents: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """`documents` conversations of one turn: other tools' calls, repeating, and questions about a passage."""
    rng = random.Random(f"dialogues-{seed}")
    turns = _tables()[3]
    for _ in range(documents):
        bound: dict[str, str] = {}
        user, assistant = (expand(form, rng, bound) for form in rng.choice(turns))
        yield [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def sentences(text: str) -> list[str]:
    """The pieces of a passage between marks that end or quote a sentence, and each line of a conversation, whole."""
    lines = [line for line in re.split(r"<\|[a-z_]+\|>|\n", text) if line]
    return lines + [piece for line in lines for piece in re.split("[。！？「」：；]", line) if piece]
