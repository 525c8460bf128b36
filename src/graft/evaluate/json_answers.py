"""What an answer in JSON is worth beside the wanted one: whether it can be read and is by the schema, and what the two values have in common.

A value is its items: every string, number, boolean, null, empty object and empty list in it, each with the path that leads there. An F1 is 2c / (m + n),
of c that m said and n wanted have in common (van Rijsbergen 1979, Information Retrieval, chapter 7; of sets it is the coefficient of Dice 1945,
https://doi.org/10.2307/1932409). 30 us an answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from contextlib import suppress
from typing import Any

from graft.core.json_schema import Schema, loads, wrong
from graft.evaluate.metrics import rouge

FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
Path = tuple[str | int, ...]  # keys of objects, places in lists
Item = tuple[str, Hashable]  # its type in JSON, by which true is no 1, and its value


def read(answer: str) -> Any:
    """The JSON value that an answer is, or that stands in its one fenced code block, alone. ValueError or RecursionError where there is none."""
    try:
        return loads(answer)
    except ValueError:
        blocks = FENCED.findall(answer)
        if len(blocks) != 1:
            raise
        return loads(blocks[0])


def judged(answer: str, wanted: str, schema: Schema | None = None) -> dict[str, float]:
    """Of a JSON text that is wanted; all from 0 to 1, and 0 but for rougeL and unreadable where the answer is no JSON.

    valid: it is JSON, and by the schema where there is one. key_f1: of the sets of paths to the keys of all objects, places in lists written as [] (the
    keys of {"a": [{"b": 1}]} are a and a[].b). item_f1: of the multisets of items, each with its path, places in lists written as [] again, so
    that lists are compared whatever their order. equal: the same JSON value; numbers by value, objects whatever the order of their keys. rougeL: of the
    texts. unreadable: it is no JSON.
    """
    texts = {"rougeL": rouge(answer, wanted)["rougeL"]}
    try:
        value = read(answer)
    except (ValueError, RecursionError):
        return dict.fromkeys(("valid", "key_f1", "item_f1", "equal"), 0.0) | texts | {"unreadable": 1.0}
    valid = False
    with suppress(RecursionError):  # what is too deep to be looked at is not by a schema
        valid = schema is None or wrong(value, schema) is None
    said, due = items(value), items(loads(wanted))
    return {
        "valid": float(valid),
        "key_f1": f1(Counter(_keys(said)), Counter(_keys(due))),
        "item_f1": f1(_unplaced(said), _unplaced(due)),
        "equal": float(said == due),
        **texts,
        "unreadable": 0.0,
    }


def items(value: Any) -> dict[Path, Item]:
    """The items of a value by their paths. Two values are equal where their items are."""
    found: dict[Path, Item] = {}
    left: list[tuple[Path, Any]] = [((), value)]
    while left:  # no recursion: an answer may be a thousand brackets
        path, node = left.pop()
        if node and isinstance(node, dict):
            left += [((*path, key), inner) for key, inner in node.items()]
        elif node and isinstance(node, list):
            left += [((*path, place), inner) for place, inner in enumerate(node)]
        else:
            found[path] = _item(node)
    return found


def _item(node: Any) -> Item:
    if isinstance(node, dict | list):
        return ("empty object" if isinstance(node, dict) else "empty list"), None
    return ("boolean" if isinstance(node, bool) else "number" if isinstance(node, int | float) else "null" if node is None else "string"), node


def _keys(found: dict[Path, Item]) -> set[Path]:
    return {_plain(path[: n + 1]) for path in found for n, step in enumerate(path) if isinstance(step, str)}


def _unplaced(found: dict[Path, Item]) -> Counter[tuple[Path, Item]]:
    return Counter((_plain(path), item) for path, item in found.items())


def _plain(path: Path) -> Path:
    """Every place in a list as 0, which is no key."""
    return tuple(step if isinstance(step, str) else 0 for step in path)


def f1(said: Counter[Any], wanted: Counter[Any]) -> float:
    """1 where nothing is wanted and nothing said."""
    both = said.total() + wanted.total()
    return 2 * (said & wanted).total() / both if both else 1.0
