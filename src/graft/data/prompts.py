"""A file to be predicted: its records as what is asked, one after another, in any layout that the tasks of an evaluation read.

Unlike an evaluation's (questions.py), a record may lack its answer, as a set to be submitted does, and none is left out: one that cannot be
asked comes with its reason. Nothing is kept in memory but the records that the layout is told by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from graft.core.errors import ConfigError
from graft.core.recipe import Recipe
from graft.core.rows import is_unicode
from graft.core.sections import EvalTask
from graft.data.pictures import Pictures
from graft.data.readers import mcq as reading_comprehension
from graft.data.readers.files import Piece, pieces, records, sample
from graft.data.readers.layouts import layout_of, to_messages
from graft.data.readers.mcq import Refused
from graft.data.sources import as_corpus
from graft.model.pixels import Unusable


@dataclass(frozen=True)
class Source:
    """A file, and how it is read: with the keys, the templates and the kind of answer of `task`, which the recipe has under `name`."""

    pieces: list[Piece]
    layout: str
    task: EvalTask
    name: str = ""  # where nothing in the recipe says how
    pictures: Pictures | None = None  # keeps the images that records show; absent: those are refused

    def rows(self) -> Iterator[dict[str, Any]]:
        """id, messages, and where there are such: options, the reply that each would be, and the reference, which is an option's number from 1 or
        a text. Or id and refused, the reason why a record cannot be asked. The id is the record's own, else its number from 1."""
        found = chain.from_iterable(map(records, self.pieces))
        for number, record in enumerate((r for r in found if r.reason != "empty"), 1):  # a blank line is no record
            name = _id(record.value or {}, number)
            try:
                if record.value is None:
                    raise Refused(record.reason)
                yield {"id": name, **_asked(record.value, self.layout, self.task, self.pictures)}
            except Refused as e:
                yield {"id": name, "refused": str(e)}


def source(recipe: Recipe, path: Path, like: str | None = None, pictures: Pictures | None = None) -> Source:
    """like: the task, or the corpus of options, that says how to read the file; by default the only one of the recipe that can.

    ConfigError where the file has no layout that can be asked, where several ways of reading it disagree, or there is no such name.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is no file: mend --file")
    cut = pieces(path)
    values = sample(cut)
    tasks = {name: task for name, task in recipe.tasks.items() if task.kind != "perplexity"}
    keys = ("layout", "text", "mcq")
    exams = {name: EvalTask(path="", kind="choice", **{k: getattr(c, k) for k in keys}) for name, c in recipe.corpora.items() if c.path}
    if like is not None:
        if like not in (known := exams | tasks):
            raise ConfigError(
                f"--like {like!r} is no task or corpus of {recipe.name!r}: it has {', '.join(known) or 'none that is read from a file'}"
            )
        return replace(_source(cut, values, known[like], like), pictures=pictures)
    for some in (tasks, exams):
        found: list[Source] = []
        for name, task in some.items():
            with suppress(ConfigError):
                found.append(_source(cut, values, task.model_copy(update={"layout": "auto"}), name))
        if any(_way(s) != _way(found[0]) for s in found):
            raise ConfigError(f"{path} can be read as {' or as '.join(s.name for s in found)} says, which differ: choose by --like NAME")
        if found:
            return replace(found[0], pictures=pictures)
    plain = EvalTask(path="", kind="generation")
    if layout_of(as_corpus(plain), values, answered=False) == "mcq":
        plain = EvalTask(path="", kind="choice")
    return replace(_source(cut, values, plain), pictures=pictures)


def _way(s: Source) -> tuple[Any, ...]:
    """What two sources must have alike to ask the same and to read answers alike."""
    return s.layout, s.task.kind, s.task.max_new_tokens, s.task.mcq if s.layout == "mcq" else None, s.task.final if s.task.kind == "exact" else None


def _source(cut: list[Piece], values: list[dict[str, Any]], task: EvalTask, name: str = "") -> Source:
    layout = layout_of(as_corpus(task), values, answered=False)
    if layout == "text":
        raise ConfigError(f"{cut[0].path} holds texts, which ask nothing: predict takes questions, conversations and records with options")
    if (task.kind == "choice") != (layout == "mcq"):
        raise ConfigError(f"{cut[0].path} has the layout {layout!r}, which is not that of {name}")
    return Source(cut, layout, task, name)


def _asked(value: dict[str, Any], layout: str, task: EvalTask, pictures: Pictures | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if layout == "mcq":
        prompt, replies, texts = reading_comprehension.asked(value, task.mcq)
        options = {"options": texts, "replies": replies}
        with suppress(Refused):
            options["reference"] = reading_comprehension.answer_index(value, task.mcq.answer, texts) + 1
        shown: dict[str, Any] = {key: value[key] for key in ("images", "image") if key in value}
        value, layout = shown | {"messages": [{"role": "user", "content": prompt}]}, "messages"
    messages, reason = (pictures.messages if pictures else to_messages)(value, layout, task.mcq, answered=False)
    if messages is None:
        raise Refused(reason)
    if messages[-1]["role"] == "user":
        return {"messages": messages, **options}
    return {"messages": messages[:-1], "reference": messages[-1]["content"]}


def images(files: Sequence[str], pictures: Pictures) -> list[dict[str, Any]]:
    """Files as parts of a message; ConfigError for one that shows nothing. pictures: of the root folder."""
    found = []
    for name in files:
        try:
            found.append({"type": "image", **pictures.keep(str(Path(name).resolve()))})
        except (Unusable, Refused) as e:
            raise ConfigError(f"--image {name} cannot be shown: {e}") from None
    return found


def _id(value: dict[str, Any], number: int) -> str:
    own = next((v for k, v in value.items() if k.lower() == "id"), None)
    known = isinstance(own, int | str) and not isinstance(own, bool) and is_unicode(str(own)) and str(own).strip()
    return str(own) if known else str(number)
