"""Fingerprints of texts: a key that equal texts share, and MinHash signatures whose agreement estimates Jaccard similarity.

A text is compared as its sequence of words (normal.py). Its shingles are n-grams of characters where at least half of its
letters belong to scripts written without spaces, else of words; a shorter text is one shingle. Signatures: Broder 1997,
https://doi.org/10.1109/SEQUEN.1997.666900; candidates by bands: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets,
section 3.4, http://infolab.stanford.edu/~ullman/mmds/ch3.pdf. Integer arithmetic alone, so the same on every machine.
With 128 permutations one core fingerprints 120,000 Chinese texts of 320 characters or 45,000 English ones of 1,200 a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np

from graft.core.sections import Dedup
from graft.data.compiled import compiled
from graft.data.normal import DIGIT, LETTER, LONE, MARK, Normalised, groups, kinds, normalised

MISS = 0.05  # of the pairs at the threshold, the share that no band may find


def exact_key(text: str) -> bytes:
    """16 bytes that two texts share where they are equal as sequences of words."""
    return _keys(normalised([text], "words"))


def signatures(texts: Sequence[str], dedup: Dedup) -> np.ndarray:
    """[texts, permutations] uint32. Two texts agree in each column with the probability of their Jaccard similarity.

    A text without any word has the largest number in each column.
    """
    out = np.empty((len(texts), dedup.permutations), np.uint32)
    for start, end in groups(texts):
        _fill(normalised(texts[start:end], "words"), dedup, out[start:end])
    return out


def bands_and_rows(permutations: int, threshold: float) -> tuple[int, int]:
    """(bands, rows a band): the most rows of which bands × rows <= permutations misses at most MISS at the threshold.

    A pair of similarity s shares no band with probability (1 - s^rows)^bands. For 128 permutations and 0.8: 18 bands of 7
    rows, which miss 1.5 % at 0.8, 8e-6 at 0.9, and propose 3 % of the pairs at 0.4, which the signatures then refuse.
    """
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if (1 - threshold**rows) ** bands <= MISS:
            return bands, rows
    return permutations, 1


def band_keys(signatures: np.ndarray, threshold: float, bands: range) -> np.ndarray:
    """[len(bands), texts] uint64: texts that share a key of a band are candidates to be `threshold` alike."""
    return _band_keys(signatures, bands.start, bands.stop, bands_and_rows(signatures.shape[1], threshold)[1])


def fingerprints(texts: Sequence[str], dedup: Dedup) -> tuple[np.ndarray, np.ndarray]:
    """(keys [texts, 2] uint64, signatures [texts, permutations] uint32, or [texts, 0] where equal ones alone are sought)."""
    near = dedup.near < 1
    keys = bytearray()
    signed = np.empty((len(texts), dedup.permutations if near else 0), np.uint32)
    for start, end in groups(texts):
        words = normalised(texts[start:end], "words")
        keys += _keys(words)
        if near:
            _fill(words, dedup, signed[start:end])
    return np.frombuffer(keys, np.uint64).reshape(-1, 2), signed


def _keys(words: Normalised) -> bytes:
    data, ends = words.codes.data.cast("B"), (4 * words.ends).tolist()
    return b"".join(hashlib.blake2b(data[start:end], digest_size=16).digest() for start, end in zip([0, *ends], ends, strict=False))


def _fill(words: Normalised, dedup: Dedup, out: np.ndarray) -> None:
    _sign(*words, kinds("words"), dedup.ngram_chars, dedup.ngram_words, *_permutations(dedup.permutations), out)


@cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) uint32 of h -> a h + b mod 2^32, a odd: permutations of the hashes of shingles."""
    numbers = _numbers(2 * count)
    return numbers[:count] | np.uint32(1), numbers[count:]


# ---- compiled ---------------------------------------------------------------------------------------------------------
_BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomials modulo 2^64, and the step of splitmix64
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)


@compiled
def mixed(x):
    """A uint64 whose every bit depends on every bit of x (splitmix64, https://prng.di.unimi.it/splitmix64.c)."""
    x = (x ^ (x >> _30)) * _MIX_1
    x = (x ^ (x >> _27)) * _MIX_2
    return x ^ (x >> _31)


@compiled
def _numbers(count):
    out = np.empty(count, np.uint32)
    x = np.uint64(0)
    for i in range(count):
        x += _BASE
        out[i] = mixed(x) >> _32
    return out


@compiled
def _sign(codes, ends, kinds, ngram_chars, ngram_words, a, b, out):
    """Fill `out` [texts, permutations] with the signatures."""
    longest = start = 0
    for end in ends:
        longest, start = max(longest, end - start), end
    units = np.empty(longest, np.uint64)
    start = 0
    for text in range(ends.size):
        end = ends[text]
        letters = lone = 0
        for i in range(start, end):
            kind = kinds[codes[i]]
            lone += kind == LONE
            letters += kind in (LONE, LETTER)
        if letters and 2 * lone >= letters:
            size, n = _characters(codes[start:end], units), ngram_chars
        else:
            size, n = _words(codes[start:end], kinds, units), ngram_words
        _minima(units[:size], n, a, b, out[text])
        start = end


@compiled
def _characters(codes, units):
    size = 0
    for code in codes:
        if code != 32:
            units[size] = code
            size += 1
    return size


@compiled
def _words(codes, kinds, units):
    """The hash of each word in `units`, returns how many."""
    size, word, open_ = 0, np.uint64(0), False
    for code in codes:
        kind = kinds[code]
        if kind in (LETTER, DIGIT, MARK):
            word = word * _BASE + np.uint64(code)
            open_ = True
            continue
        if open_:
            units[size] = mixed(word)
            size, word, open_ = size + 1, np.uint64(0), False
        if code != 32:
            units[size] = mixed(np.uint64(code))
            size += 1
    if open_:
        units[size] = mixed(word)
        size += 1
    return size


@compiled
def _minima(units, n, a, b, out):
    """The smallest a h + b over the hashes h of all n-grams of `units`, for each (a, b)."""
    out[:] = np.uint32(0xFFFFFFFF)
    n = min(n, units.size)
    if n == 0:
        return
    power, gram = np.uint64(1), np.uint64(0)  # power: of what leaves the window
    for i in range(n):
        gram = gram * _BASE + units[i]
        power *= _BASE
    for i in range(n, units.size + 1):
        h = np.uint32(mixed(gram) >> _32)
        for p in range(a.size):
            out[p] = min(out[p], np.uint32(a[p] * h + b[p]))
        if i < units.size:
            gram = gram * _BASE + units[i] - power * units[i - n]


@compiled
def _band_keys(signatures, first, last, rows):
    out = np.empty((last - first, signatures.shape[0]), np.uint64)
    for text in range(signatures.shape[0]):
        for band in range(first, last):
            key = np.uint64(band)
            for p in range(band * rows, (band + 1) * rows):
                key = mixed(key * _BASE + np.uint64(signatures[text, p]))
            out[band - first, text] = key
    return out
