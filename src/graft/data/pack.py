"""Best-fit decreasing bin packing, exact and compiled: the longest document first, each into the fullest bin that holds it.

Bins are kept in stacks by what is left in them, and a bitmap over the stacks finds the smallest that is large enough
within a few machine words; documents are ordered by a counting sort: O(n + capacity). 15 to 30 M documents a second on
one core, 28 bytes each; bins are filled at 200 M tokens a second. The first process on a machine compiles for 2.5 s, later
ones load the code in 0.7 s.

A corpus larger than memory is packed in windows, each on its own. Log-normal lengths (median 200 tokens) in windows of
16 M tokens use 99.976 % of bins of 1k tokens, 99.981 % of 4k and 99.854 % of 32k; in one window 99.980, 99.997 and 99.995.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from graft.core.errors import DataError
from graft.data.compiled import compiled


class Bins(NamedTuple):
    """Which documents are packed together: bin b holds order[ends[b] : ends[b + 1]], ascending."""

    order: np.ndarray  # [documents] int64, indices
    ends: np.ndarray  # [bins + 1] int64

    def between(self, first: int, last: int) -> Bins:
        """Bins first .. last - 1, or to the end where there are fewer."""
        ends = self.ends[first : last + 1]
        return Bins(self.order[ends[0] : ends[-1]], ends - ends[0])


def pack(lengths: np.ndarray, capacity: int) -> Bins:
    """Every index into `lengths` in exactly one bin, no bin over `capacity`; a function of the lengths alone.

    Of equally full bins the one filled last is taken. Raises DataError for a length outside 1 .. capacity.
    """
    sizes = np.ascontiguousarray(lengths, dtype=np.int64)
    if sizes.size and not (sizes.min() >= 1 and sizes.max() <= capacity):
        raise DataError(f"a document of {int(sizes.max() if sizes.max() > capacity else sizes.min())} tokens fits no bin of {capacity}")
    return Bins(*_by_bin(*_best_fit(sizes, capacity)))


def alone(documents: int) -> Bins:
    """A bin for every document."""
    return Bins(np.arange(documents), np.arange(documents + 1))


def pieces(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length), int64 [pieces] each: documents cut every `capacity` tokens, in order; an empty one gives none."""
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = -(-lengths // capacity)
    document = np.repeat(np.arange(lengths.size), counts)
    start = (np.arange(document.size) - np.repeat(np.cumsum(counts) - counts, counts)) * capacity
    return document, start, np.minimum(lengths[document] - start, capacity)


def fill(
    ids: np.ndarray, mask: np.ndarray, starts: np.ndarray, lengths: np.ndarray, bins: Bins, seq_len: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """The bins' tokens (input_ids [bins, seq_len] int32, loss_mask [bins, seq_len] uint8), `pad` and 0 behind the last document.

    ids int32 and mask uint8 are [tokens]; document i is ids[starts[i] : starts[i] + lengths[i]]. Raises ValueError for a
    document outside `ids`, and for a bin of more than `seq_len` tokens.
    """
    starts, lengths = np.ascontiguousarray(starts, dtype=np.int64), np.ascontiguousarray(lengths, dtype=np.int64)
    ids, mask = np.ascontiguousarray(ids, dtype=np.int32), np.ascontiguousarray(mask, dtype=np.uint8)
    if starts.size and (starts.min() < 0 or lengths.min() < 0 or (starts + lengths).max() > min(ids.size, mask.size)):
        raise ValueError(f"a document reaches outside the {ids.size} tokens, or the {mask.size} of the mask")
    shape = bins.ends.size - 1, seq_len
    input_ids, loss_mask = np.empty(shape, np.int32), np.empty(shape, np.uint8)
    if not _fill(ids, mask, starts, lengths, *bins, pad, input_ids, loss_mask):
        raise ValueError(f"a bin holds more than {seq_len} tokens")
    return input_ids, loss_mask


# ---- compiled ---------------------------------------------------------------------------------------------------------
# The lowest set bit's number by a de Bruijn sequence (Leiserson et al. 1998, http://supertech.csail.mit.edu/papers/debruijn.pdf)
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT = np.zeros(64, np.int64)
for _i in range(64):
    _BIT[((1 << _i) * 0x03F79D71B4CB0A89 & (1 << 64) - 1) >> 58] = _i
_ONE, _TOP = np.uint64(1), np.uint64(58)


@compiled
def _lowest(word):
    """The number of the lowest set bit of a uint64 that is not 0."""
    return _BIT[((word & (~word + _ONE)) * _DE_BRUIJN) >> _TOP]


@compiled
def _next(words, summary, at):
    """The first set bit at or behind `at`, -1 where there is none; bit w of `summary` says that words[w] is not 0."""
    w = at >> 6
    bits = words[w] >> np.uint64(at & 63)
    if bits:
        return at + _lowest(bits)
    w += 1
    s = w >> 6
    if s < summary.size:
        bits = summary[s] >> np.uint64(w & 63) << np.uint64(w & 63)
        while not bits and s + 1 < summary.size:
            s += 1
            bits = summary[s]
        if bits:
            w = (s << 6) + _lowest(bits)
            return (w << 6) + _lowest(words[w])
    return -1


@compiled
def _best_fit(lengths, capacity):
    """(bin of every document [documents] int32, number of bins)."""
    ends = np.zeros(capacity + 2, np.int64)  # ends[size]: where the documents of that size end, the longest first
    for size in lengths:
        ends[size] += 1
    for size in range(capacity, 0, -1):
        ends[size] += ends[size + 1]
    falling = np.empty(lengths.size, np.int32)
    at = ends[1:].copy()  # where the next document of each size goes
    for i in range(lengths.size):
        falling[at[lengths[i]]] = i
        at[lengths[i]] += 1

    bin_of = np.empty(lengths.size, np.int32)
    below = np.empty(lengths.size, np.int32)  # the bin under this one in its stack
    stack = np.full(capacity + 1, -1, np.int32)  # the topmost bin with that many tokens left
    words = np.zeros((capacity >> 6) + 1, np.uint64)  # bit r: stack r is not empty
    summary = np.zeros((words.size >> 6) + 1, np.uint64)
    bins = 0
    for size in range(capacity, 0, -1):
        for i in falling[ends[size + 1] : ends[size]]:
            room = _next(words, summary, size)
            if room < 0:
                room, chosen = capacity, bins
                bins += 1
            else:
                chosen = stack[room]
                stack[room] = below[chosen]
                if below[chosen] < 0:
                    w = room >> 6
                    words[w] &= ~(_ONE << np.uint64(room & 63))
                    if not words[w]:
                        summary[w >> 6] &= ~(_ONE << np.uint64(w & 63))
            bin_of[i] = chosen
            left = room - size
            if left:
                below[chosen] = stack[left]
                stack[left] = chosen
                w = left >> 6
                words[w] |= _ONE << np.uint64(left & 63)
                summary[w >> 6] |= _ONE << np.uint64(w & 63)
    return bin_of, bins


@compiled
def _by_bin(bin_of, bins):
    """`Bins` of the bin of every document."""
    ends = np.zeros(bins + 1, np.int64)
    for b in bin_of:
        ends[b + 1] += 1
    for b in range(bins):
        ends[b + 1] += ends[b]
    order, at = np.empty(bin_of.size, np.int64), ends[:-1].copy()
    for i in range(bin_of.size):
        b = bin_of[i]
        order[at[b]] = i
        at[b] += 1
    return order, ends


@compiled
def _fill(ids, mask, starts, lengths, order, ends, pad, input_ids, loss_mask):
    """False where a bin overflows."""
    seq_len = input_ids.shape[1]
    for b in range(input_ids.shape[0]):
        row, row_mask = input_ids[b], loss_mask[b]
        at = 0
        for i in order[ends[b] : ends[b + 1]]:
            shift = starts[i] - at
            end = at + lengths[i]
            if end > seq_len:
                return False
            for t in range(at, end):  # slices would take 3 s to compile
                row[t] = ids[t + shift]
                row_mask[t] = mask[t + shift]
            at = end
        for t in range(at, seq_len):
            row[t] = pad
            row_mask[t] = 0
    return True
