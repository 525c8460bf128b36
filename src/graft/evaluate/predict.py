"""`graft predict`: what was trained, or its base, answers sentences or a file of questions, by the engine that serves.

Rows stream: some batches are in memory, whatever a file holds. How rows are batched and padded is the engine's affair, and a row's answer does not
depend on its batch mates (engine/hf.py), so a file may be cut, or put in another order. An answer that cannot be read is none, as in an evaluation.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from rich.console import Console
from rich.progress import track

from graft.core.artifact import fsync_dir, fsync_file
from graft.core.calls import parse_answer
from graft.core.errors import ConfigError, DataError
from graft.core.rows import is_unicode, write_jsonl
from graft.core.sections import EvalTask
from graft.core.stages import Plan
from graft.engine.prompt import prompt
from graft.engine.protocol import Engine, Request
from graft.evaluate import json_answers, metrics
from graft.evaluate.options import best, likelihoods, replies
from graft.evaluate.pictures import images_of
from graft.evaluate.stage import engine_of
from graft.model.chat import load_tokenizer

Row = dict[str, Any]
AHEAD = 8  # batches that the engine is given at once: it fills up where rows end; one where rows show images, which wait decoded
SENTENCES = EvalTask(path="", kind="generation")
SOUGHT = {"choice": "an option", "exact": "a final answer", "json": "JSON"}  # in a reply, by the kind of the task


@dataclass(frozen=True)
class Predictor:
    """One system of a recipe, and how its answers are read. To be closed."""

    plan: Plan
    engine: Engine
    tokenizer: Any
    adapter: str | None
    task: EvalTask
    by_likelihood: bool
    system: str | None  # message, for rows that bring none
    images: Path | None = None  # the folder of those that rows show

    @classmethod
    def of(
        cls,
        plan: Plan,
        task: EvalTask = SENTENCES,
        base: bool = False,
        by_likelihood: bool = False,
        system: str | None = None,
        images: Path | None = None,
    ) -> Predictor:
        """base: the model under the adapter instead of it. ArtifactError where the recipe is not trained, ConfigError where there are no options."""
        if by_likelihood and task.kind != "choice":
            raise ConfigError("--by likelihood compares options, which these questions do not have: leave it out")
        folder, revision, adapters = (*plan.base_model("sft"), {}) if base else plan.trained()
        tokenizer = load_tokenizer(str(plan.artifact("sft").path))
        engine = engine_of(plan.recipe, folder, revision, adapters, tokenizer)
        return cls(plan, engine, tokenizer, next(iter(adapters), None), task, by_likelihood, system, images)

    def close(self) -> None:
        self.engine.close()

    def answers(self, rows: Iterable[Row], at_once: int | None = None) -> Iterator[Row]:
        """Of each row, in order: id, prompt (its messages), reply, parsed, and the reference where it has one; or id and refused, the reason why
        it could not be asked. at_once: rows that are read before the first is answered.

        parsed: of options the number from 1 of the one that is named, of exact answers the final one, of JSON its value, each None where there is
        none; of a recipe that knows calls, what the reply is. Repeats (evaluate.repeats) are replies by other seeds: reply is the first, parsed what most of
        them say, the earliest of equally many. By likelihood there are loglikelihoods_nats in the place of a reply.
        """
        numbered = enumerate(map(self._prepared, rows))
        most = at_once or (1 if self.images else AHEAD) * self.plan.recipe.evaluate.batch_size
        while some := list(islice(numbered, most)):
            asked = [(n, row) for n, row in some if "refused" not in row]
            found = iter(self._scored([row for _, row in asked]) if self.by_likelihood else self._generated(asked))
            for _, row in some:
                if "refused" in row:
                    yield {"id": row["id"], "refused": row["refused"]}
                else:
                    reference = {"reference": row["reference"]} if "reference" in row else {}
                    yield {"id": row["id"], "prompt": row["messages"], **next(found), **reference}

    @property
    def _most(self) -> int:
        return self.task.max_new_tokens or self.plan.recipe.evaluate.max_new_tokens

    def _prepared(self, row: Row) -> Row:
        """The row with its system message and what the engine is given, or with the reason why it cannot be asked."""
        if "refused" in row:
            return row
        if self.system and row["messages"][0]["role"] != "system":
            row = row | {"messages": [{"role": "system", "content": self.system}, *row["messages"]]}
        try:
            told = self.engine.processor, images_of(row["messages"], self.images) if self.images else ()
            given: Any = replies(self.tokenizer, row, *told) if self.by_likelihood else prompt(self.tokenizer, row["messages"], *told)
        except (DataError, TemplateError) as e:
            return row | {"refused": " ".join(str(e).split())}
        tokens = max(len(reply.ids) for reply in given) + 1 if self.by_likelihood else len(given[0]) + self._most
        if tokens > self.engine.max_length:
            return row | {"refused": f"too long with its answer: the model holds {self.engine.max_length:,} tokens"}
        return row | {"given": given}

    def _generated(self, rows: list[tuple[int, Row]]) -> Iterator[Row]:
        e, seed = self.plan.recipe.evaluate, self.plan.recipe.seed
        requests = [
            Request(ids, self._most, temperature=e.temperature, seed=seed + n * e.repeats + repeat, adapter=self.adapter, whole=True, images=seen)
            for n, row in rows
            for ids, seen in [row["given"]]
            for repeat in range(e.repeats)
        ]
        completions = iter(self.engine.generate(requests))
        for _, row in rows:
            texts = [completion.text for completion in islice(completions, e.repeats)]
            yield {"reply": texts[0], **({"replies": texts} if e.repeats > 1 else {}), **self._parsed(row, texts)}

    def _parsed(self, row: Row, texts: list[str]) -> Row:
        if self.task.kind in ("choice", "exact"):
            votes = Counter(found for text in texts if (found := self._named(row, text)) is not None)
            return {"parsed": votes.most_common(1)[0][0] if votes else None}
        if self.task.kind == "json":
            with suppress(ValueError, RecursionError):
                return {"parsed": json_answers.read(texts[0])}
            return {"parsed": None}
        if self.plan.recipe.learns_calls:
            known = self.plan.recipe.task
            return {"parsed": {k: v for k, v in vars(parse_answer(texts[0], known.function, known.argument)).items() if v is not None}}
        return {}

    def _named(self, row: Row, text: str) -> int | str | None:
        if self.task.kind == "exact":
            return metrics.final(text, self.task.final)
        option = metrics.chosen(text, row["options"], row["replies"])
        return None if option is None else option + 1

    def _scored(self, rows: list[Row]) -> Iterator[Row]:
        for scores in likelihoods(self.engine, [row["given"] for row in rows], self.adapter):
            nats = [own for own, _ in scores]
            yield {"loglikelihoods_nats": [round(n, 4) for n in nats], "parsed": best(nats) + 1}


def sentences(texts: Iterable[str], images: Sequence[Row] = ()) -> Iterator[Row]:
    """As rows, each about all the images, which are parts of a message; one with bytes that are no UTF-8 cannot be asked."""
    for number, text in enumerate(texts, 1):
        content = [*images, {"type": "text", "text": text}] if images else text
        yield {"id": str(number), **({"messages": [{"role": "user", "content": content}]} if is_unicode(text) else {"refused": "no UTF-8"})}


def shown(line: Row) -> str:
    """An answer for people: the reply, and what it is where the recipe knows calls."""
    if not (parsed := line.get("parsed")):
        return str(line["reply"])
    call = f"{parsed['name']} {json.dumps(parsed['arguments'], ensure_ascii=False)}" if parsed["kind"] == "call" else parsed.get("reason", "")
    return f"{line['reply']}\n  {parsed['kind']} {call}".rstrip()


def check_out(out: Path, file: Path) -> None:
    """ConfigError where the answers to a file cannot be written there; said before anything is loaded."""
    if out.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"--out {out} names no format: write FILE.csv for ID,Answer, or FILE.jsonl for all that is known")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out} lies in no folder that is there: make {out.parent} first")
    if out.resolve() == file.resolve():
        raise ConfigError(f"--out {out} is the file that is read: name another")


def write(predictor: Predictor, rows: Iterable[Row], out: Path) -> str:
    """The answers as a file that is there once all of it is, in the place of an earlier one; returns what there is to tell.

    `.jsonl` keeps all of `answers`. `.csv` has ID,Answer: the option's number, the final answer, the JSON alone, or the reply; empty where there is none.
    """
    count, unread, refused = 0, 0, Counter[str]()

    def lines() -> Iterator[Row]:
        nonlocal count, unread
        for line in track(predictor.answers(rows), f"predict {out.name}", console=Console(stderr=True), transient=True):
            count += 1
            if "refused" in line:
                refused[line["refused"]] += 1
            unread += _answer(predictor, line) is None and "refused" not in line
            yield line

    part = out.with_name(f".{out.name}.part")  # one name: what a kill left is overwritten by the next run
    try:
        if out.suffix == ".jsonl":
            write_jsonl(part, lines())
        else:
            with part.open("w", newline="", encoding="utf-8") as f:
                table = csv.writer(f, lineterminator="\n")
                table.writerow(["ID", "Answer"])
                table.writerows([line["id"], _answer(predictor, line)] for line in lines())
        if not count:
            raise DataError(f"nothing to predict for {out}: the file holds no record")
        fsync_file(part)
        os.replace(part, out)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_dir(out.parent)
    told = [f"{out}: {count:,} answers"]
    if unread:
        told.append(f"{unread:,} without {SOUGHT[predictor.task.kind]} that can be read, left empty")
    if refused:
        reasons = ", ".join(f"{why}: {n:,}" for why, n in sorted(refused.items()))
        told.append(f"{refused.total():,} that could not be asked ({reasons}), left empty")
    return "; ".join(told)


def _answer(predictor: Predictor, line: Row) -> str | int | None:
    """None where there is none: csv writes it as the empty string."""
    if predictor.task.kind == "json":
        return None if line.get("parsed") is None else json.dumps(line["parsed"], ensure_ascii=False)
    return line.get("parsed" if predictor.task.kind in SOUGHT else "reply")
