from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.core.errors import DataError
from graft.data.pack import Bins, alone, fill, pack, pieces

CAPACITIES = st.one_of(st.integers(1, 70), st.sampled_from([127, 4095, 4096, 4097, 9000]))  # words of 64 bits, and words of words
CASES = CAPACITIES.flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=150)))


def plain_pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """The reference, ties included: bisection over the rooms, of equal rooms the bin that came to it last."""
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[i])
        if at < len(rooms):
            room = rooms[at]
            chosen = by_room[room].pop()
            bins[chosen].append(i)
            if not by_room[room]:
                del rooms[at]
        else:
            room, chosen = capacity, len(bins)
            bins.append([i])
        if left := room - lengths[i]:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(chosen)
    return [sorted(b) for b in bins]


def slow_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """What is left in each bin, by the definition: every document looks at every bin."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, r in enumerate(room) if r >= length]
        if fits:
            room[min(fits, key=lambda i: room[i])] -= length
        else:
            room.append(capacity - length)
    return room


def as_lists(bins: Bins) -> list[list[int]]:
    return [bins.order[a:b].tolist() for a, b in zip(bins.ends[:-1], bins.ends[1:], strict=True)]


def lengths_like_text(documents: int, seed: int = 0, capacity: int = 4096, sigma: float = 0.9) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(5.3, sigma, documents).astype(np.int64), 1, capacity)


@given(CASES)
@settings(deadline=None)  # the first example compiles
def test_every_document_is_in_one_bin_and_no_bin_overflows(case):
    capacity, lengths = case
    bins = as_lists(pack(np.array(lengths, np.int64), capacity))
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in b) <= capacity for b in bins)


@given(CASES)
@settings(deadline=None)
def test_it_is_best_fit_decreasing_and_the_reference_to_the_tie(case):
    capacity, lengths = case
    bins = as_lists(pack(np.array(lengths, np.int64), capacity))
    assert sorted(capacity - sum(lengths[i] for i in b) for b in bins) == sorted(slow_best_fit_decreasing(lengths, capacity))
    assert bins == plain_pack(lengths, capacity)


@pytest.mark.parametrize("capacity", [1024, 4096, 131072])
def test_many_documents_equal_the_reference(capacity):
    lengths = lengths_like_text(30_000, capacity=capacity, sigma=1.6)
    assert as_lists(pack(lengths, capacity)) == plain_pack(lengths.tolist(), capacity)


@given(st.integers(0, 2**32), st.sampled_from([2048, 4096, 8192]), st.floats(0.7, 1.3))
@settings(deadline=None, max_examples=25)
def test_it_fills_the_bins(seed, capacity, sigma):
    lengths = lengths_like_text(100_000, seed, capacity, sigma)
    assert lengths.sum() / ((pack(lengths, capacity).ends.size - 1) * capacity) >= 0.999


def test_trl_needs_as_many_bins():
    trl = pytest.importorskip("trl.data_utils", reason="trl is not installed")
    from datasets import Dataset

    lengths = lengths_like_text(5_000, capacity=2048)
    theirs = trl.pack_dataset(Dataset.from_dict({"input_ids": [[1] * n for n in lengths]}), 2048, strategy="bfd", map_kwargs={"batch_size": None})
    assert pack(lengths, 2048).ends.size - 1 == len(theirs)


@pytest.mark.parametrize("lengths", [[3, 0], [3, 11], [-1]])
def test_what_fits_no_bin_is_refused(lengths):
    with pytest.raises(DataError, match="fits no bin of 10"):
        pack(np.array(lengths), 10)


def test_nothing_needs_no_bin():
    bins = pack(np.array([], np.int64), 10)
    assert as_lists(bins) == [] and bins.ends.tolist() == [0]
    ids, mask = fill(np.array([], np.int32), np.array([], np.uint8), bins.order, bins.order, bins, 10, 0)
    assert ids.shape == mask.shape == (0, 10)


@given(st.lists(st.integers(0, 300), max_size=30), st.integers(1, 50))
def test_pieces_cover_every_document_once(lengths, capacity):
    document, start, length = pieces(np.array(lengths, np.int64), capacity)
    covered = [(d, t) for d, a, n in zip(document.tolist(), start.tolist(), length.tolist(), strict=True) for t in range(a, a + n)]
    assert covered == [(d, t) for d, n in enumerate(lengths) for t in range(n)], "in order, none lost, none twice"
    last = np.append(document[1:] != document[:-1], True) if document.size else np.array([], bool)
    assert (length[~last] == capacity).all() and ((length > 0) & (length <= capacity)).all()


@given(CASES, st.integers(0, 2**32))
@settings(deadline=None)
def test_filled_bins_hold_every_token_once_and_cross_no_border(case, seed):
    capacity, lengths = case
    rng = np.random.default_rng(seed)
    sizes = np.array(lengths, np.int64)
    starts = np.cumsum(sizes) - sizes
    ids, mask = np.arange(1, sizes.sum() + 1, dtype=np.int32), rng.integers(0, 2, sizes.sum(), dtype=np.uint8)
    bins = pack(sizes, capacity)
    got_ids, got_mask = fill(ids, mask, starts, sizes, bins, capacity, -7)
    assert got_ids.dtype == np.int32 and got_mask.dtype == np.uint8 and got_ids.shape == got_mask.shape == (bins.ends.size - 1, capacity)
    for row, row_mask, documents in zip(got_ids, got_mask, as_lists(bins), strict=True):
        wanted = [slice(starts[d], starts[d] + sizes[d]) for d in documents]
        tail = capacity - sum(lengths[d] for d in documents)
        assert row.tolist() == [t for w in wanted for t in ids[w].tolist()] + [-7] * tail
        assert row_mask.tolist() == [m for w in wanted for m in mask[w].tolist()] + [0] * tail
    assert sorted(got_ids[got_ids > 0].tolist()) == ids.tolist()


def test_some_bins_are_filled_as_among_all():
    sizes = lengths_like_text(500, capacity=600)
    starts, ids = np.cumsum(sizes) - sizes, np.arange(sizes.sum(), dtype=np.int32)
    mask = (ids % 3 == 0).astype(np.uint8)
    bins = pack(sizes, 600)
    whole = fill(ids, mask, starts, sizes, bins, 600, 0)
    parts = [fill(ids, mask, starts, sizes, bins.between(at, at + 64), 600, 0) for at in range(0, bins.ends.size - 1, 64)]
    for all_of_it, cut in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(all_of_it, np.concatenate(cut))


def test_documents_may_have_a_bin_each():
    ids, mask = fill(np.arange(5, dtype=np.int32), np.ones(5, np.uint8), np.array([0, 2]), np.array([2, 3]), alone(2), 4, 9)
    assert ids.tolist() == [[0, 1, 9, 9], [2, 3, 4, 9]] and mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


@pytest.mark.parametrize(("start", "length", "says"), [(4, 2, "outside"), (-1, 2, "outside"), (0, 4, "more than 3")])
def test_what_would_reach_outside_the_arrays_is_refused(start, length, says):
    with pytest.raises(ValueError, match=says):
        fill(np.arange(5, dtype=np.int32), np.ones(5, np.uint8), np.array([start]), np.array([length]), alone(1), 3, 0)
