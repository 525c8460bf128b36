import json

import numpy as np
import pytest

from graft.core import shards
from graft.core.errors import ArtifactError, DataError
from graft.core.shards import INDEX, Bin, Columns, Image, ShardSet, write_index, write_shard

SEQ = 16
NAMES = ["c", "d"]


def some_bins(n: int, seed: int = 0) -> list[Bin]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        lens = np.array([5, 3, rng.integers(1, 9)][: rng.integers(1, 4)], np.int32)
        mask = ((np.arange(SEQ) < lens.sum()) & (rng.random(SEQ) < 0.7)).astype(np.uint8)
        found.append(Bin(rng.integers(0, 99, SEQ).astype(np.int32), mask, lens))
    return found


def columns(bins: list[Bin]) -> Columns:
    """The bins as the writer takes them; document k is row k of source c, or of d where k is odd."""
    ids, mask = (np.stack(c).reshape(-1, SEQ) for c in ([b.input_ids for b in bins], [b.loss_mask for b in bins]))
    lens = np.concatenate([b.doc_lens for b in bins])
    k = np.arange(len(lens))
    return Columns(ids, mask, lens, np.cumsum([0, *(len(b.doc_lens) for b in bins)]), k % 2, k)


@pytest.fixture
def folder(tmp_path):
    entries = [write_shard(tmp_path / f"part-000-00{k}.arrow", columns(some_bins(n, k)), NAMES) for k, n in enumerate((7, 4))]
    write_index(tmp_path, seq_len=SEQ, pad_id=3, tokenizer="abc", shards=entries)
    return tmp_path


def test_bins_come_back_in_order_without_a_copy(folder):
    held, wanted = ShardSet.open(folder), some_bins(7, 0) + some_bins(4, 1)
    assert len(held) == 11 and held.seq_len == SEQ
    for i, bin_ in enumerate(wanted):
        for a, b in zip(held.bin(i)[:3], bin_[:3], strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)
    a, b = held.bin(0).input_ids, held.bin(1).input_ids
    assert b.ctypes.data - a.ctypes.data == SEQ * 4, "neighbouring bins are views of one mapping"
    assert not a.flags.owndata and not a.flags.writeable
    with pytest.raises(IndexError):
        held.bin(11)
    with pytest.raises(IndexError):
        held.bin(-1)


def test_every_document_knows_its_source(folder):
    held = ShardSet.open(folder)
    for first, n, seed in ((0, 7, 0), (7, 4, 1)):
        k = 0
        for i, bin_ in enumerate(some_bins(n, seed), first):
            assert held.sources(i) == [f"{NAMES[j % 2]}/{j}" for j in range(k, k + len(bin_.doc_lens))]
            k += len(bin_.doc_lens)


def test_names_belong_to_a_shard(tmp_path):
    bins = columns(some_bins(1))
    bins = bins._replace(sources=np.zeros_like(bins.rows))
    entries = [write_shard(tmp_path / f"{name}.arrow", bins, [name]) for name in "xy"]
    index = write_index(tmp_path, seq_len=SEQ, pad_id=0, tokenizer="", shards=entries)
    held = ShardSet.open(tmp_path)
    assert [held.sources(i)[0] for i in range(2)] == ["x/0", "y/0"]
    assert [s["name"] for s in index["sources"]] == ["x", "y"]


def test_costs_and_lengths_of_all_bins(folder):
    held, wanted = ShardSet.open(folder), some_bins(7, 0) + some_bins(4, 1)
    assert held.costs().dtype == np.int64 and held.costs().tolist() == [sum(n * n for n in b.doc_lens.tolist()) for b in wanted]
    assert held.used().tolist() == [b.doc_lens.sum() for b in wanted]
    assert held.doc_lens().tolist() == [n for b in wanted for n in b.doc_lens]
    assert held.largest_id() == max(b.input_ids.max() for b in wanted)


def test_a_shard_of_several_record_batches_reads_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_TOKENS_A_BATCH", 3 * SEQ)
    bins = some_bins(8)
    write_index(tmp_path, seq_len=SEQ, pad_id=0, tokenizer="", shards=[write_shard(tmp_path / "s.arrow", columns(bins), NAMES)])
    held = ShardSet.open(tmp_path)
    assert len(held._batches) == 3
    assert [[a.tolist() for a in held.bin(i)[:3]] for i in range(8)] == [[a.tolist() for a in b[:3]] for b in bins]
    documents = sum(len(b.doc_lens) for b in bins)
    assert [s for i in range(8) for s in held.sources(i)] == [f"{NAMES[k % 2]}/{k}" for k in range(documents)]
    assert len(held.costs()) == 8 and held.used().tolist() == [b.doc_lens.sum() for b in bins]


def test_the_index_says_what_is_there(folder):
    index, bins = json.loads((folder / INDEX).read_text()), some_bins(7, 0) + some_bins(4, 1)
    lens = [b.doc_lens.tolist() for b in bins]
    assert index["format"] == 2 and index["bins"] == 11 and index["pad_id"] == 3 and index["tokenizer"] == "abc"
    assert index["documents"] == sum(map(len, lens)) and index["tokens"] == sum(map(sum, lens))
    assert index["cost"] == sum(n * n for some in lens for n in some)
    firsts = [sum(some[:k]) for some in lens for k in range(len(some))]
    assert index["supervised_tokens"] == sum(b.loss_mask.sum() for b in bins) - sum(
        b.loss_mask[at] for b, at in zip([b for b in bins for _ in b.doc_lens], firsts, strict=True)
    )
    assert index["utilisation"] == round(index["tokens"] / (11 * SEQ), 6)
    assert [s["file"] for s in index["shards"]] == ["part-000-000.arrow", "part-000-001.arrow"]
    assert index["shards"][0]["bytes"] == (folder / "part-000-000.arrow").stat().st_size
    by_source = {s["name"]: (s["documents"], s["tokens"]) for s in index["sources"]}
    first, second = ([n for b in some_bins(n, seed) for n in b.doc_lens.tolist()] for n, seed in ((7, 0), (4, 1)))
    assert by_source == {name: (len(first[k::2] + second[k::2]), sum(first[k::2] + second[k::2])) for k, name in enumerate(NAMES)}


