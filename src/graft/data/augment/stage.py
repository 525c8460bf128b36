"""Stage `augment`: a few seeds become many rows, or images become questions and answers, over an OpenAI-compatible API.

Answers are in the workspace's ledger before they are parsed, so a rerun asks only what is missing; rows are accepted in
the order of their requests, so the result does not depend on timing. 1,200 rows through the embedded endpoint cost about
15 s, most of it Ray starting actors.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from typing import Any

from rich import get_console

from graft.core.artifact import Draft
from graft.core.errors import ServeError
from graft.core.recipe import HELD_OUT
from graft.core.rows import read_seeds, write_jsonl
from graft.core.stages import Job
from graft.data.api.caller import check_credentials
from graft.data.api.session import Session, ledger_of
from graft.data.augment.diversity import Diversity
from graft.data.augment.images import gather
from graft.data.augment.panel import Panel, Progress
from graft.data.augment.review import read_decisions
from graft.data.augment.self_instruct import SelfInstruct
from graft.data.augment.vqa import make_rows
from graft.data.cluster import ray_cluster
from graft.data.endpoint import embedded_endpoint

WHY = {
    "budget": "the budget is spent; raise api.budget_usd or api.budget_tokens and run again, what was paid is kept",
    "saturation": "the rewrites repeat themselves; add seeds, or loosen augment.novelty",
    "rounds": "augment.max_rounds is reached",
}


def run(job: Job) -> None:
    """Write rows.jsonl, rejected.jsonl, requests.jsonl and, by what they are made from, decisions, metrics or images."""
    recipe, plan, console = job.recipe, job.plan, get_console()
    base_url = plan.endpoint
    if base_url:
        check_credentials(base_url)
        console.print(f"augment: {recipe.api.model} at {job.head['inputs']['endpoint']}", markup=False, highlight=False)
    else:
        console.print("augment: no OPENAI_BASE_URL or OPENAI_API_KEY: the embedded endpoint rewrites by grammar, it is no language model")
    with ExitStack() as stack:
        draft = stack.enter_context(job.writing())
        url = base_url or stack.enter_context(embedded_endpoint())
        stack.enter_context(ray_cluster())
        panel = stack.enter_context(Panel(console, recipe.name))
        session = stack.enter_context(Session(recipe, ledger_of(plan), url, panel.watch, embedded=not base_url))
        before = session.figures()
        made = _from_images(job, draft, session, panel) if recipe.augmentation.images else _from_seeds(job, draft, session, panel)
        if plan.review_file.is_file():
            shutil.copyfile(plan.review_file, draft.path / "review.jsonl")
        after = session.figures()
        draft.counts.update(made, endpoint=job.head["inputs"]["endpoint"], sent=session.sent)
        draft.cost.update(
            usd_of_recipe=after["spent_usd"],
            usd_of_run=after["spent_usd"] - before["spent_usd"],
            usd_presumed=after["presumed_usd"],
            usd_per_accepted_row=after["spent_usd"] / made["accepted"] if made["accepted"] else None,
            tokens_of_recipe=after["tokens"],
            retries=after["retries"],
        )
        if failed := made.get("failed") or made["reasons"].get("failed"):
            panel.say(
                f"augment: {failed} requests had no usable answer (rejected.jsonl says why): graft run {plan.path.name} --from augment asks the unanswered again"
            )
        panel.say(
            f"augment: {made['accepted']} rows accepted, {made['rejected']} rejected; $ {after['spent_usd']:.4f} spent by this recipe, "
            f"$ {after['spent_usd'] - before['spent_usd']:.4f} in this run"
            + (f", $ {after['spent_usd'] / made['accepted']:.6f} an accepted row" if made["accepted"] else "")
        )


def _from_seeds(job: Job, draft: Draft, session: Session, panel: Panel) -> dict[str, Any]:
    """Self-instruct, round after round, until every class is full, repeats itself or has spent its budget."""
    recipe, plan = job.recipe, job.plan
    loop = SelfInstruct(recipe, read_seeds(plan.beside(recipe.augmentation.seeds or ""), recipe.task), read_decisions(plan.review_file))
    while requests := loop.requests():
        panel.progress = _progress(loop)
        answers = list(session.ask(requests, f"round {loop.round}"))
        if all(answer.unanswered for answer in answers):
            raise ServeError(
                f"augment: no request of round {loop.round} was answered: {answers[0].error}; every answer so far is kept, run again to go on"
            )
        loop.accept(answers)
        panel.progress = _progress(loop)
        panel.watch(session.figures())
        if not panel.console.is_terminal:
            sizes, targets = loop.sizes(), loop.targets()
            panel.say(
                f"augment: round {loop.round}: "
                + ", ".join(f"{sizes[c]}/{targets[c]} {c}" for c in sizes)
                + f", {session.sent} requests sent, $ {panel.figures['spent_usd']:.4f} spent"
            )
    curve = Diversity()
    for rows in loop.by_round():
        curve.add([row["messages"][-2]["content"] for row in rows])
    curve.figure(draft.path / "diversity.png")
    write_jsonl(draft.path / "metrics.jsonl", curve.points)
    write_jsonl(draft.path / "rows.jsonl", loop.rows())
    write_jsonl(draft.path / "rejected.jsonl", loop.rejected)
    write_jsonl(draft.path / "requests.jsonl", loop.log)
    counts = loop.counts()
    for label, reason in counts["stopped"].items():
        if reason != "target":
            panel.say(f"augment: {label} ended with {counts['rows'][label]} of {loop.targets()[label]} rows: {WHY[reason]}")
    return counts


def _from_images(job: Job, draft: Draft, session: Session, panel: Panel) -> dict[str, Any]:
    """Read the images, then ask."""
    recipe, plan = job.recipe, job.plan
    images = recipe.augmentation.images
    assert images is not None
    schema = plan.answer_schema(HELD_OUT)
    pictures, rejected, found = gather(recipe, plan.path.parent, draft.path)
    panel.say(f"augment: {found['kept']} of {found['in']} images kept, rejected: {found['rejected'] or 'none'}")
    wanted = sum((1 if p.prompt else len(images.prompts)) + images.questions for p in pictures)
    progress = panel.progress = Progress({"answers": 0}, {"answers": wanted})

    def on_answer(accepted: bool) -> None:
        progress.returned += 1
        progress.accepted += accepted
        progress.done["answers"] = progress.accepted

    counts = make_rows(recipe, pictures, session.ask, draft.path, schema, rejected, on_answer, read_decisions(plan.review_file))
    if counts["stopped"] == "budget":
        panel.say(f"augment: {counts['unasked']} requests were not sent: {WHY['budget']}")
    return {**counts, "images": found}


def _progress(loop: SelfInstruct) -> Progress:
    counts = loop.counts()
    return Progress(loop.sizes(), loop.targets(), counts["accepted"], counts["rewrites"])
