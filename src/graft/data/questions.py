"""Stage `questions`: what will be asked, a line each, of the files of [evaluate.tasks], of drawings, and of rows of images that prepare held out.

The layouts are those of corpora (readers/layouts.py). What cannot be asked is counted with its reason. 50,000 questions a second, and 40 images of 1 MP;
nothing is cleaned: an evaluation set is taken as it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich import get_console

from graft.core.errors import ConfigError, DataError
from graft.core.json_schema import Schema, loads, wrong
from graft.core.recipe import HELD_OUT
from graft.core.rows import Row, read_jsonl, write_jsonl
from graft.core.sections import EvalTask
from graft.core.stages import Job, Plan
from graft.data.corpora import made
from graft.data.pictures import FOLDER, Pictures
from graft.data.prepare import link_images
from graft.data.readers import mcq as reading_comprehension
from graft.data.readers.files import pieces, records, sample
from graft.data.readers.layouts import layout_of, to_messages, to_text
from graft.data.readers.mcq import Refused
from graft.data.sources import as_corpus
from graft.model.chat import files_of


def run(job: Job) -> None:
    """Write <task>.jsonl for each task, and images/ with what they show."""
    recipe, plan = job.recipe, job.plan
    with job.writing() as draft:
        shown: set[str] = set()
        for name, task in recipe.tasks.items():
            refused, changed = Counter[str](), Counter[str]()
            if name in recipe.evaluate.tasks:
                pictures = Pictures(draft.path / FOLDER, plan.beside(task.images) if task.images else None, changed) if task.shows_images else None
                found = questions(plan, name, task, refused, pictures)
            else:
                found = _held_out(job, task, draft.path, refused)
            count = write_jsonl(draft.path / f"{name}.jsonl", _noting(islice(found, task.rows), shown))
            if not count:
                source = task.path or "its drawings" if name in recipe.evaluate.tasks else "the test split"
                raise DataError(
                    f"evaluate.tasks.{name}: {source} holds nothing that can be asked (refused: {dict(refused) or 'nothing, it is empty'})"
                )
            draft.counts[name] = {"kind": task.kind, "rows": count, "refused": dict(sorted(refused.items()))}
            if changed:
                draft.counts[name]["changed"] = dict(sorted(changed.items()))
            get_console().print(f"questions: {count:,} of {name}, {sum(refused.values()):,} refused", soft_wrap=True)
        for file in (draft.path / FOLDER).glob("*"):
            if file.name not in shown:  # of a row that is refused, or is one too many
                file.unlink()


def _noting(rows: Iterator[Row], shown: set[str]) -> Iterator[Row]:
    for row in rows:
        shown.update(files_of(row.get("messages", [])))
        yield row


def _held_out(job: Job, task: EvalTask, folder: Path, refused: Counter[str]) -> Iterator[Row]:
    """The test split's rows of images."""
    prepared, schema = job.parents["prepare"].path, job.plan.answer_schema(HELD_OUT)
    for row in read_jsonl(prepared / "rows" / f"{HELD_OUT}.jsonl"):
        *context, last = row["messages"]
        try:
            _check(last["content"], task, schema)
        except Refused as e:
            refused[str(e)] += 1
            continue
        link_images((prepared / FOLDER / file for file in files_of(context)), folder)
        yield {"id": row["id"], "messages": context, "wanted": last["content"]}


def questions(plan: Plan, name: str, task: EvalTask, refused: Counter[str], pictures: Pictures | None = None) -> Iterator[Row]:
    """One after another: id and messages, with the wanted reply, or with options, the reply each would be and the right one's number; or a text,
    alone or with replies that may follow it and the right one's number.

    pictures: where the images go that messages show, as parts. ConfigError where the file's layout does not go with the task's kind.
    """
    corpus, schema = as_corpus(task), plan.answer_schema(name)
    cut = pieces(plan.beside(task.path)) if task.path is not None else []
    try:
        layout = layout_of(corpus, sample(cut)) if cut else "messages"
        if (task.kind == "perplexity") != (layout == "text") or (task.kind in ("choice", "cloze")) != (layout == "mcq"):
            needs = {"perplexity": "texts", "choice": "options (layout mcq)", "cloze": "options (layout mcq)"}.get(task.kind, "conversations")
            raise ConfigError(f"{task.path} has the layout {layout!r}, but kind = {task.kind!r} is of {needs}")
    except ConfigError as e:
        raise ConfigError(f"evaluate.tasks.{name}: {e}") from None
    read = ((record.value, record.reason) for record in chain.from_iterable(map(records, cut)))
    for number, (value, reason) in enumerate(read if cut else ((value, "") for value in made(corpus))):
        try:
            if value is None:
                raise Refused(reason)
            yield {"id": str(number), **asked(value, layout, task, pictures, schema)}
        except Refused as e:
            refused[str(e)] += 1


def asked(value: dict[str, Any], layout: str, task: EvalTask, pictures: Pictures | None = None, schema: Schema | None = None) -> Row:
    """A record as it is asked; Refused where it cannot be, or what it wants is no answer of the task's kind."""
    if layout == "text":
        text, reason = to_text(value, task.text)
        if reason:
            raise Refused(reason)
        return {"text": text}
    options: Row = {}
    if layout == "mcq":
        prompt, replies, texts, right = reading_comprehension.choices(value, task.mcq)
        if task.kind == "cloze":
            return {"text": prompt, "replies": replies, "right": right}
        options = {"options": texts, "replies": replies, "right": right}
    messages, reason = (pictures.messages if pictures else to_messages)(value, layout, task.mcq)
    if messages is None:
        raise Refused(reason)
    *context, last = messages
    _check(last["content"], task, schema)
    return {"messages": context, **(options or {"wanted": last["content"]})}


def _check(wanted: str, task: EvalTask, schema: Schema | None) -> None:
    """Refused where a wanted answer is none of the task's kind."""
    if task.kind == "exact" and not re.search(task.final, wanted):
        raise Refused("no final answer")
    if task.kind != "json":
        return
    try:
        value = loads(wanted)
    except (ValueError, RecursionError):
        raise Refused("the answer is no JSON") from None
    if schema is not None and wrong(value, schema):
        raise Refused("the answer is not by the schema")
