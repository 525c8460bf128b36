"""Images become questions and answers: given prompts and, where wanted, questions that the model makes up itself.

First a round asks for questions about each image, then a round asks every question. Requests are made as they are asked
for and rows written as answers come, so memory stays flat: what is held is a task for each request under way. The order
of the rows is that of the images, and in an image that of its prompts. About 20,000 answers a second, 10,000 by a schema.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from graft.core.json_schema import Schema
from graft.core.recipe import Recipe
from graft.core.rows import Row, read_jsonl
from graft.core.sections import Images
from graft.data.api.request import Answer, Request
from graft.data.augment.answers import read, structured
from graft.data.augment.images import FOLDER, Picture, list_sources
from graft.data.augment.review import BY_A_PERSON

Ask = Callable[[Iterable[Request], str], Iterator[Answer]]

QUESTIONS = "questions.jsonl"
_MAKE = (
    "Write {n} different questions that this image alone can answer: about what it shows, its details, its text and numbers, "
    'how things relate. Write them in {language}. Output JSON only: {{"questions": ["…"]}}'
)
_LANGUAGES = {"zh": "Chinese", "zh-Hant": "Traditional Chinese as used in Taiwan", "en": "English"}
_MADE: Schema = {
    "type": "object",
    "properties": {"questions": {"type": "array", "items": {"type": "string"}}},
    "required": ["questions"],
    "additionalProperties": False,
}
_TYPICAL = "?" * 60  # stands for a question that is not made yet


@dataclass(frozen=True)
class _Task:
    """One request to make: which image is asked what. parent: the request that made the question, None for a given one."""

    picture: Picture
    text: str
    system: str | None
    parent: str | None = None


@dataclass
class _Counts:
    """requests = asked + unasked (the budget ended before them); asked = accepted + rejected; `reasons` by kind."""

    asked: int = 0
    unasked: int = 0
    accepted: int = 0
    repeated: int = 0  # asked already, of the same image in the same words: not asked again
    reasons: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        return {
            "requests": self.asked + self.unasked,
            "asked": self.asked,
            "unasked": self.unasked,
            "accepted": self.accepted,
            "rejected": self.reasons.total(),
            "repeated": self.repeated,
            "reasons": dict(self.reasons.most_common()),
        }


def make_rows(
    recipe: Recipe,
    pictures: list[Picture],
    ask: Ask,
    folder: Path,
    schema: Schema | None = None,
    rejected: Iterable[Row] = (),
    on_answer: Callable[[bool], None] = lambda accepted: None,
    review: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write `folder`/rows.jsonl, rejected.jsonl and, where the model makes questions, questions.jsonl; returns the counts.

    pictures, rejected: of `images.gather`; the rejected come first in rejected.jsonl. folder: holds images/. schema: what an
    answer must satisfy (`json_schema.read_schema`), None for free text. on_answer: called after each answer that should be a row.
    review: a person's decisions by row (`review.read_decisions`).
    counts: those of _Counts for the rows, the same for making questions under "questions", and "stopped": "end" | "budget".
    A row: {"id", "messages", "family", "source", "prompt_kind": "given" | "made", "request", "parent"}.
    """
    maker = _Maker(recipe, schema, folder)
    made, rows = _Counts(), _Counts()
    with (folder / "rejected.jsonl").open("wb") as refused:
        for row in rejected:
            _write(refused, row)
        if recipe.augmentation.images and recipe.augmentation.images.questions:
            with (folder / QUESTIONS).open("wb") as out:
                for row in maker.questions(pictures, ask, made, refused):
                    _write(out, row)
        with (folder / "rows.jsonl").open("wb") as out:
            for task, answer in _in_order(ask, maker.to_ask(pictures, rows), maker.answer_request, "answers"):
                row, reason = maker.row(task, answer)
                if reason is None and review and review.get(row["id"]) == "reject":
                    reason = BY_A_PERSON
                if _judged(rows, answer, reason, refused, task):
                    _write(out, row)
                if answer.asked:
                    on_answer(reason is None)
    stopped = "budget" if made.unasked or rows.unasked else "end"
    return {**rows.summary(), "questions": made.summary(), "stopped": stopped}


