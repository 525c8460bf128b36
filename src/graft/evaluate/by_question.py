"""What chance is where questions repeat: the answer that a question most often wants, which whoever sees nothing may give each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from statistics import fmean
from typing import Any

from graft.core.rows import in_texts

MOST = 12  # questions
Row = dict[str, Any]


def by_question(rows: list[Row], shares: dict[str, list[list[float]]], key: Callable[[str], Hashable]) -> list[Row]:
    """[{"question", "rows", "majority", <system>: share}], a question's rows together, in the order that questions are first asked.

    majority: the share of rows that the commonest wanted answer is right for. shares: of each system, [repeats][rows], whether an answer is right.
    key: what equal wanted answers have in common. [] where no question is asked twice, or there are more than MOST.
    """
    groups: dict[str, list[int]] = {}
    for n, row in enumerate(rows):
        groups.setdefault(_words(row["messages"]), []).append(n)
    if len(groups) > MOST or len(groups) == len(rows):
        return []
    found = []
    for question, places in groups.items():
        commonest = Counter(key(rows[n]["wanted"]) for n in places).most_common(1)[0][1]
        own = {system: round(fmean(fmean(repeat[n] for n in places) for repeat in each), 6) for system, each in shares.items()}
        found.append({"question": question, "rows": len(places), "majority": round(commonest / len(places), 6), **own})
    return found


def _words(messages: list[Any]) -> str:
    """What a conversation says, images and the system message left out."""
    texts = [{**m, "content": [p for p in m["content"] if p["type"] != "image"]} if isinstance(m["content"], list) else m for m in messages]
    return "\n".join(m["content"] for m in in_texts(texts) if m["role"] != "system")


def lines(found: list[Row]) -> list[str]:
    """A table, as plain text."""
    systems = [name for name in found[0] if name not in ("question", "rows", "majority")]
    head = f"  {'right, by question':<36}{'rows':>6}  {'majority':>8}" + "".join(f"  {system:>8}" for system in systems)
    return [
        head,
        *(
            f"  {_cut(told['question']):<36}{told['rows']:>6}  {told['majority']:>8.3f}" + "".join(f"  {told[system]:>8.3f}" for system in systems)
            for told in found
        ),
    ]


def _cut(question: str) -> str:
    line = " ".join(question.split())
    return line if len(line) <= 34 else line[:33] + "…"
