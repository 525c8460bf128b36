"""The gate finds what a plain search finds, nothing else, however the text is spelt."""

import json
import pickle
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.core.rows import write_jsonl
from graft.core.sections import Decontaminate
from graft.data import decontaminate, normal
from graft.data.decontaminate import SHORT, Gate, Hit
from graft.data.normal import normal as letters

DATA = Path(__file__).parents[3] / "shared/data"
RULE = Decontaminate()
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")


def units(text):
    """[(letters of a unit, is it of a script with spaces)], slowly."""
    out, open_ = [], False
    for c in unicodedata.normalize("NFKC", text).casefold():
        if not c.isalnum():
            open_ = open_ and (unicodedata.category(c)[0] == "M" or unicodedata.category(c) == "Cf")
        elif c >= "\u3000":
            out.append((c, False))
            open_ = False
        elif open_:
            out[-1] = (out[-1][0] + c, True)
        else:
            out.append((c, True))
            open_ = True
    return out


def ngrams(text, rule):
    """(what may not be in a training text, what may not be all of one) of an evaluation text, slowly."""
    found, all_units = set(), units(text)
    for start in range(len(all_units)):
        gram, share = "", 0
        for word, spaced in all_units[start:]:
            gram, share = gram + word, share + (rule.ngram_chars if spaced else rule.ngram_words)
            if share >= rule.ngram_chars * rule.ngram_words and len(gram) >= SHORT:
                found.add(gram)
                break
    whole = letters(text)
    return (found, set()) if found else ({whole}, set()) if len(whole) >= SHORT else (set(), {whole} - {""})


def contaminated(text, evaluation, rule):
    anywhere, alone = (set().union(*some) for some in zip(*(ngrams(e, rule) for e in evaluation), strict=True)) if evaluation else (set(), set())
    return letters(text) in alone or any(gram in letters(text) for gram in anywhere)


SPELT = "ab好1，A \u0301．Ｂ\u200b"


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.text(SPELT, max_size=16), max_size=5), st.lists(st.text(SPELT, max_size=40), max_size=5), st.integers(1, 7), st.integers(1, 4))
def test_the_gate_finds_what_a_plain_search_finds(evaluation, texts, chars, words):
    rule = Decontaminate(ngram_chars=chars, ngram_words=words)
    gate = Gate.of(evaluation, rule)
    assert gate.hits(texts).tolist() == [contaminated(t, evaluation, rule) for t in texts]
    assert len(gate) == len(set().union(*(ngrams(e, rule)[0] for e in evaluation)))
    for text, hit in zip(texts, gate.find(texts), strict=True):
        assert gate.hit(text) == (hit is not None) and gate.first_hit(text) == (hit.ngram if hit else None)
        if hit:
            anywhere, alone = ngrams(evaluation[hit.text], rule)
            assert hit.ngram in letters(text) and hit.ngram in anywhere | alone


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.text("ab好，A ", max_size=9), max_size=5), st.text("ab好，A ", max_size=40))
def test_a_sentence_shorter_than_an_ngram_counts_as_a_whole(sentences, text):
    keys = [k for k in map(letters, sentences) if k]
    wanted = any((k in letters(text)) if len(k) >= SHORT else k == letters(text) for k in keys)
    assert Gate.of(sentences, RULE).hit(text) == wanted


def test_the_first_place_in_the_text_is_named():
    gate = Gate.of(["zzzz", "請幫我畫一隻 Cat！", "abcdefghij" * 4, "no"], RULE)
    assert gate.find(["他說：「請幫我，畫一隻ｃａｔ」然後 ZZZZ", "請幫我畫一隻 dog", "No!", "not", ""]) == [
        Hit("請幫我畫一隻cat", 1),
        None,
        Hit("no", 3),
        None,
        None,
    ]
    assert gate.first_hit("x " + "abcdefghij" * 5) == "abcdefghij" * 4


def test_an_english_sentence_in_a_chinese_document_and_the_other_way_round():
    english = "How many apples does Tom have if he buys three more bags of five apples each"
    chinese = "小明有三袋蘋果，每袋五顆，他又買了兩袋，請問他一共有多少顆蘋果呢？答案是二十五顆。"
    gate = Gate.of([english, chinese], RULE)
    assert gate.hits([f"今天老師出了一題：{english}。同學們都不會。", f"The teacher asked: {chinese[:30]} and left."]).all()
    assert not gate.hits(["今天老師出了一題：How many apples does Tom have? 同學們都不會。", f"The teacher asked: {chinese[:20]} and left."]).any()
    mixed = "請用 Python 寫一個 function，輸入 list of numbers，回傳 the sum of all even numbers，並且加上 type hints"
    assert Gate.of([mixed], RULE).hit(f"題目三。{mixed[:60]}……")


