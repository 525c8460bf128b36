"""Best-fit decreasing bin packing, exact: the longest document first, each into the fullest bin that still holds it.

Bins are kept by what is left in them, so a document costs one binary search over at most `capacity` distinct values:
O(n log n), about 1 M documents a second. The result depends on the lengths alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from graft.core.errors import DataError


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, ascending in each bin; every index in exactly one bin, no bin over `capacity`.

    Raises DataError for a length outside 1 .. capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and not (sizes.min() >= 1 and sizes.max() <= capacity):
        raise DataError(f"a document of {int(sizes.max() if sizes.max() > capacity else sizes.min())} tokens fits no bin of {capacity}")
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins with that many tokens left, the latest last
    rooms: list[int] = []  # the non-empty entries of by_room above 0, ascending
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        at = bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            chosen = by_room[room].pop()
            bins[chosen].append(i)
            if not by_room[room]:
                del rooms[at]
        else:
            room, chosen = capacity, len(bins)
            bins.append([i])
        if left := room - size:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(chosen)
    return [sorted(b) for b in bins]


def split(length: int, capacity: int) -> list[tuple[int, int]]:
    """(start, end) of the consecutive pieces of at most `capacity` tokens that a long document is cut into."""
    return [(start, min(start + capacity, length)) for start in range(0, length, capacity)]
