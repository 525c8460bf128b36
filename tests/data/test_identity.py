from graft.core.sections import Corpus
from graft.data.corpora import made


def test_the_model_says_its_name_and_author_in_both_languages():
    rows = list(made(Corpus(kind="identity", name="小圖{x}", author="A Team")))
    assert 36 <= len(rows) <= 60
    answers = [row["messages"][1]["content"] for row in rows]
    assert all("小圖{x}" in a or "A Team" in a for a in answers) and not any("{name}" in a or "{author}" in a for a in answers)
    asked = [row["messages"][0]["content"] for row in rows]
    assert len(set(asked)) == len(asked)
    chinese = [q for q in asked if any("一" <= c <= "鿿" for c in q)]
    assert len(chinese) >= 18 and len(asked) - len(chinese) >= 18
    assert len(list(made(Corpus(kind="identity", name="n", author="a", documents=5)))) == 5
