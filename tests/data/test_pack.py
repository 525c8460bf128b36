import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.core.errors import DataError
from graft.data.pack import pack, split

CASES = st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=120)))


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


@given(CASES)
def test_every_document_is_in_one_bin_and_no_bin_overflows(case):
    capacity, lengths = case
    bins = pack(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in b) <= capacity for b in bins)


@given(CASES)
def test_it_is_best_fit_decreasing(case):
    capacity, lengths = case
    assert sorted(capacity - sum(lengths[i] for i in b) for b in pack(lengths, capacity)) == sorted(slow_best_fit_decreasing(lengths, capacity))


def test_it_fills_the_bins():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.9, 20_000).astype(int), 1, 4096)
    bins = pack(lengths, 4096)
    assert lengths.sum() / (len(bins) * 4096) >= 0.999
    assert pack(lengths, 4096) == bins


@pytest.mark.parametrize("lengths", [[3, 0], [3, 11], [-1]])
def test_what_fits_no_bin_is_refused(lengths):
    with pytest.raises(DataError, match="fits no bin of 10"):
        pack(lengths, 10)


def test_nothing_needs_no_bin():
    assert pack([], 10) == []


@given(st.integers(0, 500), st.integers(1, 50))
def test_pieces_cover_a_document_once(length, capacity):
    pieces = split(length, capacity)
    assert [i for a, b in pieces for i in range(a, b)] == list(range(length))
    assert all(b - a == capacity for a, b in pieces[:-1]) and all(0 < b - a <= capacity for a, b in pieces)
