"""Corpora that are written by rule, a recipe of them in a folder of its own, and what its runs leave there."""

import contextlib
import gzip
import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from graft.core.artifact import Artifact
from graft.core.shards import ShardSet
from graft.core.stages import Plan

from .tree import Tree

STAGES = ("prepare", "shard-cpt", "shard-sft")
WORDS = ["water", "stone", "letter", "winter", "garden", "engine", "paper", "answer", "machine", "mountain", "window", "carry", "silver", "river"]
HAN = [chr(0x4E00 + 7 * i) for i in range(400)]
WORKER = "ray::Map(_make_one)"

RECIPE = """
name = "corpora"
deepspeed = "{deepspeed}"
[corpora.texts]
path = "texts"
[corpora.prose]
path = "prose"
[corpora.chats]
path = "chats"
[decontaminate]
sets = ["evaluation.jsonl"]
[shard]
seq_len = 2048
part_mib = 1
[model]
base = "base"
[cpt]
corpora = ["texts", "prose"]
weights = {{ texts = 2.0, prose = 0.25 }}
[sft]
corpora = ["chats"]
"""

BAD = """
name = "bad"
deepspeed = "{deepspeed}"
[corpora.texts]
path = "texts"
[corpora.chats]
path = "chats"
[shard]
seq_len = 2048
part_mib = 1
[model]
base = "base"
[cpt]
corpora = ["texts"]
[sft]
corpora = ["chats"]
"""


class Writer:
    """Documents that no cleaning step changes; the same seed writes the same ones."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        han = ["".join(self.rng.choices(HAN, k=self.rng.randint(6, 18))) for _ in range(40_000)]
        words = [" ".join(self.rng.choices(WORDS, k=self.rng.randint(4, 9))).capitalize() + f" {n}" for n in range(40_000)]
        self.han, self.words = [f"{s}。" for s in han], [f"{s}. " for s in words]

    def text(self, size_bytes: int, language: str = "") -> str:
        """About so many bytes of Chinese or English sentences, or, one time in five, of both."""
        kind = language or self.rng.choice(("zh", "zh", "en", "en", "both"))
        pool = {"zh": self.han, "en": self.words}.get(kind) or self.rng.choices(self.han, k=50) + self.rng.choices(self.words, k=50)
        found, size = [], 0
        while size < size_bytes:
            found.append(self.rng.choice(pool))
            size += len(found[-1]) * (3 if found[-1].endswith("。") else 1)
        return "".join(found).strip()

    def chat(self, size_bytes: int) -> dict:
        asked, answered = self.text(size_bytes // 3), self.text(2 * size_bytes // 3)
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def line(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def write_lines(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as f:
        f.writelines(lines)


def lines_of(writer, size_bytes):
    while size_bytes > 0:
        size_bytes -= len(found := line({"text": writer.text(1500)}))
        yield found


def quoted_of(writer, size_bytes):
    yield b"text,source\n"
    while size_bytes > 0:
        size_bytes -= len(found := b'"%s\n",web\n' % writer.text(1500).replace(". ", ".\n", 1).encode())
        yield found


def write_bad(folder, writer):
    """Every kind of bad input among good ones; ({texts}, {questions}) of the good ones, and the reasons of the bad ones."""
    good = [writer.text(600) for _ in range(600)]
    lines = [line({"text": text}) for text in good]
    bad = [b'{"text": "\xff\xfe broken"}\n', b"\n", line({"text": ""}), line({"text": None}), lines[0][: len(lines[0]) // 2] + b"\n"]
    (folder / "texts").mkdir()
    with (folder / "texts" / "a.jsonl").open("wb") as f:
        for n, some in enumerate(bad):
            f.writelines([*lines[30 * n : 30 * n + 30], some])
        f.write(b'{"text": "')
        for _ in range(200):
            f.write(b"x" * (1 << 20))
        f.write(b'"}\n')
        f.writelines(lines[150:300])
    (folder / "texts" / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[300:400])))
    broken = gzip.compress(b"".join(line({"text": writer.text(600)}) for _ in range(100)))
    (folder / "texts" / "c.jsonl.gz").write_bytes(broken[: len(broken) // 2])
    rows = [b"text,source\n", *(b'"%s",web\n' % text.encode() for text in good[400:450]), b"one,two,three\n"]
    write_lines(folder / "texts" / "d.csv", rows + [b'"%s",web\n' % text.encode() for text in good[450:500]])
    table = pa.table({"text": pa.array([*good[500:550], None, *good[550:]], pa.string())})
    pq.write_table(table, folder / "texts" / "e.parquet")
    chats = [writer.chat(900) for _ in range(200)]
    unbalanced = {"messages": [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]}
    long = writer.chat(60_000)
    odd = [unbalanced, {"messages": None}, {"messages": []}, {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}]
    write_lines(folder / "chats" / "a.jsonl", map(line, [*chats[:100], *odd, *chats[100:], long]))
    return good, chats


def write_base(folder: Path) -> None:
    """A base of which there is what sharding reads: a tokenizer with its template."""
    from graft.data.tokenizer import train_tokenizer

    writer = Writer(0)
    train_tokenizer((writer.text(1500) for _ in range(300)), 1500).save_pretrained(folder, save_jinja_files=False)
    (folder / "config.json").write_text("{}")


class Place:
    """A workspace with a recipe, its corpora and a base in it."""

    def __init__(self, tree: Tree, folder: Path, recipe: str = RECIPE):
        self.tree, self.folder, self.recipe = tree, folder, folder / "recipe.toml"
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe.write_text(recipe.format(deepspeed=tree.path / "configs/deepspeed/zero2.json"))

    def command(self, *overrides: str, cpus: int = 2, until: str = "shard-sft") -> tuple[str, ...]:
        sets = [a for o in overrides for a in ("--set", o)]
        run = self.tree.graft("run", str(self.recipe), "--workspace", str(self.folder), "--until", until, *sets)
        return ("env", f"GRAFT_CPUS={cpus}", *run)

    def start(self, *overrides: str, **options) -> subprocess.Popen:
        return self.tree.start(*self.command(*overrides, **options))

    def run(self, *overrides: str, **options) -> float:
        return self.tree.run(*self.command(*overrides, **options))

    def refused(self, *overrides: str, **options) -> str:
        """Run it to exit code 2; the one line that it says at its end."""
        before = len(self.tree.said())
        process = self.start(*overrides, **options)
        code, said = process.wait(300), self.tree.said()[before:]
        assert code == 2 and "Traceback" not in said, said[-4000:]
        (last,) = [x for x in said.splitlines() if x.startswith("graft: ")]
        assert said.rstrip().endswith(last), said[-4000:]
        return last

    def artifact(self, stage: str) -> Artifact:
        found = Plan(self.recipe, (), self.folder).latest(stage)
        found.verify()
        return found

    def digests(self) -> dict[str, str]:
        return {stage: self.artifact(stage).digest for stage in STAGES}

    def parts(self, stage: str = "*") -> dict[Path, tuple[int, int]]:
        """(inode, mtime) of every finished part's report."""
        found = {}
        for path in self.folder.glob(f"data_shards/*/parts/{stage}/[0-9a-f]*"):
            with contextlib.suppress(FileNotFoundError):  # swept meanwhile
                stat = (path / "part.json").stat()
                found[path] = (stat.st_ino, stat.st_mtime_ns)
        return found

    def drafts(self, of_parts: bool = True) -> list[Path]:
        """What is half made of an artifact, or of a part."""
        return [*self.folder.glob("*/*/*/.*draft*"), *(self.folder.glob("data_shards/*/parts/*/.*") if of_parts else ())]

    def rejected(self, stage: str) -> list[dict]:
        with (self.artifact(stage).path / "rejected.jsonl").open(encoding="utf-8") as f:
            return [json.loads(row) for row in f]

    def documents(self, stage: str, split: str) -> Counter[str]:
        """How often each document stands in the shards, decoded."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder / "base")
        shards, found = ShardSet.open(self.artifact(stage).path / split), []
        for i in range(len(shards)):
            here, at = shards.bin(i), 0
            for length in here.doc_lens:
                found.append(here.input_ids[at : at + length].tolist())
                at += length
        return Counter(text.removesuffix("<|endoftext|>") for text in tokenizer.batch_decode(found))

    def shares(self, stage: str) -> dict[str, float]:
        return self.artifact(stage).counts["train"]["shares"]


def workers(tree: Tree) -> list[int]:
    """Of this tree's Ray workers those that make a part just now."""
    return [pid for pid, title in tree.alive().items() if title.startswith(WORKER)]


