"""What `graft augment --dry-run` says: how many requests, tokens and dollars, before anything is sent.

Rounds that the ledger can answer are replayed, so the figures are those of what is left. Seconds; Ray is not started.
"""

from __future__ import annotations

import math

from graft.core.recipe import HELD_OUT
from graft.core.rows import read_seeds
from graft.core.stages import Plan
from graft.data.api.request import Answer, Request
from graft.data.api.session import Session, ledger_of
from graft.data.api.spending import Estimate, estimate
from graft.data.augment.review import read_decisions
from graft.data.augment.self_instruct import SelfInstruct
from graft.data.augment.vqa import foreseen


def outlook(plan: Plan) -> list[str]:
    """Lines for a person; nothing is sent and no artifact is made."""
    recipe = plan.recipe
    with Session(recipe, ledger_of(plan), plan.endpoint or "embedded") as session:
        spent = session.figures()
        history = session.history()
        if recipe.augmentation.images:
            schema = plan.answer_schema(HELD_OUT)
            bodies = list(foreseen(recipe, plan.path.parent, schema))
            lines, scale = [f"{len(bodies)} requests at most, before duplicates and images that cannot be read are left out"], 1.0
        else:
            loop, missing = _replay(plan, session)
            bodies = [r.body for r in missing]
            counts = loop.counts()
            rate = counts["accepted"] / counts["rewrites"] if counts["rewrites"] else 1.0
            short = sum(max(0, t - loop.sizes()[c]) for c, t in loop.targets().items() if loop.stopped.get(c, "target") == "target")
            total = max(len(bodies), math.ceil(short / (recipe.augmentation.rewrites_per_call * max(rate, 0.05)))) if bodies else 0
            scale = total / len(bodies) if bodies else 0.0
            why = f"at {rate:.0%} accepted so far" if counts["rewrites"] else "if every rewrite is accepted"
            lines = [f"{loop.sizes()} of {loop.targets()} rows are in the ledger; about {total} more requests, {why}"]
    return lines + _money(plan, estimate(bodies, recipe.api, history), scale, spent["spent_usd"])


def _replay(plan: Plan, session: Session) -> tuple[SelfInstruct, list[Request]]:
    """The loop as far as the ledger answers, and the requests of its first round that it does not."""
    recipe = plan.recipe
    loop = SelfInstruct(recipe, read_seeds(plan.beside(recipe.augmentation.seeds or ""), recipe.task), read_decisions(plan.review_file))
    while requests := loop.requests():
        answers: dict[str, Answer] = session.known(requests)
        if missing := [r for r in requests if r.key not in answers]:
            return loop, missing
        loop.accept([answers[r.key] for r in requests])
    return loop, []


def _money(plan: Plan, e: Estimate, scale: float, spent_usd: float) -> list[str]:
    api = plan.recipe.api
    lines = [f"tokens: about {e.prompt_tokens * scale:,.0f} in, {e.completion_tokens * scale:,.0f} out ({e.method})"]
    if api.model in api.prices:
        lines.append(
            f"cost: about $ {e.usd * scale:.4f}, $ {e.worst_usd * scale:.4f} at the very worst; $ {spent_usd:.4f} spent by this recipe so far"
        )
    else:
        lines.append(f"cost: unknown, no [api.prices.{api.model!r}] in the recipe")
    if api.budget_usd is not None:
        left = api.budget_usd - spent_usd
        verdict = "covers it" if left >= e.usd * scale else "ends the run before its target"
        lines.append(f"budget: $ {api.budget_usd:.2f}, of which $ {left:.4f} are left: {verdict}")
    return lines
