"""How different the rows are from each other while they are made: two curves over the rows, as numbers and as a figure.

distinct-n is the share of character n-grams that are different ones among all (Li et al. 2016,
https://arxiv.org/abs/1510.03055); it falls as text grows, so compare curves at equal rows. `nearest` is how similar a
round's rows are to the most similar row of the rounds before, in the gate's measure. 10,000 rows in 60 rounds cost 1 s.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graft.data.augment.novelty import ngrams, normal

_ORDERS = (1, 2, 3)
_WINDOW = 50  # rows of a round that are compared with all before


class Diversity:
    """`add` once a round, then `figure`.

    points: one a round, JSON-ready: {"step": round, "rows": made so far, "distinct_1", "distinct_2", "distinct_3": 0 to 1,
        "nearest": mean similarity, 0 to 1; None where there is nothing to compare}.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []
        self._distinct: dict[int, set[str]] = {n: set() for n in _ORDERS}
        self._total = dict.fromkeys(_ORDERS, 0)
        self._rows: dict[str, array[int]] = {}  # n-gram of the gate -> rows that hold it
        self._sizes: array[int] = array("q")

    def add(self, texts: Sequence[str]) -> dict[str, Any]:
        """Take a round's texts, in the order made; returns the round's point."""
        texts = [normal(text) for text in texts]
        window = texts[:: -(-len(texts) // _WINDOW)] if texts and self._sizes else []
        nearest = [self._nearest(text) for text in window]
        for text in texts:
            self._keep(text)
        point = {
            "step": len(self.points),
            "rows": len(self._sizes),
            **{f"distinct_{n}": round(len(self._distinct[n]) / self._total[n], 4) if self._total[n] else None for n in _ORDERS},
            "nearest": round(float(np.mean(nearest)), 4) if nearest else None,
        }
        self.points.append(point)
        return point

    def figure(self, path: Path) -> None:
        """Draw the points as a PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name, label in (*((f"distinct_{n}", f"distinct-{n}") for n in _ORDERS), ("nearest", "similarity to the nearest row before")):
            points = [(p["rows"], p[name]) for p in self.points if p[name] is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], marker=".", linestyle="--" if name == "nearest" else "-", label=label)
        axes.set(xlabel="rows made", ylabel="share, or similarity", ylim=(0, 1), title="Diversity of the rows (character n-grams)")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})  # the same points, the same bytes

    def _nearest(self, text: str) -> float:
        """The largest Jaccard similarity of `text` to a text kept before."""
        grams = ngrams(text)
        common = np.zeros(len(self._sizes), dtype=np.int64)
        for gram in grams:
            if rows := self._rows.get(gram):
                common[np.frombuffer(rows, dtype=np.int64)] += 1
        return float((common / (len(grams) + np.frombuffer(self._sizes, dtype=np.int64) - common)).max())

    def _keep(self, text: str) -> None:
        for n in _ORDERS:
            grams = [text[i : i + n] for i in range(len(text) - n + 1)]
            self._distinct[n].update(grams)
            self._total[n] += len(grams)
        grams = ngrams(text)
        for gram in grams:
            self._rows.setdefault(gram, array("q")).append(len(self._sizes))
        self._sizes.append(len(grams))
