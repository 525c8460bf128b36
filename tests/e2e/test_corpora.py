"""`graft run` over corpora: the same bytes however it is run, killed or grown; what is bad is counted, what is good unharmed."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from .corpora import BAD, RECIPE, STAGES, Place, Writer, line, lines_of, quoted_of, watched, workers, write_bad, write_base, write_lines
from .kills import RAY_AGENTS
from .tree import Tree

EVALUATED = 5  # documents of the evaluation set that the corpora hold too


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return Tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The corpora and the base, to be copied into places."""
    folder, writer = tmp_path_factory.mktemp("inputs"), Writer(1)
    write_base(folder / "base")
    texts = [writer.text(700) for _ in range(4500)]
    evaluated, prose = [writer.text(700, "zh") for _ in range(EVALUATED)], [writer.text(700) for _ in range(1500)]
    write_lines(folder / "texts" / "0.jsonl.gz", (line({"text": t}) for t in texts[:3300] + evaluated))  # cut when it is read
    write_lines(folder / "texts" / "1.jsonl", (line({"text": t}) for t in texts[3300:] + texts[:50]))
    write_lines(folder / "prose" / "0.jsonl", (line({"text": t}) for t in prose + texts[100:150]))
    write_lines(folder / "chats" / "0.jsonl", (line(writer.chat(900)) for _ in range(1500)))
    write_lines(folder / "evaluation.jsonl", (line({"text": t}) for t in evaluated))
    return folder


@pytest.fixture(scope="module")
def place(tree, inputs, tmp_path_factory):
    """make(): a place with the corpora in it."""

    def make(at=None):
        found = Place(tree, at or tmp_path_factory.mktemp("place"))
        shutil.copytree(inputs, found.folder, dirs_exist_ok=True)
        return found

    return make


@pytest.fixture(scope="module")
def calm(place):
    """The place of a run that nothing disturbed, on two CPUs."""
    found = place()
    found.run()
    found.tree.none_alive(within_s=60, but=RAY_AGENTS)
    assert not found.drafts()
    return found


@pytest.fixture
def room(tmp_path):
    """A folder for much data, removed behind the test."""
    yield tmp_path / "room"
    shutil.rmtree(tmp_path / "room", ignore_errors=True)


# ---- the same bytes ----------------------------------------------------------------------------------------------------
def test_four_workers_write_the_bytes_of_two_and_an_added_file_costs_itself(place, calm):
    other = place()
    other.run(cpus=4)
    assert other.digests() == calm.digests()
    before, kinds = other.parts(), {path: kind(path) for path in other.parts()}
    writer = Writer(2)
    write_lines(other.folder / "texts" / "2.jsonl", (line({"text": writer.text(700)}) for _ in range(1700)))  # of 1.1 MB: two pieces
    other.run()
    after = other.parts()
    assert all(after[path] == before[path] for path in before.keys() & after.keys())
    made = Counter(kind(path) for path in after.keys() - before.keys())
    gone = Counter(kinds[path] for path in before.keys() - after.keys())
    print(f"of {len(before)} parts {len(before.keys() & after.keys())} are as they were; made {dict(made)}, in place of {dict(gone)}")
    assert made["reading"] == made["documents"] == 2 and not gone.keys() & {"reading", "documents"}
    assert made["shard-sft"] == 0, "no chat was added"
    assert made["shard-cpt"] == gone["shard-cpt"] == 1, "small documents files are packed together, the new ones with them"
    assert other.artifact("shard-sft").digest == calm.artifact("shard-sft").digest
    assert other.artifact("prepare").counts["corpora"]["texts"]["records"] == calm.artifact("prepare").counts["corpora"]["texts"]["records"] + 1700


def kind(path: Path) -> str:
    """What a part is, by what it holds."""
    if path.parent.name != "prepare":
        return path.parent.name
    holds = {p.name for p in path.iterdir()}
    if "documents.parquet" in holds:
        return "reading" if '"records"' in (path / "part.json").read_text() else "documents"
    return "comparison"


def test_what_a_run_of_corpora_says_of_itself(calm):
    counts = calm.artifact("prepare").counts["corpora"]
    rejected = Counter((row["source"], row["reason"]) for row in calm.rejected("prepare"))
    assert rejected == {("texts", "contaminated"): EVALUATED, ("texts", "duplicate"): 50, ("prose", "duplicate"): 50}
    assert {name: (c["records"], c["documents"]) for name, c in counts.items()} == {
        "texts": (4550 + EVALUATED, 4500),
        "prose": (1550, 1500),
        "chats": (1500, 1500),
    }


