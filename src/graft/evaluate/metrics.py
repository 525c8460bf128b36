"""What an answer is worth: ROUGE, sacrebleu's BLEU, options and final answers by parsers that never guess.

ROUGE (Lin 2004, https://aclanthology.org/W04-1013) is the F measure over words, of which each Han character is one, and equals rouge-score's, whose
package takes over the process's logging; BLEU (Papineni et al. 2002, https://aclanthology.org/P02-1040) has `zh` tokens where the wanted texts
have Han. An answer that cannot be read counts as such.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from itertools import pairwise

from graft.core.errors import ConfigError

HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
WORD = re.compile(r"[^\W_]+")
MARKED = re.compile(r"\W*((?:the )?(?:answer|答案|答)(?: is|是|為|:|：)?)?\W*([A-Za-z]|\d{1,2})(?![A-Za-z\d]|[.,]\d)", re.IGNORECASE)
END = r"\s*(?:$|[.)\]:,、，。】）\n])"  # behind a letter that stands for an option, not for a word
CLOSED, NAMED = re.compile(END), re.compile(rf"(?<![A-Za-z\d])([A-Za-z]|\d{{1,2}})(?={END})")


def words(text: str) -> list[str]:
    """Lower-case words; each Han character is one, as they are written without spaces."""
    return WORD.findall(HAN.sub(lambda m: f" {m[0]} ", unicodedata.normalize("NFKC", text).lower()))


def rouge(answer: str, wanted: str) -> dict[str, float]:
    """F measures from 0 to 1: of words (rouge1) and pairs of them (rouge2) in common, and of the longest common subsequence (rougeL)."""
    a, b = words(answer), words(wanted)
    pairs = [Counter(pairwise(own)) for own in (a, b)]
    return {
        "rouge1": _f((Counter(a) & Counter(b)).total(), len(a), len(b)),
        "rouge2": _f((pairs[0] & pairs[1]).total(), pairs[0].total(), pairs[1].total()),
        "rougeL": _f(common_subsequence(a, b), len(a), len(b)),
    }


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest one, a bit an element of `a` (Hyyrö 2004, Bit-Parallel LCS-length Computation Revisited)."""
    places: dict[str, int] = {}
    for at, element in enumerate(a):
        places[element] = places.get(element, 0) | 1 << at
    all_bits = (1 << len(a)) - 1
    free = all_bits
    for element in b:
        met = free & places.get(element, 0)
        free = ((free + met) | (free - met)) & all_bits
    return len(a) - free.bit_count()


def _f(common: int, said: int, wanted: int) -> float:
    return 2 * common / (said + wanted) if common else 0.0


def bleu(answers: Sequence[str], wanted: Sequence[str], resamples: int = 0) -> tuple[float, float | None]:
    """(BLEU of the whole set, from 0 to 100; half the width of its 95 % interval by so many bootstrap samples)."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as e:
        raise ConfigError(f"BLEU needs sacrebleu ({e}): pip install 'graft[evaluate]'") from None
    metric = BLEU(tokenize="zh" if any(map(HAN.search, wanted)) else "13a")
    found = metric.corpus_score(list(answers), [list(wanted)], n_bootstrap=resamples or 1)
    return float(found.score), float(found._ci) if resamples else None


def chosen(answer: str, options: Sequence[str], replies: Sequence[str] = ()) -> int | None:
    """Which option an answer names, from 0: by being the reply that one would be, or its text, or by the letter or number that it begins with. None
    where it names no option, or two, as whoever says the whole list does."""
    plain = unicodedata.normalize("NFKC", answer).strip()
    said = {i for i, reply in enumerate(replies) if _same(plain, reply)} or {i for i, option in enumerate(options) if _same(plain, option)}
    if not said and (mark := MARKED.match(plain)):
        index, rest = _place(mark[2]), plain[mark.end() :]
        said = {i for i, option in enumerate(options) if _same(rest.strip(" .:)、，。]】）"), option)}
        if said != {index} and {_place(other) for other in NAMED.findall(rest)} & set(range(len(options))) - {index}:
            return None
        if mark[1] or CLOSED.match(rest) or said == {index}:
            said |= {index}
        elif said:
            return None
    return said.pop() if len(said) == 1 and min(said) in range(len(options)) else None


def _place(mark: str) -> int:
    return int(mark) - 1 if mark.isdigit() else ord(mark.upper()) - ord("A")


def _same(a: str, b: str) -> bool:
    return a.strip().rstrip(" .。") == unicodedata.normalize("NFKC", b).strip().rstrip(" .。")


def final(reply: str, pattern: str) -> str | None:
    """The final answer of a reply: the pattern's last match, its first group where it has one; None where it does not match."""
    found = list(re.finditer(pattern, reply))
    if not found:
        return None
    return (found[-1][1] if found[-1].re.groups else found[-1][0]).strip()


def equal(answer: str, wanted: str) -> bool:
    """Whether two final answers are the same number, or else the same text but for case, width and spaces."""
    return same(answer) == same(wanted)


def same(answer: str) -> Decimal | str:
    """What an answer has in common with all that are equal to it."""
    number = _number(answer)
    return _folded(answer) if number is None else number


def _number(text: str) -> Decimal | None:
    try:
        found = Decimal(unicodedata.normalize("NFKC", text).strip().lstrip("$€£% ").rstrip("$€£%.。 ").replace(",", ""))
    except InvalidOperation:
        return None
    return found if found.is_finite() else None


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .。")
