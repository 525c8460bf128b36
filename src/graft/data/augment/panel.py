"""What a person sees while rows are made: rows by class, dollars, rates, retries; the same numbers as Ray metrics.

On a terminal a live panel, elsewhere one line a round. It shows counts alone: no key and no text of a row comes here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

METRICS = {
    "spent_usd": "dollars spent by this recipe, presumed ones included",
    "projected_usd": "dollars at the end, at the cost of an accepted row so far",
    "accept_rate": "accepted rows of all that the API returned",
    "requests_per_minute": "requests that came back in the last minute",
    "tokens_per_minute": "tokens of those requests",
    "in_flight": "requests under way",
    "retries": "attempts that failed for a passing reason",
}


@dataclass
class Progress:
    """How far the rows are: made and wanted by class, accepted of those returned."""

    done: dict[str, int] = field(default_factory=dict)
    target: dict[str, int] = field(default_factory=dict)
    accepted: int = 0
    returned: int = 0


class Panel:
    """`with Panel(console, name) as panel:` then `panel.progress = …` each round and `panel.watch(figures)` at any time."""

    def __init__(self, console: Console, name: str):
        self.console, self.name = console, name
        self.progress = Progress()
        self.figures: dict[str, Any] = {}
        self._live = Live(self._table(), console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._gauges: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def watch(self, figures: dict[str, Any]) -> None:
        """Take the broker's figures; called from the session's own thread."""
        self.figures = {**figures, **self.derived(figures)}
        self._publish()
        if self._live:
            self._live.update(self._table())

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def derived(self, figures: dict[str, Any]) -> dict[str, float]:
        """Accept rate and projected dollars."""
        p = self.progress
        rate = p.accepted / p.returned if p.returned else 0.0
        missing = sum(max(0, p.target[c] - p.done.get(c, 0)) for c in p.target)
        projected = figures["spent_usd"] * (1 + missing / p.accepted) if p.accepted else figures["spent_usd"]
        return {"accept_rate": rate, "projected_usd": projected}

    def _publish(self) -> None:
        from ray.util.metrics import Gauge

        if self._gauges is None:
            self._gauges = {name: Gauge(f"graft_augment_{name}", text, ("recipe",)) for name, text in METRICS.items()}
            self._gauges["rows"] = Gauge("graft_augment_rows", "accepted rows and seeds", ("recipe", "label"))
        for name in METRICS:
            self._gauges[name].set(self.figures[name], {"recipe": self.name})
        for label, done in self.progress.done.items():
            self._gauges["rows"].set(done, {"recipe": self.name, "label": label})

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for label, target in self.progress.target.items():
            done = self.progress.done.get(label, 0)
            table.add_row(label, ProgressBar(total=max(1, target), completed=done, width=30), f"{done:,} of {target:,} rows")
        f = self.figures
        if f:
            presumed = f", {f['presumed_usd']:.4f} of it presumed for {f['presumed']} answers that never came" if f["presumed"] else ""
            table.add_row("spent", f"$ {f['spent_usd']:.4f}", f"$ {f['projected_usd']:.4f} projected{presumed}")
            table.add_row("rate", f"{f['requests_per_minute']:,.0f} requests/min", f"{f['tokens_per_minute']:,.0f} tokens/min")
            table.add_row("now", f"{f['in_flight']} in flight", f"{f['queued']} wait, {f['retries']} retries, {f['accept_rate']:.0%} accepted")
            if f["down_s"]:
                table.add_row("[red]down[/red]", f"{f['down_s']:.0f} s", "the server does not answer; one request at a time tries it")
        return table