def test_the_same_bins_give_the_same_bytes(tmp_path):
    a, b = (write_shard(tmp_path / name, columns(some_bins(5)), NAMES)["sha256"] for name in "ab")
    assert a == b


def test_datasets_opens_a_shard(folder):
    from datasets import Dataset

    found, bins = Dataset.from_file(str(folder / "part-000-000.arrow")), some_bins(7)
    assert len(found) == 7
    assert found[2]["input_ids"] == bins[2].input_ids.tolist()
    assert found[2]["doc_lens"] == bins[2].doc_lens.tolist() and found[2]["cost"] == int((bins[2].doc_lens ** 2).sum())
    assert found["rows"][1] == list(range(len(bins[0].doc_lens), len(bins[0].doc_lens) + len(bins[1].doc_lens)))


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
    [
        (None, "index.json is missing"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "has format 1, this graft reads 2: make the shards again"),
        ('{"format": 2}', "cannot be read"),
    ],
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


def _with(array: np.ndarray, value: int, at: int | tuple[int, int] = 0) -> np.ndarray:
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda c: c._replace(loss_mask=c.loss_mask[:, :-1]), "not of the same bins"),
        (lambda c: c._replace(ends=c.ends[:-1]), "not of the same bins"),
        (lambda c: c._replace(doc_lens=_with(c.doc_lens, SEQ + 1)), r"doc_lens \[17.* of bin 0: expected 1 or more each, 16 at most in all"),
        (lambda c: c._replace(doc_lens=_with(c.doc_lens, 0, -1)), r"doc_lens \[.*0\] of bin 2: expected 1 or more"),
        (lambda c: c._replace(doc_lens=c.doc_lens[:-1]), "expected one a document"),
        (lambda c: c._replace(ends=_with(c.ends, 0, 1)), "a document a bin"),
        (lambda c: c._replace(rows=c.rows[1:]), "expected one a document"),
        (lambda c: c._replace(sources=c.sources + 1), "not among the 2 names"),
        (lambda c: c._replace(loss_mask=_with(c.loss_mask, 1, (0, SEQ - 1))), "supervises padding"),
        (lambda c: c._replace(loss_mask=_with(c.loss_mask, 2, (0, 0))), "neither 0 nor 1"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, damage, says):
    with pytest.raises(DataError, match=rf"^s\.arrow: .*{says}"):
        write_shard(tmp_path / "s.arrow", damage(columns(some_bins(3, 6))), NAMES)


def test_no_bins_are_a_shard_too(tmp_path):
    none = np.zeros(0, np.int32)
    entry = write_shard(
        tmp_path / "s.arrow", Columns(np.zeros((0, SEQ), np.int32), np.zeros((0, SEQ), np.uint8), none, np.zeros(1, int), none, none), []
    )
    write_index(tmp_path, seq_len=SEQ, pad_id=0, tokenizer="", shards=[entry])
    held = ShardSet.open(tmp_path)
    assert len(held) == 0 and held.costs().tolist() == [] and held.largest_id() == -1 and held.index["utilisation"] == 0.0


SHOWN = [[Image("a.png", (1, 4, 6)), Image("b.jpg", (1, 2, 2))], [], [Image("a.png", (1, 4, 6))]]


def image_rows(images) -> Columns:
    bins = [b._replace(doc_lens=b.doc_lens[:1], loss_mask=b.loss_mask * (np.arange(SEQ) < b.doc_lens[0])) for b in some_bins(len(images))]
    return columns(bins)._replace(images=images)


def test_image_rows_come_back_with_their_images(tmp_path):
    entry = write_shard(tmp_path / "s.arrow", image_rows(SHOWN), NAMES)
    index = write_index(tmp_path, seq_len=SEQ, pad_id=0, tokenizer="", shards=[entry])
    held = ShardSet.open(tmp_path)
    assert held.of_images and index["images"] == entry["images"] == 3
    assert [held.bin(i).images for i in range(3)] == [tuple(row) for row in SHOWN]
    assert [held.bin(i).input_ids.tolist() for i in range(3)] == [b.input_ids.tolist() for b in some_bins(3)]


def test_a_shard_of_text_knows_no_images(folder):
    held = ShardSet.open(folder)
    assert not held.of_images and held.bin(0).images == () and "images" not in held.index


def test_packed_image_rows_are_refused(tmp_path):
    packed = columns(some_bins(3))
    with pytest.raises(DataError, match="image rows are one a bin"):
        write_shard(tmp_path / "s.arrow", packed._replace(images=SHOWN), NAMES)
    with pytest.raises(DataError, match="2 lists of images"):
        write_shard(tmp_path / "s.arrow", image_rows(SHOWN)._replace(images=SHOWN[:2]), NAMES)


def test_shards_of_both_kinds_do_not_mix(tmp_path):
    entries = [write_shard(tmp_path / "a.arrow", image_rows(SHOWN), NAMES), write_shard(tmp_path / "b.arrow", columns(some_bins(3)), NAMES)]
    entries[1]["images"] = 0
    write_index(tmp_path, seq_len=SEQ, pad_id=0, tokenizer="", shards=entries)
    with pytest.raises(ArtifactError, match=r"b\.arrow does not hold 3 bins of 16 tokens"):
        ShardSet.open(tmp_path)
