import json

import numpy as np
import pytest

from graft.core import shards
from graft.core.errors import ArtifactError, DataError
from graft.core.shards import INDEX, Bin, ShardSet, write_index, write_shard

SEQ = 16


def some_bins(n: int, seed: int = 0) -> list[Bin]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        lens = np.array([5, 3, rng.integers(1, 9)], np.int32)
        mask = (np.arange(SEQ) < lens.sum()).astype(np.uint8)
        found.append(Bin(rng.integers(0, 99, SEQ).astype(np.int32), mask, lens, [f"c/{i}", f"c/{i + 1}", "d/0"]))
    return found


@pytest.fixture
def folder(tmp_path):
    entries = [write_shard(tmp_path / f"part-000-00{k}.arrow", some_bins(n, k), SEQ) for k, n in enumerate((7, 4))]
    write_index(tmp_path, seq_len=SEQ, pad_id=3, tokenizer="abc", shards=entries, documents=33, tokens=120, supervised_tokens=87)
    return tmp_path


def test_bins_come_back_in_order_without_a_copy(folder):
    held, wanted = ShardSet.open(folder), some_bins(7, 0) + some_bins(4, 1)
    assert len(held) == 11 and held.seq_len == SEQ
    for i, bin_ in enumerate(wanted):
        got = held.bin(i)
        for a, b in zip(got[:3], bin_[:3], strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)
        assert held.sources(i) == bin_.sources
    a, b = held.bin(0).input_ids, held.bin(1).input_ids
    assert b.ctypes.data - a.ctypes.data == SEQ * 4, "neighbouring bins are views of one mapping"
    assert not a.flags.owndata and not a.flags.writeable
    with pytest.raises(IndexError):
        held.bin(11)
    with pytest.raises(IndexError):
        held.bin(-1)


def test_a_shard_of_several_record_batches_reads_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_TOKENS_A_BATCH", 3 * SEQ)
    entry = write_shard(tmp_path / "s.arrow", iter(some_bins(8)), SEQ)
    write_index(tmp_path, seq_len=SEQ, pad_id=0, tokenizer="", shards=[entry], documents=24, tokens=99, supervised_tokens=9)
    held = ShardSet.open(tmp_path)
    assert len(held._batches) == 3
    assert [held.bin(i).input_ids.tolist() for i in range(8)] == [b.input_ids.tolist() for b in some_bins(8)]


def test_the_index_says_what_is_there(folder):
    index = json.loads((folder / INDEX).read_text())
    assert index["format"] == 1 and index["bins"] == 11 and index["pad_id"] == 3 and index["utilisation"] == round(120 / (11 * SEQ), 6)
    assert [s["file"] for s in index["shards"]] == ["part-000-000.arrow", "part-000-001.arrow"]
    assert index["shards"][0]["bytes"] == (folder / "part-000-000.arrow").stat().st_size


def test_the_same_bins_give_the_same_bytes(tmp_path):
    assert write_shard(tmp_path / "a", some_bins(5), SEQ)["sha256"] == write_shard(tmp_path / "b", some_bins(5), SEQ)["sha256"]


def test_datasets_opens_a_shard(folder):
    from datasets import Dataset

    found = Dataset.from_file(str(folder / "part-000-000.arrow"))
    assert len(found) == 7
    assert found[2]["input_ids"] == some_bins(7)[2].input_ids.tolist()
    assert found[2]["sources"] == ["c/2", "c/3", "d/0"]


def test_a_missing_shard_is_named(folder):
    (folder / "part-000-001.arrow").unlink()
    with pytest.raises(ArtifactError, match=r"part-000-001\.arrow is missing"):
        ShardSet.open(folder)


def test_a_truncated_shard_is_named_even_unverified(folder):
    path = folder / "part-000-001.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"part-000-001\.arrow has \d+ bytes"):
        ShardSet.open(folder, verify=False)


def test_one_flipped_bit_is_found(folder):
    path = folder / "part-000-000.arrow"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"part-000-000\.arrow was altered"):
        ShardSet.open(folder)


def test_a_file_that_is_no_arrow_stream_is_named(folder):
    path = folder / "part-000-000.arrow"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ArtifactError, match=r"part-000-000\.arrow is no Arrow stream"):
        ShardSet.open(folder, verify=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "index.json is missing"), ("{", "cannot be read"), ('{"format": 9}', "has format 9"), ('{"format": 1}', "cannot be read")],
)
def test_a_bad_index_is_named(folder, text, says):
    (folder / INDEX).unlink() if text is None else (folder / INDEX).write_text(text)
    with pytest.raises(ArtifactError, match=says) as e:
        ShardSet.open(folder)
    assert "\n" not in str(e.value)


def test_a_row_count_that_differs_is_named(folder):
    index = json.loads((folder / INDEX).read_text())
    index["shards"][1]["bins"] = 5
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"part-000-001\.arrow does not hold 5 bins"):
        ShardSet.open(folder)


def test_a_bin_of_another_length_is_refused(tmp_path):
    good = some_bins(1)[0]
    for bad in (good._replace(input_ids=good.input_ids[:-1]), good._replace(doc_lens=np.array([SEQ + 1], np.int32)), good._replace(sources=["x"])):
        with pytest.raises(DataError, match=r"s\.arrow"):
            write_shard(tmp_path / "s.arrow", [good, bad], SEQ)
