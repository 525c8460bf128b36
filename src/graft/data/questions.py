"""Stage `questions`: the files of [evaluate.tasks] as what will be asked, a line each; what cannot be asked is counted with its reason.

The layouts are those of corpora (readers/layouts.py). 50,000 questions a second; nothing is cleaned: an evaluation set is taken as it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from rich import get_console

from graft.core.errors import ConfigError, DataError
from graft.core.rows import write_jsonl
from graft.core.sections import EvalTask
from graft.core.stages import Job, Plan
from graft.data.readers import mcq as reading_comprehension
from graft.data.readers.files import pieces, records, sample
from graft.data.readers.layouts import layout_of, to_messages, to_text
from graft.data.readers.mcq import Refused
from graft.data.sources import as_corpus


def run(job: Job) -> None:
    """Write <task>.jsonl for each task."""
    with job.writing() as draft:
        for name, task in job.recipe.evaluate.tasks.items():
            refused: Counter[str] = Counter()
            count = write_jsonl(draft.path / f"{name}.jsonl", islice(questions(job.plan, name, task, refused), task.rows))
            if not count:
                raise DataError(
                    f"evaluate.tasks.{name}: {task.path} holds nothing that can be asked (refused: {dict(refused) or 'nothing, it is empty'})"
                )
            draft.counts[name] = {"kind": task.kind, "rows": count, "refused": dict(sorted(refused.items()))}
            get_console().print(f"questions: {count:,} of {name}, {sum(refused.values()):,} refused", soft_wrap=True)


def questions(plan: Plan, name: str, task: EvalTask, refused: Counter[str]) -> Iterator[dict[str, Any]]:
    """One after another: id and messages, with the wanted reply, or with options, the reply each would be and the right one's number; or a text,
    alone or with replies that may follow it and the right one's number.

    ConfigError where the file's layout does not go with the task's kind.
    """
    cut = pieces(plan.beside(task.path))
    try:
        layout = layout_of(as_corpus(task), sample(cut))
        if (task.kind == "perplexity") != (layout == "text") or (task.kind in ("choice", "cloze")) != (layout == "mcq"):
            needs = {"perplexity": "texts", "choice": "options (layout mcq)", "cloze": "options (layout mcq)"}.get(task.kind, "conversations")
            raise ConfigError(f"{task.path} has the layout {layout!r}, but kind = {task.kind!r} is of {needs}")
    except ConfigError as e:
        raise ConfigError(f"evaluate.tasks.{name}: {e}") from None
    number = -1
    for piece in cut:
        for record in records(piece):
            number += 1
            try:
                if record.value is None:
                    raise Refused(record.reason)
                yield {"id": str(number), **asked(record.value, layout, task)}
            except Refused as e:
                refused[str(e)] += 1


def asked(value: dict[str, Any], layout: str, task: EvalTask) -> dict[str, Any]:
    if layout == "text":
        text, reason = to_text(value, task.text)
        if reason:
            raise Refused(reason)
        return {"text": text}
    if layout == "mcq":
        prompt, replies, options, right = reading_comprehension.choices(value, task.mcq)
        if task.kind == "cloze":
            return {"text": prompt, "replies": replies, "right": right}
        return {"messages": [{"role": "user", "content": prompt}], "options": options, "replies": replies, "right": right}
    messages, reason = to_messages(value, layout, task.mcq)
    if messages is None:
        raise Refused(reason)
    *context, last = messages
    if task.kind == "exact" and not re.search(task.final, last["content"]):
        raise Refused("no final answer")
    return {"messages": context, "wanted": last["content"]}
