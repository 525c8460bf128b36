"""The tasks of a recipe: answers that are compared with the wanted ones, options that are generated and scored, texts that are predicted.

Every system answers the same questions, `evaluate.repeats` times by other seeds; each mean comes with its interval, and the trained model's with the
paired difference to its base. Log-likelihoods are of the reply that each option would be, as it would be trained: summed, and a character; those
of a cloze are of plain text behind plain text, without a chat template, which a base has never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from math import exp, log
from pathlib import Path
from statistics import mean, stdev
from types import MappingProxyType
from typing import Any

from rich.progress import track

from graft.core.json_schema import Schema
from graft.core.recipe import Recipe
from graft.core.rows import read_jsonl, write_jsonl
from graft.core.sections import EvalTask
from graft.engine.prompt import prompt
from graft.engine.protocol import Engine, Request, Scored
from graft.evaluate import by_question, json_answers, metrics
from graft.evaluate.options import Reply, behind, best, likelihoods, replies
from graft.evaluate.pictures import FOLDER, images_of
from graft.evaluate.semantic import Encoder
from graft.evaluate.statistics import RESAMPLES, Mean, mean_of, paired, ratio_of

MAIN = {
    "generation": "rougeL",
    "exact": "correct",
    "choice": "correct",
    "cloze": "correct_loglikelihood",
    "perplexity": "perplexity",
    "json": "item_f1",
}
RIGHT = {"generation": "equal", "exact": "correct", "json": "equal"}  # of kinds whose wanted answers may be one and the same
Scores = dict[str, list[list[float]]]  # metric -> [repeats][rows]


def measure(
    recipe: Recipe,
    questions: Path,
    folder: Path,
    engine: Engine,
    tokenizer: Any,
    systems: dict[str, str | None],
    encoder: Encoder | None = None,
    schemas: Mapping[str, Schema | None] = MappingProxyType({}),
) -> dict[str, Any]:
    """{task: kind, rows, systems: {system: {metric: mean, low, high, …}}, paired: {metric: …}, by_question: [{question, rows, majority, system: share}]},
    the last of tasks whose questions repeat (by_question.py); writes predictions-<task>.jsonl into `folder`.

    questions: the folder of what is asked, <task>.jsonl each, and images/. systems: one, or two that are compared; each with its adapter in the
    engine. schemas: of tasks of kind json.
    """
    found = {}
    for name, task in recipe.tasks.items():
        rows = list(read_jsonl(questions / f"{name}.jsonl"))
        told: dict[str, Any] = {"kind": task.kind, "rows": len(rows), "systems": {}}
        lines = [{"id": row["id"], **({"wanted": row.get("wanted", row.get("right"))} if task.kind != "perplexity" else {})} for row in rows]
        scores: dict[str, Scores] = {}
        for system, adapter in systems.items():
            asker = Asker(recipe, name, task, engine, tokenizer, adapter, encoder, questions / FOLDER, schemas.get(name))
            scores[system], means, kept = {"perplexity": asker.texts, "cloze": asker.continuations}.get(task.kind, asker.answers)(rows)
            told["systems"][system] = means | {metric: mean_of(table, recipe.seed).told() for metric, table in scores[system].items()}
            for line, own in zip(lines, kept, strict=True):
                line[system] = own
        if len(systems) > 1:
            first, second = systems
            both = {m: paired(scores[first][m], scores[second][m], recipe.seed).told() for m in scores[first]}
            told["paired"] = {"of": f"{first} less {second}", **both}
        if right := RIGHT.get(task.kind):
            shares = {system: own[right] for system, own in scores.items()}
            if repeated := by_question.by_question(rows, shares, partial(_key, task)):
                told["by_question"] = repeated
        write_jsonl(folder / f"predictions-{name}.jsonl", lines)
        found[name] = told
    return found


class Asker:
    """One system's answers to one task."""

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        task: EvalTask,
        engine: Engine,
        tokenizer: Any,
        adapter: str | None,
        encoder: Encoder | None = None,
        images: Path = Path(FOLDER),
        schema: Schema | None = None,
    ):
        self.evaluate, self.task, self.engine, self.tokenizer, self.adapter = recipe.evaluate, task, engine, tokenizer, adapter
        self.encoder, self.images, self.schema = encoder, images, schema
        self.seed, self.title = recipe.seed, f"evaluate {name}, {adapter or 'base'}"
        self.window = min(recipe.shard.seq_len, engine.max_length - 1)

    def answers(self, rows: list[dict[str, Any]]) -> tuple[Scores, dict[str, Any], list[Any]]:
        """(scores of each repeat and row, metrics of the whole set, what is kept of each row)."""
        judge = {"generation": _of_text, "exact": self._of_final, "choice": _of_option, "json": self._of_json}[self.task.kind]
        texts = [self._generated(rows, repeat) for repeat in range(self.evaluate.repeats)]
        judged = [[judge(row, text) for row, text in zip(rows, own, strict=True)] for own in texts]
        scores: Scores = {metric: [[score[metric] for score in own] for own in judged] for metric in judged[0][0]}
        if self.encoder and self.task.kind == "generation":
            scores["semantic"] = [self.encoder.similarity(own, [row["wanted"] for row in rows]) for own in texts]
        kept: list[dict[str, Any]] = [
            {"answers": [own[n] for own in texts], "scores": {metric: [own[n] for own in table] for metric, table in scores.items()}}
            for n in range(len(rows))
        ]
        whole: dict[str, Any] = {}
        if self.task.kind == "generation":
            wanted = [row["wanted"] for row in rows]
            half = metrics.bleu(texts[0], wanted, RESAMPLES)[1] or 0.0  # of one repeat: BLEU is of a set, and has no rows to average first
            each = [metrics.bleu(own, wanted)[0] for own in texts]
            std = stdev(each) if len(each) > 1 else None
            whole["bleu"] = Mean(mean(each), mean(each) - half, mean(each) + half, len(rows), std).told()
        if self.task.kind == "choice":
            by_likelihood, nats = self._likeliest(rows, self._replies)
            scores |= by_likelihood
            for own, of_options in zip(kept, nats, strict=True):
                own["loglikelihoods_nats"] = of_options
        return scores, whole, kept

    def continuations(self, rows: list[dict[str, Any]]) -> tuple[Scores, dict[str, Any], list[Any]]:
        """The same of texts with replies that may follow them: nothing is generated."""
        scores, nats = self._likeliest(rows, partial(behind, self.tokenizer, most=self.window))
        kept = [
            {"scores": {metric: [table[0][n]] for metric, table in scores.items()}, "loglikelihoods_nats": of_options}
            for n, of_options in enumerate(nats)
        ]
        return scores, {}, kept

    def texts(self, rows: list[dict[str, Any]]) -> tuple[Scores, dict[str, Any], list[Any]]:
        """The same of texts, in windows of a bin, each of which begins anew; a window's first token is not counted."""
        nats: list[float] = []
        tokens: list[float] = []
        for row in track(rows, self.title, transient=True):
            ids = self.tokenizer(row["text"])["input_ids"]
            windows = [ids[at : at + self.window] for at in range(0, len(ids), self.window)]
            scores = self.engine.scores([Scored(window, 1) for window in windows if len(window) > 1], self.adapter)
            found = [score for own in scores for score in own]
            nats.append(-sum(found))
            tokens.append(len(found))
        a_token, a_character = ratio_of(nats, tokens, self.seed), ratio_of(nats, [len(row["text"]) for row in rows], self.seed)
        whole = {
            "perplexity": {
                "mean": exp(a_token.mean),
                "low": exp(a_token.low),
                "high": exp(a_token.high),
                "rows": len(rows),
                "tokens": int(sum(tokens)),
            },
            "bits_per_character": {key: getattr(a_character, key) / log(2) for key in ("mean", "low", "high")},
        }
        kept = [{"nats": round(n, 4), "tokens": int(t)} for n, t in zip(nats, tokens, strict=True)]
        return {"nats_per_token": [[n / max(t, 1) for n, t in zip(nats, tokens, strict=True)]]}, whole, kept

    def _generated(self, rows: list[dict[str, Any]], repeat: int) -> list[str]:
        e, first = self.evaluate, self.seed + repeat * len(rows)
        starts = track(range(0, len(rows), e.batch_size), self.title, transient=True)
        batches = ([self._request(row, first + at + n) for n, row in enumerate(rows[at : at + e.batch_size])] for at in starts)
        return [answer.text for some in batches for answer in self.engine.generate(some)]

    def _request(self, row: dict[str, Any], seed: int) -> Request:
        e = self.evaluate
        ids, seen = prompt(self.tokenizer, row["messages"], self.engine.processor, images_of(row["messages"], self.images))
        most = self.task.max_new_tokens or e.max_new_tokens
        return Request(ids, most, temperature=e.temperature, seed=seed, adapter=self.adapter, images=seen)

    def _replies(self, row: dict[str, Any]) -> list[Reply]:
        return replies(self.tokenizer, row, self.engine.processor, images_of(row["messages"], self.images))

    def _likeliest(self, rows: list[dict[str, Any]], replies_of: Callable[[dict[str, Any]], list[Reply]]) -> tuple[Scores, list[list[float]]]:
        """(whether the right reply is the likeliest of a row's, by its nats and by those a character; the nats [rows][replies])."""
        starts = track(range(0, len(rows), self.evaluate.batch_size), f"{self.title}, options", transient=True)
        batches = ([replies_of(row) for row in rows[at : at + self.evaluate.batch_size]] for at in starts)
        scored = [own for some in batches for own in likelihoods(self.engine, some, self.adapter)]
        scores: Scores = {}
        for metric, index in (("correct_loglikelihood", 0), ("correct_loglikelihood_per_character", 1)):
            scores[metric] = [[float(best([pair[index] for pair in own]) == row["right"]) for row, own in zip(rows, scored, strict=True)]]
        return scores, [[round(pair[0], 4) for pair in own] for own in scored]

    def _of_final(self, row: dict[str, Any], answer: str) -> dict[str, float]:
        given, wanted = metrics.final(answer, self.task.final), metrics.final(row["wanted"], self.task.final)
        right = given is not None and wanted is not None and metrics.equal(given, wanted)
        return {"correct": float(right), "unreadable": float(given is None)}

    def _of_json(self, row: dict[str, Any], answer: str) -> dict[str, float]:
        return json_answers.judged(answer, row["wanted"], self.schema)


