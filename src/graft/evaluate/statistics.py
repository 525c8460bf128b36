"""How sure a mean is: percentile bootstrap over rows (Efron 1979, https://doi.org/10.1214/aos/1176344552), and paired where two systems answered the
same ones (Koehn 2004, https://aclanthology.org/W04-3250), over runs too where there are several, and over whole clusters where rows are not independent
(Davison and Hinkley 1997, Bootstrap Methods and their Application, 3.2 and 3.8). Seeded: the same scores give the same interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95
BLOCK = 200  # resamples at once: [200, rows] of indices in memory


@dataclass(frozen=True)
class Mean:
    """low, high: the interval of 95 %; std: of the mean between repeats, None where there was one."""

    mean: float
    low: float
    high: float
    rows: int
    std: float | None = None

    def told(self) -> dict[str, Any]:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items() if v is not None}


def mean_of(scores: Sequence[Sequence[float]], seed: int = 0) -> Mean:
    """scores: [repeats][rows]; a row's score is its mean over the repeats. ValueError without rows."""
    table = _table(scores)
    rows = table.mean(axis=0)
    low, high = interval(_resampled(rows, seed))
    std = float(table.mean(axis=1).std(ddof=1)) if len(table) > 1 else None
    return Mean(float(rows.mean()), low, high, len(rows), std)


def ratio_of(parts: Sequence[float], wholes: Sequence[float], seed: int = 0) -> Mean:
    """Of all parts to all wholes, as nats to tokens; the interval draws rows, each with both of its numbers."""
    table = _table([parts, wholes])
    rng, rows = np.random.default_rng(seed), table.shape[1]
    drawn = [table[:, rng.integers(0, rows, rows)].sum(axis=1) for _ in range(RESAMPLES)]
    return Mean(float(table[0].sum() / table[1].sum()), *interval([a / b for a, b in drawn]), rows)


@dataclass(frozen=True)
class Clusters:
    """Draws of whole clusters of rows. of: [rows], each row's cluster; times: [RESAMPLES, clusters], how often each is in a draw."""

    of: Any
    times: Any

    @classmethod
    def drawn(cls, strata: Sequence[str], names: Sequence[str], seed: int = 0) -> Clusters:
        """strata, names: [rows], the stratum and the cluster in it that a row belongs to. A draw has as many clusters of each stratum as there are.

        A stratum of one cluster has its rows drawn instead, as if they were independent: of other clusters nothing is known. n drawn clusters of n
        have (n - 1) / n of their variance, so the interval of a few is somewhat narrow.
        """
        rng, of, times, first = np.random.default_rng(seed), np.zeros(len(names), np.int64), [], 0
        for stratum in sorted(set(strata)):
            rows = [n for n, own in enumerate(strata) if own == stratum]
            known, own = np.unique([names[n] for n in rows], return_inverse=True)
            if len(known) == 1:
                own = np.arange(len(rows))
            count = int(own.max()) + 1
            of[rows] = first + own
            times.append(rng.multinomial(count, np.full(count, 1 / count), RESAMPLES))
            first += count
        return cls(of, np.concatenate(times, axis=1))

    def sums(self, table: Any) -> Any:
        """table: [rows, n] -> [RESAMPLES, n], the sum over the rows of each draw."""
        whole = np.zeros((self.times.shape[1], table.shape[1]))
        np.add.at(whole, self.of, table)
        return self.times @ whole


@dataclass(frozen=True)
class Paired:
    """Of one system's scores less another's, row by row. p: share of resamples whose difference has the other sign, or none, twice."""

    difference: float
    low: float
    high: float
    p: float
    wins: int
    losses: int

    def told(self) -> dict[str, Any]:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


def paired(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], seed: int = 0) -> Paired:
    """ours, theirs: [repeats][rows] of the same rows. ValueError where they are not as many."""
    a, b = _table(ours).mean(axis=0), _table(theirs).mean(axis=0)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} rows cannot be paired")
    return _paired(a - b, _resampled(a - b, seed))


def paired_runs(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], seed: int = 0) -> Paired:
    """ours, theirs: [runs][rows], a run of each for every seed. ValueError where they are not as many.

    Runs and rows are both drawn, apart from each other (the pigeonhole bootstrap, Owen 2007, https://doi.org/10.1214/07-AOAS122): the interval is of
    other rows and of other runs. n drawn runs of n have (n - 1) / n of the runs' variance, so of three it is somewhat narrow; of one it is of rows alone.
    """
    a, b = _table(ours), _table(theirs)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape} runs and rows cannot be paired")
    rng, apart = np.random.default_rng(seed), a - b
    runs, rows = apart.shape
    means = []
    for at in range(0, RESAMPLES, BLOCK):
        count = min(BLOCK, RESAMPLES - at)
        drawn = apart[rng.integers(0, runs, (count, runs))].mean(axis=1)
        means.append(np.take_along_axis(drawn, rng.integers(0, rows, (count, rows)), axis=1).mean(axis=1))
    return _paired(apart.mean(axis=0), np.concatenate(means))


def _paired(apart: Any, means: Any) -> Paired:
    """apart: [rows] differences; means: [RESAMPLES] of their resampled means."""
    return Paired(float(apart.mean()), *interval(means), other_sign(means), int((apart > 0).sum()), int((apart < 0).sum()))


def interval(found: Any) -> tuple[float, float]:
    """found: [RESAMPLES]. Between which the middle 95 % of them lie."""
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def other_sign(differences: Any) -> float:
    """differences: [RESAMPLES]. The share of the sign that fewer have, those without one counted, twice: the p of a `Paired`."""
    return min(1.0, 2 * float(min((differences <= 0).mean(), (differences >= 0).mean())))


def _table(scores: Sequence[Sequence[float]]) -> Any:
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError("there are no rows to take a mean of")
    return table


def _resampled(rows: Any, seed: int) -> Any:
    """[RESAMPLES] means of as many rows, drawn with replacement."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rows[rng.integers(0, len(rows), (min(BLOCK, RESAMPLES - at), len(rows)))].mean(axis=1) for at in range(0, RESAMPLES, BLOCK)]
    )
