"""Personal data: what is masked, what only looks like it."""

import random

import pytest

from graft.data.cleaning.masking import is_card, is_taiwan_id, mask

ALL = ("email", "phone", "id")


@pytest.mark.parametrize(
    ("text", "wanted", "kind"),
    [
        ("請寄wang.da-ming+1@mail.example.com.tw。", "請寄<EMAIL>。", "email"),
        ("手機0912-345-678、", "手機<PHONE>、", "phone"),
        ("0912345678", "<PHONE>", "phone"),
        ("電話:(02) 2345-6789轉12", "電話:<PHONE>", "phone"),
        ("電話（０２）", "電話（０２）", None),
        ("（02）2345-6789 分機 305", "<PHONE>", "phone"),
        ("02-23456789 或", "<PHONE> 或", "phone"),
        ("037-123456", "<PHONE>", "phone"),
        ("+886 2 2345 6789", "<PHONE>", "phone"),
        ("+886-912-345-678", "<PHONE>", "phone"),
        ("call +49 (30) 1234567.", "call <PHONE>.", "phone"),
        ("(415) 555-0123 or 415-555-0123", "<PHONE> or <PHONE>", "phone"),
        ("0800-123-456", "<PHONE>", "phone"),
        ("身分證A123456789號", "身分證<ID>號", "id"),
        ("居留證 A800000014", "居留證 <ID>", "id"),
        ("card 4111 1111 1111 1111, 4111-1111-1111-1111, 378282246310005", "card <ID>, <ID>, <ID>", "id"),
    ],
)
def test_masked(text, wanted, kind):
    result, counts = mask(text, ALL)
    assert result == wanted and set(counts) == ({kind} if kind else set())
    assert mask(result, ALL) == (result, {})
    assert sum(counts.values()) == wanted.count("<")
    if kind:
        assert mask(text, [k for k in ALL if k != kind])[0] == text or kind == "id"


@pytest.mark.parametrize(
    "text",
    [
        "2008-11-04 12:30，1,234,567.89 元，第 0912 號",
        "ISBN 978-986-123-456-7，統編 12345678",
        "A123456788 B000000000 型號 X200 4111 1111 1111 1112",  # check digits are wrong
        "@someone a@b 五十二% 3.14159265358979",
        "<<48/2=24>>24 clips, $1500000 in 2008-2009",
        "+1 +2 = +3, 52+123, +12 34 5",
    ],
)
def test_what_looks_like_it_stays(text):
    assert mask(text, ALL) == (text, {})


def test_check_digits_accept_one_number_in_ten():
    rng = random.Random(0)
    codes = [f"{rng.choice('ABFKZIO')}{rng.choice('1289ABCD')}{rng.randrange(10**8):08d}" for _ in range(3000)]
    assert 200 < sum(map(is_taiwan_id, codes)) < 400
    for code in filter(is_taiwan_id, codes):
        assert not any(is_taiwan_id(code[:-1] + d) for d in "0123456789" if d != code[-1]), "one digit changed"
    assert is_card("4111111111111111") and not is_card("4111111111111112") and not is_card("0000000000000000")
    # a card number stays one with all its other check digits refused
    assert [d for d in "0123456789" if is_card(f"401288888888188{d}")] == ["1"]
