"""Of equal and nearly equal documents the first stays, in real Parquet files and Ray tasks."""

import json
import random
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from graft.core.sections import Dedup
from graft.data import dedup as room
from graft.data.dedup import EXACT, KEPT, NEAR, FingerprintWriter, mask_of
from graft.data.minhash import exact_key, signatures

DATA = Path(__file__).parents[3] / "shared/data"
DEDUP = Dedup()


def words(count, draw):
    return [f"w{draw.randrange(10**6)}" for _ in range(count)]


def with_changes(text, count):
    """`count` words replaced, far apart: each takes five of the word 5-grams with it."""
    out = text.split()
    for n in range(count):
        out[n * len(out) // count + 2] = f"changed{n}"
    return " ".join(out)


def write(folder, name, texts, dedup=DEDUP):
    """(folder `name` with fingerprints as a reading part leaves them, a batch of 100 each, their number)."""
    (folder / name).mkdir(parents=True)
    with FingerprintWriter(folder / name, dedup) as writer:
        for start in range(0, len(texts), 100):
            writer.add(texts[start : start + 100])
    return folder / name, len(texts)


def deduplicate(files, store, dedup):
    return room.deduplicate([path for path, _ in files], [rows for _, rows in files], store, dedup)


def flat(lists):
    return list(chain.from_iterable(lists))


def marks(result):
    return [mask_of(mask).tolist() for mask in result.masks]


def content(result):
    return result.clusters.read_bytes(), result.masks, result.counts


@pytest.fixture(scope="module")
def corpus():
    """(texts of three files, what each is): 300 documents, some of them copies of others, within and across files."""
    draw = random.Random(1)
    texts = [[" ".join(words(100, draw)) for _ in range(100)] for _ in range(3)]
    wanted = [[KEPT] * 100 for _ in range(3)]
    for n in range(10):
        texts[0][50 + n], wanted[0][50 + n] = texts[0][n].upper().replace(" ", ",  "), EXACT
        texts[1][20 + n], wanted[1][20 + n] = texts[0][n], EXACT
        texts[1][40 + n], wanted[1][40 + n] = with_changes(texts[0][20 + n], 1), NEAR
        texts[2][60 + n], wanted[2][60 + n] = with_changes(texts[1][60 + n], 1), NEAR
        texts[2][80 + n], wanted[2][80 + n] = with_changes(texts[1][60 + n], 1), EXACT  # equal to the near one before it
        texts[2][n] = with_changes(texts[0][70 + n], 8)  # about 0.4 alike
    return texts, wanted


def test_equal_and_near_ones_go_within_and_across_files(tmp_path, ray_local, corpus):
    texts, wanted = corpus
    files = [write(tmp_path, f"read{n}", some) for n, some in enumerate(texts)]
    result = deduplicate(files, tmp_path / "store", DEDUP)
    assert marks(result) == wanted
    assert result.counts == [
        {"kept": 0, "dropped": 0, "exact": 10, "near": 0},
        {"kept": 0, "dropped": 1, "exact": 10, "near": 10},
        {"kept": 1, "dropped": 2, "exact": 10, "near": 10},
    ]
    rows = pq.read_table(result.clusters).to_pylist()
    assert [row["document"] for row in rows] == [n for n, mark in enumerate(flat(wanted)) if mark]
    signed = signatures(flat(texts), DEDUP)
    for row in rows:
        assert row["document"] == 100 * row["file"] + row["row"] and row["cluster"] == 100 * row["of_file"] + row["of_row"]
        assert row["cluster"] < row["document"] and flat(wanted)[row["cluster"]] == KEPT
        assert row["kind"] == {EXACT: "exact", NEAR: "near"}[flat(wanted)[row["document"]]]
        assert row["similarity"] == pytest.approx((signed[row["document"]] == signed[row["cluster"]]).mean()) and row["similarity"] >= 0.8
    assert result.clusters.parent in {part.path for part in result.parts}


def test_the_result_depends_neither_on_the_cut_nor_on_how_much_is_worked_on_at_once(tmp_path, ray_local, corpus, monkeypatch):
    texts, wanted = corpus
    every = flat(texts)
    files = [write(tmp_path, f"cut{n}", every[start : start + 37]) for n, start in enumerate(range(0, 300, 37))]
    result = deduplicate(files, tmp_path / "one", DEDUP)
    assert flat(marks(result)) == flat(wanted)
    again = deduplicate(files, tmp_path / "two", DEDUP)
    assert content(again) == content(result)
    assert deduplicate(files, tmp_path / "one", DEDUP) == result, "nothing is made twice"

    pairs = [np.load(f"{part.path}/pairs.npy") for part in result.parts if (part.path / "pairs.npy").exists()]
    spec = {"folders": [str(path) for path, _ in files], "rows": [37] * 8 + [4], "near": 0.8, "permutations": 128}
    monkeypatch.setattr(room, "_AT_ONCE", 3)
    for start, found in zip(range(0, 18, room._BANDS), pairs, strict=True):
        room.find({**spec, "bands": [start, min(18, start + room._BANDS)]}, tmp_path)
        assert (np.load(tmp_path / "pairs.npy") == found).all()


def test_an_added_file_changes_no_mask_of_the_files_before_it(tmp_path, ray_local, corpus):
    texts, _ = corpus
    files = [write(tmp_path, f"read{n}", some) for n, some in enumerate(texts)]
    before, after = (deduplicate(some, tmp_path / "store", DEDUP) for some in (files[:2], files))
    assert after.masks[:2] == before.masks


def test_a_chain_is_one_cluster_and_says_how_alike_its_ends_are(tmp_path, ray_local):
    draw = random.Random(2)
    first = words(200, draw)
    chain = [" ".join([*words(5 * n, random.Random(3)), *first[5 * n :]]) for n in range(8)]
    result = deduplicate([write(tmp_path, "chain", chain)], tmp_path / "store", DEDUP)
    assert marks(result) == [[KEPT] + [NEAR] * 7]
    rows = pq.read_table(result.clusters).to_pylist()
    assert {row["cluster"] for row in rows} == {0}
    assert rows[0]["similarity"] > 0.9 and 0.5 < rows[-1]["similarity"] < 0.8


def test_equal_ones_alone_and_no_documents_at_all(tmp_path, ray_local, corpus):
    texts, _ = corpus
    exact = Dedup(near=1)
    some = [write(tmp_path, "exact", texts[1] + texts[0], exact), write(tmp_path, "none", [], exact)]
    result = deduplicate(some, tmp_path / "store", exact)
    keys = [exact_key(t) for t in texts[1] + texts[0]]
    assert marks(result) == [[EXACT if key in keys[:n] else KEPT for n, key in enumerate(keys)], []]
    assert not any((path / room.SIGNATURES).stat().st_size for path, _ in some)

    empty = deduplicate([write(tmp_path, f"empty{n}", []) for n in range(2)], tmp_path / "store", DEDUP)
    assert marks(empty) == [[], []] and empty.counts == [] and pq.read_table(empty.clusters).num_rows == 0
    assert deduplicate([], tmp_path / "store", DEDUP).masks == []


def test_a_key_of_very_many_documents_stays_linear():
    draw = np.random.default_rng(0)

    def confirmed(signed):
        state = np.empty((64, 128), np.uint32), np.empty(64, np.int64), np.zeros(1, np.uint64), np.zeros(1, np.int64)
        started = time.process_time()
        found = room._confirm(np.arange(len(signed)), np.zeros(len(signed), np.uint64), signed, 103, *state)
        return found, time.process_time() - started

    alike = np.repeat(draw.integers(0, 2**32, (1, 128), dtype=np.uint32), 100_000, axis=0)
    pairs, _ = confirmed(alike)
    assert (pairs == [[0, n] for n in range(1, 100_000)]).all(), "one leader for all"

    different = draw.integers(0, 2**32, (40_000, 128), dtype=np.uint32)
    few, many = (min(confirmed(different[:n])[1] for _ in range(3)) for n in (10_000, 40_000))
    assert many < 8 * few, "four times the documents: 16 times the time, were each held against all"
    recent = np.concatenate([different[:1000], different[990:1000], different[:10]])
    pairs, _ = confirmed(recent)
    assert pairs.tolist() == [[990 + n, 1000 + n] for n in range(10)], "the last 64 are remembered"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
def test_real_news_lines(tmp_path, ray_local):
    lines = (DATA / "taigi_news.txt").read_text(encoding="utf-8").splitlines()[:12_000]
    keys: dict[bytes, int] = {}
    first = [keys.setdefault(exact_key(line), n) for n, line in enumerate(lines)]
    result = deduplicate([write(tmp_path, "a", lines[:5000]), write(tmp_path, "b", lines[5000:])], tmp_path / "store", DEDUP)
    found = np.concatenate([mask_of(mask) for mask in result.masks])
    assert ((found == EXACT) == (np.array(first) != np.arange(len(lines)))).all()
    near = [row for row in pq.read_table(result.clusters).to_pylist() if row["kind"] == "near"]
    assert near and json.dumps(result.counts)
    alike = [shingles(lines[r["document"]]) & shingles(lines[r["cluster"]]) for r in near]
    assert all(alike), "near ones share characters"


def shingles(line):
    letters = "".join(c for c in line if c.isalnum())
    return {letters[i : i + 5] for i in range(max(1, len(letters) - 4))}


MEASURED = """
import json, sys
from pathlib import Path
from graft.data import dedup
work, spec, folder = sys.argv[1:]
getattr(dedup, work)(json.loads(spec), Path(folder))
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20)  # ru_maxrss begins with the parent's
"""


def test_a_large_file_of_signatures_is_not_resident_as_a_whole(tmp_path):
    peaks = []
    for rows in (30_000, 400_000):
        here = tmp_path / f"of{rows}"
        here.mkdir()
        np.random.default_rng(0).integers(0, 2**32, (rows, 128), dtype=np.uint32).tofile(here / room.SIGNATURES)
        spec = {"folders": [str(here)], "rows": [rows], "near": 0.8, "permutations": 128, "bands": [0, 5]}
        done = subprocess.run([sys.executable, "-c", MEASURED, "find", json.dumps(spec), str(here)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout) * 1024)
    print(f"peaks of {peaks} MiB")
    assert peaks[1] - peaks[0] < 100, "370,000 documents more at 110 bytes are 40 MiB; their signatures are 180"


@pytest.mark.campaign
def test_two_million_documents_fit_in_a_worker(tmp_path):
    """Random signatures, every second one nearly its neighbour's, in 20 files; each part in a process of its own."""
    draw = np.random.default_rng(0)
    folders, rows = [], 100_000
    for n in range(20):
        signed = draw.integers(0, 2**32, (rows, 128), dtype=np.uint32)
        signed[1::2] = signed[::2]
        signed[1::2, ::11] += 1
        keys = draw.integers(0, 256, (rows, 16), dtype=np.uint8)
        (tmp_path / f"read{n}").mkdir()
        folders.append(str(tmp_path / f"read{n}"))
        keys.tofile(f"{folders[-1]}/{room.KEYS}")
        signed.tofile(f"{folders[-1]}/{room.SIGNATURES}")

    def run(work, name, spec):
        (tmp_path / name).mkdir()
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", MEASURED, work, json.dumps(spec), str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        print(f"{work}: {float(done.stdout):.2f} GiB, {time.perf_counter() - started:.1f} s")
        assert float(done.stdout) < 2.5
        return str(tmp_path / name)

    spec = {"folders": folders, "rows": [rows] * 20, "near": 0.8, "permutations": 128}
    equal = run("find", "equal", {**spec, "bands": None})
    near = [run("find", f"near{band}", {**spec, "bands": [band, min(18, band + room._BANDS)]}) for band in range(0, 18, room._BANDS)]
    clusters = run("cluster", "clusters", {**spec, "equal": equal, "pairs": near})
    assert pq.read_metadata(f"{clusters}/{room.CLUSTERS}").num_rows > 0.99 * 1_000_000
