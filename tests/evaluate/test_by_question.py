"""Questions that repeat: the share of the commonest wanted answer beside each system's, counted by hand."""

from graft.evaluate.by_question import MOST, by_question, lines
from graft.evaluate.metrics import same


def row(question, wanted, image=None):
    content = [{"type": "image", "file": image}, {"type": "text", "text": question}] if image else question
    return {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": content}], "wanted": wanted}


ROWS = [row("What?", "a Cat", "1.png"), row("How many?", "2", "1.png"), row("What?", "dog", "2.png"), row("What?", "a cat."), row("How many?", "2.0")]


def test_majority_and_shares_counted_by_hand():
    shares = {"adapter": [[1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0]], "base": [[0.0] * 5] * 2}
    found = by_question(ROWS, shares, same)
    assert found == [
        {"question": "What?", "rows": 3, "majority": 0.666667, "adapter": 0.5, "base": 0.0},
        {"question": "How many?", "rows": 2, "majority": 1.0, "adapter": 0.5, "base": 0.0},
    ]
    told = lines(found)
    assert told[0].split() == ["right,", "by", "question", "rows", "majority", "adapter", "base"]
    assert told[1].split() == ["What?", "3", "0.667", "0.500", "0.000"] and len({len(line) for line in told}) == 1


def test_what_does_not_repeat_or_is_too_much_is_left_out():
    alone = [row(f"{n}?", "a") for n in range(3)]
    many = [row(f"{n}?", "a") for n in range(MOST + 1)] * 2
    for rows in (alone, many):
        assert by_question(rows, {"model": [[0.0] * len(rows)]}, same) == []
    most = many[:MOST] * 2
    assert len(by_question(most, {"model": [[0.0] * len(most)]}, same)) == MOST