def rss_mb(pid: int) -> float:
    """Resident memory, mapped files included."""
    try:
        fields = dict(row.split(":", 1) for row in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) / 1024
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return 0.0


def sampled(tree: Tree, process: subprocess.Popen, every_s: float = 0.5) -> Iterator[tuple[float, str, float]]:
    """(seconds since the start, title, resident MB) of the driver and every Ray worker until the driver ends."""
    began = time.monotonic()
    while process.poll() is None:
        for pid, title in tree.alive().items():
            if pid == process.pid or title.startswith("ray::"):
                yield time.monotonic() - began, "driver" if pid == process.pid else title.split()[0], rss_mb(pid)
        time.sleep(every_s)


def watched(place):
    """(seconds, most MB of the driver, most MB of a worker) of a run until shard-cpt."""
    process, began = place.start(until="shard-cpt"), time.monotonic()
    peaks, said_s = Counter(), 0.0
    for at_s, title, rss in sampled(place.tree, process):
        role = title if title == "driver" else "worker"
        peaks[role] = max(peaks[role], rss)
        if role == "driver" and at_s >= said_s:
            print(f"{at_s:.0f} s: driver {rss:.0f} MB, {len(place.parts())} parts, so far { ({k: round(v) for k, v in peaks.items()}) }", flush=True)
            said_s = at_s + 15
    assert process.returncode == 0, place.tree.said()[-4000:]
    return time.monotonic() - began, peaks["driver"], peaks["worker"]