def test_a_hash_that_two_ngrams_share_is_no_hit():
    gate = Gate.of(["one two three four", "five six seven eight"], RULE)
    text = "zero one two three four, five six seven eight nine"
    gate.texts[0] = "another text of the same hash"
    assert gate.find([text]) == [Hit("fivesixseveneight", 1)], "what is behind a false hit is still found"
    gate.texts[1] = "as well"
    assert not gate.hit(text)


def test_many_ngrams_of_one_beginning_and_of_all_lengths():
    draw = random.Random(0)
    begin = "which of the following statements about the history of"
    evaluation = [f"{begin} {' '.join(''.join(draw.choices('abcdefgh', k=draw.randint(1, 30))) for _ in range(9))}" for _ in range(3000)]
    gate = Gate.of(evaluation, RULE)
    clean = f"{begin} nothing at all, {begin} everything, " * 200
    assert not gate.hit(clean)
    assert gate.hits([clean + e for e in evaluation[:50]]).all()


def test_no_evaluation_text_stops_nothing(tmp_path):
    assert not Gate.of([], RULE).hits(["", "abc", "x" * 100]).any()
    assert not Gate.of(["", "…", "🙂"], RULE).hits(["", "…", "🙂"]).any()
    assert Gate.of([], RULE).hits([]).shape == (0,)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "a certain sentence"}])
    gate = Gate.of_file(tmp_path / "texts.jsonl", RULE)
    assert gate.hit("A certain sentence.") and Gate.of_file(tmp_path / "texts.jsonl", RULE) is gate


def test_texts_may_go_by_groups(monkeypatch):
    texts = ["a certain sentence"] * 3 + ["another"] + ["a\ncertain\nsentence"]
    gate = Gate.of(texts[:1], RULE)
    for size in (1, 20, 10**6):
        monkeypatch.setattr(normal, "GROUP", size)
        assert gate.hits(texts).tolist() == [True, True, True, False, True]
    monkeypatch.setattr(decontaminate, "_BATCH", 2)
    assert [hit and hit.text for hit in Gate.of(["x", "y", "z", *texts], RULE).find(texts)] == [3, 3, 3, 6, 3]


def spelt(text, draw):
    """Another spelling: spaces lost, doubled and new lines; half of the characters wide; another case."""
    out = []
    for c in text:
        if c == " ":
            out.append(draw.choice(["", " ", "  ", "\n", "\u3000", " \t"]))
        else:
            c = draw.choice([c, c.upper(), c.lower()])
            out.append(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" and draw.random() < 0.5 else c)
    return "".join(out)


@needs_data
def test_planted_questions_are_all_found_and_no_chinese_paragraph_is_flagged():
    draw = random.Random(7)
    questions = [json.loads(line)["question"] for line in (DATA / "gsm8k_train.jsonl").open(encoding="utf-8")]
    articles = json.loads((DATA / "drcd_dev.json").read_text(encoding="utf-8"))["data"]
    paragraphs = [p["context"] for article in articles for p in article["paragraphs"]]
    gate = Gate.of(questions, RULE)
    assert not gate.hits(paragraphs).any()
    planted = []
    for question in draw.sample(questions, 1000):
        paragraph = draw.choice(paragraphs)
        at = draw.randrange(len(paragraph))
        planted.append(paragraph[:at] + spelt(question, draw) + paragraph[at:])
    found = gate.find(planted)
    assert all(found)
    assert all(hit.ngram in letters(questions[hit.text]) for hit in found)


@needs_data
def test_a_gate_is_small_and_travels():
    questions = [json.loads(line)["question"] for line in (DATA / "gsm8k_train.jsonl").open(encoding="utf-8")]
    gate = Gate.of(questions, RULE)
    packed = pickle.dumps(gate)
    assert len(packed) < 24 * len(gate) + 2 * sum(map(len, questions))
    some = [f"…{q}" for q in questions[::50]] + ["nothing of the kind"]
    assert pickle.loads(packed).find(some) == gate.find(some)
    assert gate.hits(some).sum() == len(some) - 1