def _key(task: EvalTask, wanted: str) -> Hashable:
    """What wanted answers have in common that the same replies are right for."""
    if task.kind == "json":
        return frozenset(json_answers.items(json_answers.read(wanted)).items())
    return metrics.same((metrics.final(wanted, task.final) or "") if task.kind == "exact" else wanted)


def _of_text(row: dict[str, Any], answer: str) -> dict[str, float]:
    return {**metrics.rouge(answer, row["wanted"]), "equal": float(metrics.equal(answer, row["wanted"]))}


def _of_option(row: dict[str, Any], answer: str) -> dict[str, float]:
    given = metrics.chosen(answer, row["options"], row["replies"])
    return {"correct": float(given == row["right"]), "unreadable": float(given is None)}


def counts(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{task: {its main metric: the mean of what was trained}}."""
    main = {name: (MAIN[told["kind"]], next(iter(told["systems"].values()))) for name, told in found.items()}
    return {name: {metric: round(means[metric]["mean"], 6)} for name, (metric, means) in main.items()}


def render_report(found: dict[str, Any]) -> str:
    """A table a task, as plain text: mean, interval of 95 %, and the paired difference."""
    lines: list[str] = []
    for name, told in found.items():
        lines += ["", f"{name}: {told['kind']} on {told['rows']} rows; mean, interval of 95 %{', ± between repeats' if _repeated(told) else ''}"]
        apart = told.get("paired", {})
        for metric in next(iter(told["systems"].values())):
            row = "".join(f"  {system} {_shown(means[metric])}" for system, means in told["systems"].items())
            if metric in apart:
                row += f"  difference {apart[metric]['difference']:+.4f} ({apart[metric]['low']:+.4f} to {apart[metric]['high']:+.4f}), p {apart[metric]['p']:.3f}"
            lines.append(f"  {metric:<36}{row}")
        if "by_question" in told:
            lines += by_question.lines(told["by_question"])
    return "\n".join(lines).lstrip("\n") + "\n"


def _shown(m: dict[str, float]) -> str:
    return f"{m['mean']:.4f} ({m['low']:.4f} to {m['high']:.4f})" + (f" ± {m['std']:.4f}" if "std" in m else "")


def _repeated(told: dict[str, Any]) -> bool:
    return any("std" in mean for means in told["systems"].values() for mean in means.values())
