"""The novelty gate against comparing every pair: the same rows, faster, and the same in every process."""

import random
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data import grammar
from graft.data.augment.novelty import Gate, jaccard, ngrams, normal

THRESHOLDS = (0.2, 0.5, 0.7, 0.8, 0.9, 0.99)


def sentences(count, seed=0):
    rng = random.Random(seed)
    families = grammar.families()
    return [grammar.row(rng.choice(families), rng)["user"] for _ in range(count)]


def similar_by_pairs(texts, text, threshold):
    return [(i, s) for i, other in enumerate(texts) if (s := jaccard(other, text)) >= threshold]


@pytest.fixture(scope="module")
def pairs():
    """(rows, texts asked about, all 250 x 600 similarities); half of the texts are rows with a few characters changed."""
    rng = random.Random(1)
    kept = sentences(600)
    asked = sentences(125, seed=2)
    for _ in range(125):
        text = rng.choice(kept)
        at = rng.randint(0, len(text))
        asked.append(text[:at] + rng.choice("好嗎請謝") * rng.randint(0, 2) + text[at + rng.randint(0, 2) :])
    return kept, asked, [[jaccard(row, text) for row in kept] for text in asked]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_no_similar_row_is_missed(threshold, pairs):
    """Exact: 0 false negatives and 0 false positives."""
    kept, asked, similarities = pairs
    gate = Gate(threshold)
    for text in kept:
        gate.add(text)
    expected = [[(i, s) for i, s in enumerate(row) if s >= threshold] for row in similarities]
    assert [gate.similar(text) for text in asked] == expected
    print(f"\n{sum(map(len, expected))} similar pairs at {threshold}, 0 missed")
    assert sum(map(len, expected)) >= 10


@settings(deadline=None)
@given(st.lists(st.text("ab好的 ", max_size=12), max_size=12), st.text("ab好的 ", max_size=12), st.floats(0.01, 0.999))
def test_no_similar_row_is_missed_among_short_texts(texts, text, threshold):
    gate = Gate(threshold)
    assert [gate.add(t) for t in texts] == list(range(len(texts)))
    assert gate.similar(text) == similar_by_pairs(texts, text, threshold)


def test_width_case_space_and_punctuation_do_not_count():
    assert normal("ＡＢＣ，你 好！\u200b（１）") == normal("abc你好1") == "abc你好1"
    assert normal("？！") == "?!" != normal("。")
    assert ngrams("好") == ["\0\0好", "\0好\0", "好\0\0"] and len(ngrams("cat")) == 7
    gate = Gate(1.0)
    gate.add("畫一隻貓。")
    assert gate.similar("畫一隻 貓！") == [(0, 1.0)] and gate.similar("畫一隻貓貓") == []
    gate.add("哈哈哈")
    assert gate.similar("哈哈哈哈哈") == [], "at 1 only repeats are refused, though these have the same n-grams"
    loose = Gate(0.99)
    loose.add("哈哈哈")
    assert loose.similar("哈哈哈哈哈") == [(0, 1.0)]


def test_the_measure_by_examples():
    """What the default stands between: another subject in a short sentence is new, another politeness is not."""
    assert jaccard("請幫我畫一隻在海邊散步的柴犬", "請幫我畫一隻在海邊散步的貓") == pytest.approx(0.63, abs=0.01)
    assert jaccard("今天台北的天氣怎麼樣", "今天台中的天氣怎麼樣") == pytest.approx(0.6, abs=0.01)
    assert jaccard("麻煩你把「謝謝你的幫忙」翻譯成英文，感謝", "麻煩你把「謝謝你的幫忙」翻譯成英文") == pytest.approx(0.71, abs=0.01)


def test_another_process_decides_the_same():
    """Python's own hash differs by process; nothing here may depend on it."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_novelty import *\n"
        "gate = Gate(0.5); print([(gate.similar(t), gate.add(t)) for t in sentences(400)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, __file__.rpartition("/")[0]], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 4000


@pytest.mark.campaign
@pytest.mark.parametrize("threshold", [0.7, 0.8])
def test_2000_rows_a_second_with_50000_accepted(threshold):
    gate = Gate(threshold)
    for text in sentences(90_000):
        if len(gate) < 50_000 and not gate.similar(text):
            gate.add(text)
    assert len(gate) == 50_000
    new = sentences(4000, seed=1)
    started = time.process_time()
    for text in new:
        gate.similar(text)
    rate = len(new) / (time.process_time() - started)
    print(f"\n{rate:,.0f} rows/s at threshold {threshold} with {len(gate):,} rows accepted")
    assert rate >= 2000
