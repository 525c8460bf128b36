"""`graft inspect PATH`: what is in a shard or prepare artifact, as tables and bars in the terminal, or as a page.

About 4 s for 1,400 bins of 1k tokens, most of it the import of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from graft.core.errors import ConfigError
from graft.data.inspect_bin import RenderedBin, visible
from graft.data.inspect_html import page
from graft.data.inspect_report import Report, Section, gather

PAGE_BINS = 3  # bins on a page


def inspect(path: Path, bin: int | None, html: Path | None, console: Console) -> None:
    """Print what is at `path`, and bin number `bin` (0 where it is None); with `html`, write the page too.

    path: a shard or prepare artifact, or a folder with an index.json, which is its train/. Raises ArtifactError where
    `path` is none of these, ConfigError for a bin that is not there and for a page that cannot be written.
    """
    report = gather(Path(path), bin, PAGE_BINS if html and bin is None else 1)
    console.print(Group(*_printed(report)), soft_wrap=False)
    if html:
        try:
            Path(html).write_text(page(report), encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"--html {html} cannot be written ({e.strerror}): name a file in a folder that is there") from None
        console.print(f"page: {html}", soft_wrap=True, markup=False)


# ---- the terminal -------------------------------------------------------------------------------------------------------
def _printed(report: Report) -> Iterator[RenderableType]:
    yield Text(report.title, style="bold")
    for section in report.sections:
        yield Text(f"\n{section.title}", style="bold")
        yield _table(section) if section.rows else Text("none")
        if section.note:
            yield Text(visible(section.note), style="dim")
    for found in report.bins[:1]:
        yield from _printed_bin(found)


def _table(section: Section) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for n, name in enumerate(section.columns):
        table.add_column(Text(name, style="dim"), justify="right" if section.is_number(n) else "left", overflow="fold")
    top = max(section.measure or [0.0])
    if section.measure:
        table.add_column("")
    for n, row in enumerate(section.rows):
        cells = [Text(visible(cell).replace("↵\n", "↵")) for cell in row]
        table.add_row(*cells, *([Text(bar(section.measure[n] / top if top else 0.0), style="cyan")] if section.measure else []))
    return table


def bar(share: float, width: int = 24) -> str:
    """A bar of 0 to `width` cells, to the eighth of one."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def _printed_bin(found: RenderedBin) -> Iterator[RenderableType]:
    yield Text.assemble(("\nBin ", "bold"), (str(found.number), "bold"), "  ", ("supervised", "green"), ", ", ("not supervised", "dim"))
    if found.note:
        yield Text(visible(found.note), style="yellow")
    for document in found.documents:
        tokens = sum(len(run.ids) for run in document.runs)
        yield Text(f"── {visible(document.source)} · {tokens} tokens " + "─" * 12, style="blue")
        yield Text.assemble(*((visible(run.text), "green" if run.supervised else "dim") for run in document.runs))
    yield Text(f"── padding · {found.padding} tokens " + "─" * 12, style="blue")
