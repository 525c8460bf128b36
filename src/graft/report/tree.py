"""What a report says, as one typed tree that `dataclasses.asdict` turns into JSON: gathered once, drawn by page.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["complete", "under way", "missing", "waits", "damaged"]
Pair = tuple[str, str]  # a name and what is said of it


@dataclass(frozen=True)
class Series:
    """A curve. xs rise; y is None where there is no finite number."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe. note: why it is not complete, or what it made, in one line."""

    name: str
    state: State
    note: str
    path: str = ""  # relative to the workspace
    fingerprint: str = ""
    digest: str = ""
    parents: tuple[Pair, ...] = ()  # stage, fingerprint
    inputs: tuple[Pair, ...] = ()
    keys: tuple[Pair, ...] = ()
    counts: tuple[Pair, ...] = ()
    created_unix_s: float | None = None
    wall_s: float | None = None  # of training: its steps, in all launches
    usd: float | None = None
    graft: str = ""
    commit: str = ""


@dataclass(frozen=True)
class Table:
    """numbers: the columns that stand at the right. shares: one a row, 0 to 1, drawn as a bar."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """counts[i] values lie in edges[i] .. edges[i + 1], the upper edge not among them but for the last."""

    title: str
    unit: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Mark:
    """A step at which something happened."""

    x: float
    kind: Literal["left out", "pause"]
    text: str


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    series: tuple[Series, ...]
    from_zero: bool = False
    noisy: bool = True  # its moving mean says more than its points


@dataclass(frozen=True)
class Spread:
    """One figure of several runs. std: None of a single one."""

    name: str
    mean: float
    std: float | None
    each: tuple[float, ...]


@dataclass(frozen=True)
class Training:
    """One training stage that has begun."""

    stage: str
    complete: bool
    steps: int
    total_steps: int
    steps_s: float  # spent in steps and validations, in all launches
    facts: tuple[Pair, ...]
    charts: tuple[Chart, ...]
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Cost:
    api: tuple[Pair, ...]
    devices: Table
    device_hours: float
    gpu: bool


@dataclass(frozen=True)
class Prediction:
    id: str
    family: str
    label: str
    predicted: str
    right: bool
    prompt: str
    answer: str
    wanted: str
    reason: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Picture:
    """An image of a row. data: a thumbnail of width x height pixels as a data URI, "" where it is not shown; wrong: why not. size: of the image itself."""

    name: str = ""
    alt: str = ""
    data: str = ""
    size: str = ""
    width: int = 0
    height: int = 0
    wrong: str = ""


@dataclass(frozen=True)
class Sample:
    """A training row that shows an image."""

    picture: Picture
    source: str
    question: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """One answer to a task. right: None where there is more than right and wrong. judged: the systems' scores. sides: titles and texts, side by side,
    the question first. code: the other sides are read line against line, however long they are. pictures: what the question shows.
    """

    id: str
    right: bool | None
    judged: str
    sides: tuple[Pair, ...]
    code: bool = False
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Task:
    name: str
    means: Table  # a row a metric, with intervals and the paired difference
    note: str
    best: tuple[Answer, ...] = ()
    worst: tuple[Answer, ...] = ()
    by_question: Table | None = None  # where questions repeat


@dataclass(frozen=True)
class Confusion:
    labels: tuple[str, ...]  # of the rows: what is true
    predicted: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Evaluation:
    rows: int
    scores: Table | None
    confusion: Confusion | None
    families: Table | None
    tasks: tuple[Task, ...]
    others: Table | None  # what else metrics.json holds
    best: tuple[Prediction, ...]
    worst: tuple[Prediction, ...]
    failures: int


@dataclass(frozen=True)
class Report:
    recipe: str
    workspace: str
    made_unix_s: float  # this page
    created_unix_s: float | None  # the newest artifact
    graft: str
    commit: str
    verdict: str
    good: bool | None  # None: not known yet
    ledger: tuple[Pair, ...]  # what the augment artifact says of the API's ledger
    stages: tuple[Stage, ...]
    data: tuple[Table, ...]
    samples: tuple[Sample, ...]
    lengths: tuple[Histogram, ...]
    trainings: tuple[Training, ...]
    cost: Cost
    evaluation: Evaluation | None
