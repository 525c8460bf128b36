"""Self-instruct (Wang et al. 2022, https://arxiv.org/abs/2212.10560): each seed's family grows by rewrites of its own rows.

The law that makes a later seed, and a person's decisions, cheap: a family's k-th request is a function of that family's
seed and of the rewrites that its own earlier generations made; of no other family, of no decision, of no round. A
generation is `calls_per_generation` calls, whose parents are fixed when it starts. So a family always goes the same way,
only more or less far, and the ledger answers what was asked before. A family's pool, what it rewrites, is therefore all
that is well-formed and new *within the family*; which of it becomes a row is decided after that: against the seeds, the
families earlier in the file and a person's rejections. A row may thus have a parent that is no row but a reject.

Rounds, acceptances and rows follow request order: within a class by (call, family), the order in which answers arrive
is never seen. The gate is most of the cost: about 7,000 rewrites a second with 50,000 rows made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from graft.core.recipe import Recipe
from graft.core.rows import Row
from graft.data.api.request import Answer, Request
from graft.data.augment.novelty import Gate
from graft.data.augment.review import BY_A_PERSON
from graft.data.augment.rewrites import request, rewrites_of, unfit


@dataclass
class _Made:
    """One rewrite as it came back. found: its id, request, family and text; reason: why it is no row, None while it is one."""

    found: Row
    reason: str | None = None
    row: Row | None = None  # None where it is not well-formed, or no news to its own family


@dataclass
class _Call:
    """One request that was answered, or failed. head: its line of the log, less the numbers; unanswered: for a reason that may pass."""

    head: Row
    made: list[_Made]
    failed: bool
    unanswered: bool


@dataclass
class _Family:
    """A seed and what descends from it."""

    seed: Row
    number: int  # in the seed file
    pool: list[Row]  # what may be rewritten, the seed first
    plan: list[tuple[Row, int]] = field(default_factory=list)  # (parent, sample) of each call up to the generation's end
    asked: Counter[str] = field(default_factory=Counter)  # row id -> calls planned of it
    calls: list[_Call] = field(default_factory=list)
    size: int = 1  # rows, the seed's included
    saturated: bool = False


class SelfInstruct:
    """The loop: `while requests := loop.requests(): loop.accept(answers)`.

    seeds: rows of `read_seeds`, in file order. review: a person's decisions, row id -> "keep" | "reject".
    stopped: class -> why it sends no more: "target", "saturation", "budget" or "rounds".
    """

    def __init__(self, recipe: Recipe, seeds: list[Row], review: Mapping[str, str] | None = None):
        self.recipe, self.review = recipe, review or {}
        self.round = self.unasked = 0
        self.stopped: dict[str, str] = {}
        self._families = [_Family(seed, number, [seed]) for number, seed in enumerate(seeds)]
        self._labels = list(dict.fromkeys(seed["label"] for seed in seeds))
        self._calls: list[_Call] = []
        self._pending: list[tuple[_Family, int, Request]] = []  # family, number of the call in it
        self._gate = Gate(recipe.augmentation.novelty)
        self._gated: list[tuple[_Family, _Made | None]] = []  # what each text of the gate is; None: the family's seed
        for family in self._families:
            self._gate.add(family.seed["messages"][-2]["content"])
            self._gated.append((family, None))

    def requests(self) -> list[Request]:
        """The next round's requests in order; empty when every class has stopped."""
        if not self._pending:
            chosen = [call for label in self._labels for call in self._next_calls(label)]
            self._pending = [(family, k, request(self.recipe, *family.plan[k])) for k, family in chosen]
            self.round += bool(chosen)
        return [wanted for _, _, wanted in self._pending]

    def accept(self, answers: list[Answer]) -> None:
        """Read the round's answers, one a request and in request order; every rewrite becomes a row or a reject."""
        for (family, k, wanted), answer in zip(self._pending, answers, strict=True):
            if answer.key != wanted.key:
                raise ValueError(f"the answer of {answer.key[:12]} stands where that of {wanted.key[:12]} is due")
            if answer.asked:
                self._read(family, k, answer)
            else:
                self.unasked += 1
        self._pending = []

    def rows(self) -> list[Row]:
        """Seeds and accepted rewrites, class by class in the order made; no class, or family, beyond its target."""
        made = [row for rows in self.by_round() for row in rows]
        return [row for label in self._labels for row in made if row["label"] == label]

    def by_round(self) -> list[list[Row]]:
        """The rows by the round that made them; the seeds are round 0."""
        rounds: list[list[Row]] = [[] for _ in range(self.round + 1)]
        seen: Counter[str] = Counter()
        for family in self._families:
            seen[self._group(family)] += 1
            if seen[self._group(family)] <= self._target:
                rounds[0].append(family.seed)
        for call, verdicts in self._verdicts():
            rounds[call.head["round"]] += [made.row for made, reason in verdicts if made.row and not reason]
        return rounds

    @property
    def rejected(self) -> list[Row]:
        """Every rewrite that is no row, in request order: id, request, family, reason, and the text where there is one."""
        return [{**made.found, "reason": reason} for _, verdicts in self._verdicts() for made, reason in verdicts if reason]

    @property
    def log(self) -> list[Row]:
        """One line a request that was answered or failed; `rewrites` = `accepted` + `rejected`, always."""
        lines = []
        for call, verdicts in self._verdicts():
            rejected = sum(reason is not None for _, reason in verdicts)
            lines.append({**call.head, "rewrites": len(verdicts), "accepted": len(verdicts) - rejected, "rejected": rejected})
        return lines

    def counts(self) -> dict[str, Any]:
        """Numbers for the manifest; `rewrites` = `accepted` + `rejected`; `reasons` counts the rejected by kind."""
        reasons = [reason for _, verdicts in self._verdicts() for _, reason in verdicts]
        rejected = Counter(reason.split(":")[0] for reason in reasons if reason)
        return {
            "rows": self.sizes(),
            "seeds": len(self._families),
            "rounds": self.round,
            "requests": len(self._calls),
            "failed": sum(call.failed for call in self._calls),
            "unasked": self.unasked,
            "rewrites": len(reasons),
            "accepted": len(reasons) - rejected.total(),
            "rejected": rejected.total(),
            "reasons": dict(rejected.most_common()),
            "stopped": self.stopped,
        }

    def sizes(self) -> dict[str, int]:
        """Rows a class, none beyond its target."""
        if self.recipe.augmentation.rows_per_seed:
            return {label: sum(min(f.size, self._target) for f in self._of(label)) for label in self._labels}
        return {label: min(sum(f.size for f in self._of(label)), self._target) for label in self._labels}

    def targets(self) -> dict[str, int]:
        """Rows wanted a class."""
        return {label: self._target * (len(self._of(label)) if self.recipe.augmentation.rows_per_seed else 1) for label in self._labels}

    @property
    def _target(self) -> int:
        return self.recipe.augmentation.rows_per_seed or self.recipe.augmentation.rows_per_class

    def _group(self, family: _Family) -> str:
        """What the target is a target of."""
        return family.seed["family"] if self.recipe.augmentation.rows_per_seed else family.seed["label"]

    def _of(self, label: str) -> list[_Family]:
        return [f for f in self._families if f.seed["label"] == label]

    def _verdicts(self) -> Iterator[tuple[_Call, list[tuple[_Made, str | None]]]]:
        """Every call with its rewrites and why each is no row; what is beyond the target is surplus."""
        by_name = {f.seed["family"]: f for f in self._families}
        room = Counter({group: self._target for group in map(self._group, self._families)})
        room.subtract(map(self._group, self._families))
        for call in self._calls:
            group, verdicts = self._group(by_name[call.head["family"]]), []
            for made in call.made:
                reason = made.reason or (None if room[group] > 0 else "surplus")
                room[group] -= reason is None
                verdicts.append((made, reason))
            yield call, verdicts

    def _next_calls(self, label: str) -> list[tuple[int, _Family]]:
        """(number of the call in its family, family) of a class's next round; none, and why in `stopped`, where it ends."""
        a, families = self.recipe.augmentation, self._of(label)
        short = [f for f in families if f.size < self._target] if a.rows_per_seed else families
        missing = len(short) if a.rows_per_seed else self._target - sum(f.size for f in families)
        active = [f for f in short if not f.saturated]
        if missing <= 0 or not active or self.unasked or self.round >= a.max_rounds:
            self.stopped[label] = "target" if missing <= 0 else "budget" if self.unasked else "rounds" if active else "saturation"
            return []
        for family in active:
            self._plan(family)
        if a.rows_per_seed:
            ends = {f.number: min(len(f.plan), len(f.calls) + math.ceil((self._target - f.size) / a.rewrites_per_call)) for f in active}
            return sorted(((k, f) for f in active for k in range(len(f.calls), ends[f.number])), key=_order)
        # one generation at a time: calls then follow (call, family) whatever the rounds cut off, and a family that is
        # added takes its share of each without changing the order of the others
        end = min(len(f.plan) for f in active)
        calls = sorted(((k, f) for f in active for k in range(len(f.calls), end)), key=_order)
        return calls[: math.ceil(missing / a.rewrites_per_call)]

    def _plan(self, family: _Family) -> None:
        """Where the generation is over, plan the next: its parents are the least asked of the pool, the seed first."""
        if len(family.calls) < len(family.plan):
            return
        for _ in range(self.recipe.augmentation.calls_per_generation):
            parent = min(family.pool, key=lambda row: family.asked[row["id"]])
            family.plan.append((parent, family.asked[parent["id"]]))
            family.asked[parent["id"]] += 1

    def _read(self, family: _Family, k: int, answer: Answer) -> None:
        """Judge what an answer holds, a rewrite at a time; one that holds none counts as one rejected rewrite."""
        a, parent = self.recipe.augmentation, family.plan[k][0]
        lineage = {"request": answer.key, "parent": parent["id"], "family": parent["family"], "label": parent["label"]}
        call = _Call({**lineage, "round": self.round, "generation": k // a.calls_per_generation}, [], answer.response is None, answer.unanswered)
        self._calls.append(call)
        family.calls.append(call)
        for n, (text, reason) in enumerate(rewrites_of(answer)):
            made = _Made({"id": f"{answer.key[:12]}-{n}", **lineage, **text}, reason)
            call.made.append(made)
            if not reason and n >= a.rewrites_per_call:
                made.reason = f"not asked for: more than {a.rewrites_per_call} rewrites"
            if not made.reason:
                self._judge(family, parent, made)
        if len(family.calls) % a.calls_per_generation == 0:
            self._check_saturation(family)

    def _judge(self, family: _Family, parent: Row, made: _Made) -> None:
        """Give a well-formed rewrite its row or its reason; it joins the pool where its own family has nothing like it."""
        user, assistant = made.found["user"], made.found["assistant"]
        made.reason = unfit(self.recipe, user, assistant, parent["label"])
        like = [] if made.reason else [(*self._gated[number], similarity) for number, similarity in self._gate.similar(user)]
        if own := [(similarity, _id(other, twin)) for other, twin, similarity in like if other is family]:
            made.reason = _similar(*max(own))
        if made.reason:
            return
        messages = [*parent["messages"][:-2], {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        made.row = {**{k: made.found[k] for k in ("id", "label", "family", "parent", "request")}, "messages": messages}
        family.pool.append(made.row)
        family.size += 1
        if self.review.get(made.row["id"]) == "reject":
            _drop(family, made, BY_A_PERSON)
        for other, twin, similarity in like:
            if twin is None or other.number < family.number:
                _drop(family, made, _similar(similarity, _id(other, twin)))
            else:
                _drop(other, twin, _similar(similarity, made.row["id"]))
        self._gate.add(user)
        self._gated.append((family, made))

    def _check_saturation(self, family: _Family) -> None:
        """A family ends after a generation that made too little; what a person refused was made all the same, what was not answered judges nothing."""
        calls = [call for call in family.calls[-self.recipe.augmentation.calls_per_generation :] if not call.unanswered]
        if not (made := [m for call in calls for m in call.made]):
            return
        accepted = sum(m.reason in (None, BY_A_PERSON) for m in made)
        family.saturated = accepted == 0 or accepted / len(made) < self.recipe.augmentation.saturation


def _drop(family: _Family, made: _Made, reason: str) -> None:
    if made.reason is None:
        made.reason = reason
        family.size -= 1


def _order(call: tuple[int, _Family]) -> tuple[int, int]:
    return call[0], call[1].number


def _id(family: _Family, made: _Made | None) -> str:
    return made.found["id"] if made else family.seed["id"]


def _similar(similarity: float, row_id: str) -> str:
    return f"similar: {similarity:.2f} to {row_id}"