def test_weights_show_in_the_shards_and_in_their_shares(calm):
    folder = calm.artifact("prepare").path / "corpora"
    corpora = {name: set(pq.read_table(folder / name)["text"].to_pylist()) for name in ("texts", "prose")}
    train, held_out = calm.documents("shard-cpt", "train"), calm.documents("shard-cpt", "validation")
    assert {train[text] for text in corpora["texts"] - held_out.keys()} == {2}
    taken = Counter(train[text] for text in corpora["prose"] - held_out.keys())
    assert set(taken) == {0, 1} and 0.2 < taken[1] / taken.total() < 0.3
    assert set(held_out.values()) == {1} and not train.keys() & held_out.keys()
    shares = calm.shares("shard-cpt")
    characters = {name: sum(n * len(text) for text, n in train.items() if text in texts) for name, texts in corpora.items()}
    assert shares["texts"] == pytest.approx(characters["texts"] / sum(characters.values()), abs=0.01)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)


# ---- kills -------------------------------------------------------------------------------------------------------------
def killed_at_random(place, calm, kills, of_workers):
    """Drivers, with `of_workers` a worker of each too, killed when a random number of parts is finished; then a run to the end."""
    rng, total = random.Random(kills), len(calm.parts())
    found, at, lost = place(), [], 0
    while len(at) < kills:
        here = min(4, kills - len(at))  # kills of one workspace, each in a range of its own
        for target in [rng.randrange(max(1, total * k // here), total * (k + 1) // here) for k in range(here)]:
            process = found.start()
            lost += of_workers and worker_killed(found, process, rng)
            if not until(process, partial(has_parts, found, target), rng.random() * 0.3):
                break  # it was done before
            finished = found.parts()
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            at.append(len(finished))
            found.tree.none_alive(within_s=60, but=RAY_AGENTS)
            assert_kept(found, finished)
        finished, process = found.parts(), found.start()
        lost += of_workers and worker_killed(found, process, rng)
        assert process.wait(600) == 0, found.tree.said()[-4000:]
        assert_kept(found, finished)
        assert found.digests() == calm.digests() and not found.drafts()
        if len(at) < kills:
            shutil.rmtree(found.folder)
            found = place(found.folder)
    print(f"drivers killed {len(at)} at {at} of {total} parts, workers killed {lost}; digests equal, no finished part made twice")
    return lost


def has_parts(place, count):
    return len(place.parts()) >= count


def assert_kept(place, finished):
    after = place.parts()
    assert {path: after.get(path) for path in finished} == finished, "a finished part is never made again"


def worker_killed(place, process, rng):
    """SIGKILL one of the workers up to 2 s after the first is seen at a part; 0 where none was then."""
    if until(process, partial(workers, place.tree), rng.random() * 2):
        for pid in workers(place.tree)[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return 1
    return 0


def until(process, holds, then_s):
    """Wait until it holds, and a moment longer; whether the process still runs."""
    deadline = time.monotonic() + 300
    while not holds() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(then_s)
    return process.poll() is None


def test_killed_the_rerun_makes_what_is_missing_alone(place, calm):
    assert killed_at_random(place, calm, kills=2, of_workers=True) >= 1


@pytest.mark.campaign
@pytest.mark.parametrize("of_workers", [False, True])
def test_killed_at_20_random_points(place, calm, of_workers):
    assert killed_at_random(place, calm, kills=20, of_workers=of_workers) >= 10 * of_workers


# ---- bad input ---------------------------------------------------------------------------------------------------------
def test_bad_input_is_counted_by_its_reason_and_the_rest_is_unharmed(tree, inputs, room):
    bad, writer = Place(tree, room, BAD), Writer(3)
    shutil.copytree(inputs / "base", bad.folder / "base")
    good, chats = write_bad(bad.folder, writer)
    bad.run()
    counts, rejected = bad.artifact("prepare").counts["corpora"], bad.rejected("prepare")
    reasons = {name: Counter(row["reason"] for row in rejected if row["source"] == name) for name in counts}
    (truncated,) = [reason for reason in reasons["texts"] if "gzip" in reason]
    recovered = int(truncated.split(" after ")[1].split()[0])
    assert truncated.startswith("truncated gzip") and 0 < recovered < 100
    assert reasons["texts"] == {
        "invalid UTF-8": 1,
        "empty": 1,
        '"text" is empty': 1,
        '"text" is null': 2,
        "no JSON": 1,
        "a record of 200.0 MiB, over 64 MiB": 1,
        truncated: 1,
        "other columns than the header": 1,
    }
    assert reasons["chats"] == {"unbalanced roles": 2, '"messages" is null': 1, "empty message": 1}  # no message at all has no turns either
    for name, c in counts.items():
        assert c["rejected"] == dict(sorted(reasons[name].items())) and c["records"] == c["documents"] + sum(c["rejected"].values())
    found = bad.documents("shard-cpt", "train") + bad.documents("shard-cpt", "validation")
    assert {text: found[text] for text in good} == dict.fromkeys(good, 1) and found.total() == len(good) + recovered
    sharded = bad.artifact("shard-sft").counts
    assert sharded["rejected"] == {"longer than shard.seq_len": 1} and sharded["in"] == sharded["kept"] + 1 == len(chats) + 1
    assert [row["reason"] for row in bad.rejected("shard-sft")] == ["longer than shard.seq_len"]
    talks = "\0".join(bad.documents("shard-sft", "train") + bad.documents("shard-sft", "validation"))
    assert all(message["content"] in talks for chat in chats for message in chat["messages"])


# ---- refused -----------------------------------------------------------------------------------------------------------
def test_contamination_is_refused_by_choice(place):
    refused = place()
    said = refused.refused("decontaminate.on_hit=refuse", until="prepare")
    assert f"{EVALUATED} of texts" in said and "quarantine" in said
    assert not list(refused.folder.glob("data_shards/*/prepare/*")) and not refused.drafts()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own in memory, and resize(bytes)."""
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_line_and_goes_on_with_room(small_disk, place, calm):
    folder, resize = small_disk
    full = place(folder)
    used = shutil.disk_usage(folder).used
    for room, finished in ((0, 0), (4 << 20, 1)):  # nothing can be written at all; the parts do not all fit
        resize(used + room)
        said = full.refused()
        assert "no space left" in said and str(folder) in said
        assert not [stage for stage in STAGES if list(folder.glob(f"data_shards/*/{stage}/[0-9a-f]*"))] and not full.drafts(of_parts=False)
        assert len(full.parts()) >= finished
    kept = full.parts()
    resize(1 << 30)
    full.run()
    assert full.digests() == calm.digests()
    after = full.parts()
    assert {p: after[p] for p in kept} == kept


# ---- large -------------------------------------------------------------------------------------------------------------
SIZE_MB = int(os.environ.get("GRAFT_TEST_CORPUS_MB", "2000"))


@pytest.mark.campaign
@pytest.mark.parametrize("how", ["pieces", "gzip", "quoted"])
def test_a_corpus_larger_than_a_worker_may_grow(tree, inputs, place, room, how):
    """2 GB through prepare and shard-cpt: a worker stays under 2.5 GB, and the driver takes what it takes for 4 MB."""
    small = place()
    _, driver_mb, _ = watched(small)
    large, writer = Place(tree, room, RECIPE.replace("part_mib = 1\n", "")), Writer(4)
    shutil.copytree(inputs, large.folder, dirs_exist_ok=True)
    shutil.rmtree(large.folder / "texts")
    if how == "pieces":
        for n in range(4):
            write_lines(large.folder / "texts" / f"{n}.jsonl", lines_of(writer, SIZE_MB * 250_000))
    elif how == "gzip":
        write_lines(large.folder / "texts" / "0.jsonl.gz", lines_of(writer, SIZE_MB * 1_000_000))
    else:
        write_lines(large.folder / "texts" / "0.csv", quoted_of(writer, SIZE_MB * 1_000_000))
    wall_s, peak_mb, workers_mb = watched(large)
    counts = large.artifact("prepare").counts["corpora"]["texts"]
    of_stages = {stage: round(large.artifact(stage).manifest["wall_s"]) for stage in ("prepare", "shard-cpt")}
    print(
        f"{SIZE_MB} MB, {counts['records']:,} records, {counts['documents']:,} kept, in {wall_s:.0f} s: {SIZE_MB / wall_s:.2f} MB/s; "
        f"seconds {of_stages}; workers at most {workers_mb:.0f} MB, the driver {peak_mb:.0f} MB, with 4 MB of text {driver_mb:.0f} MB"
    )
    assert workers_mb <= 2560
    assert peak_mb <= driver_mb + 100


@pytest.mark.campaign
def test_a_worker_takes_no_more_for_a_larger_compressed_file(tree, inputs, room):
    """Of 4 and 48 MB in parts of 2 MiB: a worker that held all of the larger file would take 300 MB more."""
    peaks = []
    for size_mb in (4, 48):
        here = Place(tree, room / f"of{size_mb}", RECIPE.replace("part_mib = 1\n", "part_mib = 2\n"))
        shutil.copytree(inputs, here.folder, dirs_exist_ok=True)
        shutil.rmtree(here.folder / "texts")
        write_lines(here.folder / "texts" / "0.jsonl.gz", lines_of(Writer(4), size_mb * 1_000_000))
        peaks.append(watched(here)[2])
    print(f"workers at most {peaks[0]:.0f} and {peaks[1]:.0f} MB")
    assert peaks[1] <= peaks[0] + 200
