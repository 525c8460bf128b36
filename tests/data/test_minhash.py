"""Fingerprints: shingles as a slow reference makes them, estimates as good as theory says, the same numbers everywhere."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.core.sections import Dedup
from graft.data import minhash, normal
from graft.data.minhash import band_keys, bands_and_rows, exact_key, fingerprints, signatures

DATA = Path(__file__).parents[3] / "shared/data"
DEDUP = Dedup()


def shingles(text, dedup):
    """The set of shingles of a text of ASCII letters, Han and spaces, slowly; one of characters is none of words, also where both are one letter."""
    letters = [c for c in text if c != " "]
    if letters and 2 * sum(c >= "一" for c in letters) >= len(letters):
        kind, units, n = "characters", letters, dedup.ngram_chars
    else:
        spaced = "".join(f" {c} " if c >= "一" else c for c in text)
        kind, units, n = "words", spaced.split(), dedup.ngram_words
    n = min(n, len(units))
    return {(kind, *units[i : i + n]) for i in range(len(units) - n + 1)} if n else set()


def jaccard(a, b, dedup=DEDUP):
    x, y = shingles(a, dedup), shingles(b, dedup)
    return len(x & y) / len(x | y)


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.text("ab好壞 ", max_size=14), min_size=2, max_size=8), st.integers(1, 4), st.integers(1, 3))
def test_texts_of_one_set_of_shingles_have_one_signature_and_no_others(texts, chars, words):
    dedup = Dedup(ngram_chars=chars, ngram_words=words, permutations=16)
    found = signatures(texts, dedup)
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            assert (found[i] == found[j]).all() == (shingles(a, dedup) == shingles(b, dedup))


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("size", [20, 400])
def test_the_estimate_is_unbiased_and_its_error_is_the_binomial_one(similarity, size):
    draw = random.Random(size)
    dedup, pairs = Dedup(ngram_words=1), 400
    common = round(size * similarity)
    ours, theirs = [], []
    for _ in range(pairs):
        words = [f"w{n}" for n in draw.sample(range(10**6), size)]
        half = common + (size - common) // 2
        ours.append(" ".join(words[:half]))
        theirs.append(" ".join(words[:common] + words[half:]))
    errors = (signatures(ours, dedup) == signatures(theirs, dedup)).mean(axis=1) - common / size
    expected = math.sqrt(common / size * (1 - common / size) / 128)
    assert abs(errors.mean()) < 4 * expected / math.sqrt(pairs)
    assert 0.85 < errors.std() / expected < 1.15


def test_han_is_compared_by_characters_and_other_text_by_words():
    assert jaccard("今天天氣很好我們去海邊散步", "今天天氣很好我們去山邊散步") == 5 / 13
    assert jaccard("one two three four five six", "one two three four five sex") == 1 / 3
    texts = ["今天，天氣 很好我們", "今天天氣很好！我們", "one, two three four five", "One two\nthree four FIVE!", "onetwo three four five"]
    keys = [exact_key(t) for t in texts]
    assert keys[0] == keys[1] and keys[2] == keys[3] and len(set(keys)) == 3
    found = signatures(texts, DEDUP)
    assert (found[0] == found[1]).all() and (found[2] == found[3]).all() and (found[3] != found[4]).all()


def test_different_texts_without_letters_are_different():
    texts = ["🙂", "🙃", "……", "！！", "a < b", "a > b", "1.5", "15"]
    assert len({exact_key(t) for t in texts}) == len(texts)
    assert len(np.unique(signatures(texts, DEDUP), axis=0)) == len(texts)
    assert (signatures([" \n"], DEDUP) == 0xFFFFFFFF).all()


def test_the_numbers_are_the_same_in_every_process():
    text = "The quick brown fox 跳過那隻懶狗"
    said = "from graft.core.sections import Dedup; from graft.data import minhash as m; t = 'The quick brown fox 跳過那隻懶狗'; "
    said += "s = m.signatures([t], Dedup()); print(m.exact_key(t).hex(), s[0, :3].tolist(), m.band_keys(s, 0.8, range(2))[:, 0].tolist())"
    there = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout.strip()
    here = signatures([text], DEDUP)
    assert there == f"{exact_key(text).hex()} {here[0, :3].tolist()} {band_keys(here, 0.8, range(2))[:, 0].tolist()}"
    assert there == "5a831a1b6ffcee8710cf5d6b22b5ab11 [307043913, 342493696, 1250920854] [2960892418584608483, 14615947654246947709]"


def test_a_band_is_shared_where_its_rows_are_equal():
    draw = np.random.default_rng(0)
    some = draw.integers(0, 3, (300, 12), dtype=np.uint32)
    bands, rows = bands_and_rows(12, 0.5)
    keys = band_keys(some, 0.5, range(bands))
    assert keys.shape == (bands, 300) and keys.dtype == np.uint64
    for band in range(bands):
        parts = some[:, band * rows : (band + 1) * rows]
        assert ((parts[:, None] == parts[None]).all(axis=2) == (keys[band][:, None] == keys[band][None])).all()
    assert len(np.intersect1d(keys[0], keys[1])) == 0, "bands have keys of their own"
    assert (band_keys(some, 0.5, range(2, 5)) == keys[2:5]).all()


@pytest.mark.parametrize(("permutations", "near", "wanted"), [(128, 0.8, (18, 7)), (128, 0.9, (10, 12)), (128, 0.5, (42, 3)), (16, 0.1, (16, 1))])
def test_bands_miss_few_pairs_at_the_threshold(permutations, near, wanted):
    bands, rows = wanted
    assert bands_and_rows(permutations, near) == wanted
    assert rows == 1 or (1 - near**rows) ** bands <= minhash.MISS
    assert (1 - near ** (rows + 1)) ** (permutations // (rows + 1)) > minhash.MISS, "one more row would miss more"


def test_fingerprints_are_what_the_functions_say_however_the_texts_are_grouped(monkeypatch):
    texts = ["一二三四五六七八", "a b c d e f g", "", "x" * 300, "…"] * 3
    keys, signed = fingerprints(texts, DEDUP)
    assert keys.tobytes() == b"".join(map(exact_key, texts)) and (signed == signatures(texts, DEDUP)).all()
    monkeypatch.setattr(normal, "GROUP", 9)
    assert all((found == whole).all() for found, whole in zip(fingerprints(texts, DEDUP), (keys, signed), strict=True))
    assert [(found.shape, found.dtype) for found in fingerprints([], DEDUP)] == [((0, 2), np.uint64), ((0, 128), np.uint32)]
    assert fingerprints(texts, Dedup(near=1))[1].size == 0


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
def test_real_paragraphs_are_judged_as_their_shingles_say():
    articles = json.loads((DATA / "drcd_dev.json").read_text(encoding="utf-8"))["data"]
    texts = [p["context"] for article in articles for p in article["paragraphs"]][:300]
    changed = [t[: len(t) * 9 // 10] + t[: len(t) // 20] for t in texts]
    exact = np.array([jaccard_of_characters(a, b) for a, b in zip(texts, changed, strict=True)])
    estimate = (signatures(texts, DEDUP) == signatures(changed, DEDUP)).mean(axis=1)
    assert np.abs(estimate - exact).max() < 5 * 0.5 / math.sqrt(128) and np.abs(estimate - exact).mean() < 0.04


def jaccard_of_characters(a, b):
    """Of Han text, by the words that normal.py leaves."""
    x, y = ({w[i : i + 5] for i in range(len(w) - 4)} for w in (normal.normalised([t], "words").text(0).replace(" ", "") for t in (a, b)))
    return len(x & y) / len(x | y)