def foreseen(recipe: Recipe, base: Path, schema: Schema | None = None) -> Iterator[dict[str, Any]]:
    """The request bodies that the listed images would cause, none of them read: an upper bound, for an estimate of the cost.

    Questions that the model is to make stand in as _TYPICAL. base: the recipe's own folder.
    """
    images = _images(recipe)
    maker = _Maker(recipe, schema, base)
    for i, source in enumerate(list_sources(images, base)):
        if source.reason is None:
            name = f"{i:064x}"
            picture = Picture(source.name, name, name, 0, 0, 0, source.prompt, source.system)
            if images.questions:
                yield maker.question_request(maker.question_task(picture)).body
            for text in (*maker.given(picture), *[_TYPICAL] * images.questions):
                yield maker.answer_request(_Task(picture, text, maker.system(picture))).body


class _Maker:
    """What the recipe makes of an image: requests, and rows from their answers."""

    def __init__(self, recipe: Recipe, schema: Schema | None, folder: Path):
        self.recipe, self.images, self.schema = recipe, _images(recipe), schema
        self.folder = folder.resolve() / FOLDER  # whoever sends the request may work elsewhere
        given = {"json_schema": structured, "json_object": lambda schema, name: {"type": "json_object"}}.get(recipe.api.response_format)
        self.formats = {name: given(s, name) for name, s in (("answer", schema), ("questions", _MADE)) if s and given}
        self.hint = ""  # for a server that cannot be given the schema itself
        if schema and recipe.api.response_format != "json_schema":
            self.hint = f"\n\nOutput JSON only, by this JSON Schema: {_compact(schema)}"

    def system(self, picture: Picture) -> str | None:
        return picture.system or self.images.system

    def given(self, picture: Picture) -> tuple[str, ...]:
        return (picture.prompt,) if picture.prompt else self.images.prompts

    # ---- questions ------------------------------------------------------------------------------------------------
    def question_task(self, picture: Picture) -> _Task:
        prompts = self.given(picture)
        language = _LANGUAGES.get(self.recipe.augmentation.language) or (
            f"the language of this example: {prompts[0]}" if prompts else "the language of the system message, in English where there is none"
        )
        return _Task(picture, _MAKE.format(n=self.images.questions, language=language), self.system(picture))

    def question_request(self, task: _Task) -> Request:
        return self._request(task, task.text, "questions")  # the form is in the instruction

    def questions(self, pictures: list[Picture], ask: Ask, counts: _Counts, refused: BinaryIO) -> Iterator[Row]:
        """{"image", "request", "questions"} of each image once, the empty and the repeated left out."""
        firsts = {p.sha256: p for p in reversed(pictures)}
        tasks = (self.question_task(p) for p in pictures if firsts[p.sha256] is p)
        for task, answer in _in_order(ask, tasks, self.question_request, "questions"):
            value, reason = (None, f"failed: {answer.error}") if answer.response is None else read(answer.response, _MADE)
            found: dict[str, str] = {}
            for text in value["questions"] if value else ():
                if text.strip():
                    found.setdefault(_folded(text), text.strip())
            kept = list(found.values())[: self.images.questions]
            if _judged(counts, answer, reason or (None if kept else "malformed: no questions"), refused, task):
                yield {"image": task.picture.sha256, "request": answer.key, "questions": kept}

    # ---- answers --------------------------------------------------------------------------------------------------
    def to_ask(self, pictures: list[Picture], counts: _Counts) -> Iterator[_Task]:
        """Each image's given prompts, then the questions made of it; an image that several lines name is asked nothing twice."""
        made = read_jsonl(self.folder.parent / QUESTIONS) if self.images.questions else iter(())
        lines = Counter(p.sha256 for p in pictures)
        seen: dict[str, set[tuple[str, str | None]]] = {sha: set() for sha, n in lines.items() if n > 1}
        met: set[str] = set()
        found = next(made, None)
        for picture in pictures:
            texts: list[tuple[str, str | None]] = [(text, None) for text in self.given(picture)]
            if picture.sha256 not in met and found and found["image"] == picture.sha256:
                texts += [(text, found["request"]) for text in found["questions"]]
                found = next(made, None)
            met.add(picture.sha256)
            system = self.system(picture)
            already = seen.get(picture.sha256, set())
            for text, parent in texts:
                if (_folded(text), system) in already:
                    counts.repeated += 1
                else:
                    already.add((_folded(text), system))
                    yield _Task(picture, text, system, parent)

    def answer_request(self, task: _Task) -> Request:
        return self._request(task, task.text + self.hint, "answer")

    def row(self, task: _Task, answer: Answer) -> tuple[Row, str | None]:
        """(the row, None), or ({}, why there is none)."""
        if answer.response is None:
            return {}, f"failed: {answer.error}"
        value, reason = read(answer.response, self.schema)
        if reason:
            return {}, reason
        said = _compact(value) if self.schema else value
        sha = task.picture.sha256
        asked = [{"type": "image", "image": f"{FOLDER}/{sha}.jpg", "sha256": sha}, {"type": "text", "text": task.text}]
        return {
            "id": answer.key[:12],
            "messages": [*_system(task), {"role": "user", "content": asked}, {"role": "assistant", "content": said}],
            "family": task.picture.family,
            "source": task.picture.source,
            "prompt_kind": "made" if task.parent else "given",
            "request": answer.key,
            "parent": task.parent,
        }, None

    def _request(self, task: _Task, text: str, name: str) -> Request:
        api, sha = self.recipe.api, task.picture.sha256
        content = [{"type": "image_url", "image_url": {"url": f"sha256:{sha}"}}, {"type": "text", "text": text}]
        body = {
            "model": api.model,
            "temperature": self.recipe.augmentation.temperature,
            "seed": self.recipe.seed * 1_000_000,
            api.output_limit: api.max_output_tokens,
            "messages": [*_system(task), {"role": "user", "content": content}],
        }
        if api.service_tier:
            body["service_tier"] = api.service_tier
        if name in self.formats:
            body["response_format"] = self.formats[name]
        return Request(body, {sha: str(self.folder / f"{sha}.jpg")})


