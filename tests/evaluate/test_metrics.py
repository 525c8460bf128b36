"""Scores equal those of rouge-score and sacrebleu; an answer that names nothing is never guessed."""

import json
import random
import subprocess
import sys

import pytest
from sacrebleu import corpus_bleu

from graft.evaluate.metrics import bleu, chosen, equal, final, rouge

WORDS = ["the", "a", "cat", "dog", "sea", "walks", "7", "draws", "over", "and"]
HAN = "幫我畫一隻在海邊散步的柴犬今天天氣如何"
ROUGE = ("rouge1", "rouge2", "rougeL")
REFERENCE = """
import json, sys
from rouge_score.rouge_scorer import RougeScorer
scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
print(json.dumps([{name: found.fmeasure for name, found in scorer.score(b, a).items()} for a, b in json.load(sys.stdin)]))
"""  # in a process of its own: it takes over logging, and closes what it wrote to


def test_rouge_equals_rouge_score_and_of_han_is_that_of_its_characters():
    rng = random.Random(0)
    pairs = [tuple(rng.choices(WORDS, k=rng.randint(0, 30)) for _ in range(2)) for _ in range(200)]
    han = [tuple(rng.choices(HAN, k=rng.randint(1, 30)) for _ in range(2)) for _ in range(200)]
    spelled = [[" ".join(own) for own in pair] for pair in pairs] + [[" ".join(f"w{ord(c)}" for c in own) for own in pair] for pair in han]
    said = subprocess.run([sys.executable, "-c", REFERENCE], input=json.dumps(spelled), capture_output=True, text=True, check=True).stdout
    ours = [rouge(", ".join(a).upper(), " ".join(b)) for a, b in pairs] + [rouge("".join(a), "".join(b)) for a, b in han]
    for found, wanted in zip(ours, json.loads(said), strict=True):
        assert found == pytest.approx(wanted)
    assert rouge("今天 sea", "今天sea") == dict.fromkeys(ROUGE, 1.0)


@pytest.mark.parametrize("han", [False, True])
def test_bleu_equals_sacrebleu(han):
    rng = random.Random(3)
    texts = ["".join(rng.choices(HAN, k=20)) if han else " ".join(rng.choices(WORDS, k=20)) for _ in range(40)]
    answers = [t[: rng.randint(8, len(t))] for t in texts]
    score, half = bleu(answers, texts, resamples=200)
    assert score == corpus_bleu(answers, [texts], tokenize="zh" if han else "13a").score and 0 < half < 20
    assert bleu(texts, texts) == (pytest.approx(100.0), None)


OPTIONS = ["紅色", "藍色", "Green tea", "3"]


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("A", 0), ("(b)", 1), ("C.", 2), ("D) 3", 3), ("B. 藍色", 1), ("藍色", 1), ("藍色。", 1), ("答案是 C", 2), ("The answer is: D", 3), ("２", 1), ("2. 藍色", 1),
        ("3", 3),  # an option's text, before its number
        ("A. 藍色", None), ("E", None), ("", None), ("I do not know", None), ("Blue", None), ("5", None), ("Apple", None), ("紅色或藍色", None),
        ("A dog walks", None), ("2 apples", None), ("C because", None), ("Answer: C because", 2), ("B 藍色", 1), ("A 藍色", None),
        ("1. 紅色\n2. 藍色\n3. Green tea\n4. 3", None), ("A. 紅色 B. 藍色", None), ("A, B, C, D", None), ("1、2、3、4", None), ("The answer is A or B", None),
        ("答案是A或B", None), ("(A) or (B)", None), ("A, not B.", None), ("A. 紅色\nas a rose is", 0), ("D. 3", 3), ("2.5", None), ("1,200", None),
    ],
)  # fmt: skip
def test_an_option_is_read_or_it_is_not(answer, index):
    assert chosen(answer, OPTIONS) == index


def test_the_very_reply_that_was_trained_names_its_option():
    numbers = ["3", "1", "2", "4"]
    assert [chosen(str(n + 1), numbers, ["1", "2", "3", "4"]) for n in range(4)] == [0, 1, 2, 3], "though each is another option's text too"
    assert chosen("1", numbers) == 1 and chosen("D: 4", numbers, "ABCD") == 3 and chosen("1", numbers, "ABCD") == 1
    assert chosen(".5", [".5", "5"]) == 0 and chosen("5", [".5", "5"]) == 1 and chosen("x", ["a", "b"], ["x", "x"]) is None


def test_final_answers():
    pattern = r"####\s*(.+)"
    assert final("so 3\n#### 12\nno, #### 1,250 ", pattern) == "1,250" and final("1,250", pattern) is None
    assert equal("1,250", "1250") and equal("$12.50", "12.5") and equal("１２", "12") and equal("Paris ", "paris.") and not equal("12", "13")
    assert equal(".5", "0.5") and not equal(".5", "5") and equal("-.5", "-0.50") and equal("$.75", "0.75") and not equal("$.75", "75")
    assert equal("5%.", "5") and equal("12。", "12") and equal("12.", "12") and equal("１E3", "1000")
    assert not equal("twelve", "12") and final("x=7", r"\d") == "7"