def _in_order(ask: Ask, tasks: Iterable[_Task], request: Callable[[_Task], Request], title: str) -> Iterator[tuple[_Task, Answer]]:
    """Each task with its answer; a task is made when its request is taken and held until its answer is read."""
    waiting: deque[tuple[_Task, str]] = deque()

    def requests() -> Iterator[Request]:
        for task in tasks:
            made = request(task)
            waiting.append((task, made.key))
            yield made

    for answer in ask(requests(), title):
        task, key = waiting.popleft()
        if answer.key != key:
            raise ValueError(f"the answer of {answer.key[:12]} stands where that of {key[:12]} is due")
        yield task, answer
    if waiting:
        raise ValueError(f"{len(waiting)} requests were taken and not answered")


def _judged(counts: _Counts, answer: Answer, reason: str | None, refused: BinaryIO, task: _Task) -> bool:
    """Count an answer and write why it is refused; True where it is accepted."""
    if not answer.asked:
        counts.unasked += 1
        return False
    counts.asked += 1
    if reason is None:
        counts.accepted += 1
        return True
    counts.reasons[reason.partition(":")[0]] += 1
    _write(refused, {"request": answer.key, "image": task.picture.source, "family": task.picture.family, "prompt": task.text, "reason": reason})
    return False


def _system(task: _Task) -> list[Row]:
    return [{"role": "system", "content": task.system}] if task.system else []


def _images(recipe: Recipe) -> Images:
    assert recipe.augmentation.images is not None, "the caller looked"
    return recipe.augmentation.images


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _write(file: BinaryIO, row: Row) -> None:
    """One line; a lone surrogate, which a server's message may hold, becomes a JSON escape."""
    file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
