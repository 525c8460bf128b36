"""Tasks of images: JSON ranked, judged and pretty; what each question shows beside it; the margin over the commonest answer."""

import json
import re
from hashlib import sha256

import pytest

from graft.report.gather import gather
from graft.report.page import page
from graft.report.tasks import QUESTIONS, task

from .made_images import answers, drawing, noise, put, run_in, text, user
from .test_page import HOSTILE, parsed


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def report(plan):
    return gather(plan)


@pytest.fixture(scope="module")
def look(report):
    return next(t for t in report.evaluation.tasks if t.name == "look")


def test_json_is_ranked_by_its_items_and_its_states_are_counted(look):
    assert [int(a.id) for a in look.worst] == [24, 18, 12, 6, 0, 27, 21, 15, 9, 3], "a half of the items, then two thirds"
    assert len(look.best) == 10 and all(a.right is None and "F1 of items 1.000, equal" in a.judged for a in look.best)
    assert look.worst[0].judged == "adapter F1 of items 0.500, not valid, base F1 of items 0.000, unreadable"
    assert look.worst[5].judged.startswith("adapter F1 of items 0.667, valid, ")
    assert look.note.startswith(
        "json, 30 rows, 25 of 30 answers of adapter valid, 0 of 30 answers of adapter unreadable, 0 of 30 answers of base valid"
    )
    assert [row[0] for row in look.means.rows] == ["valid", "F1 of keys", "F1 of items", "equal", "unreadable"]


def test_ties_go_to_what_is_equal_as_a_whole(tmp_path):
    lines = answers(4)["look"][1]
    for n, line in enumerate(lines):
        line["adapter"]["scores"] |= {"item_f1": [1.0], "equal": [float(n == 2)]}
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = task("look", answers(4)["look"][2], tmp_path / "p.jsonl", None)
    assert [a.id for a in found.best] == ["2", "0"] and [a.id for a in found.worst] == ["3", "1"], "all items right, but not equal: not perfect"


def test_json_stands_a_value_a_line_where_it_parses(look):
    answer = look.worst[0]
    sides, said = dict(answer.sides), drawing(24)[1]
    assert sides["wanted"] == json.dumps(said, indent=2) and sides["adapter’s answer"] == json.dumps({"kind": said["kind"]}, indent=2)
    assert (
        sides["base’s answer"] == "I see a drawing." and answer.code and [title for title, _ in answer.sides][1:3] == ["adapter’s answer", "wanted"]
    )


@pytest.mark.parametrize("odd", ['{"a": 1, "a": 2}', "[" * 100_000, '{"a": ', "", "9" * 5000])
def test_json_that_would_be_told_otherwise_is_left_as_it_is(tmp_path, odd):
    (line,) = answers(1)["look"][1]
    (tmp_path / "p.jsonl").write_text(json.dumps({**line, "adapter": {**line["adapter"], "answers": [odd]}}))
    (answer,) = task("look", answers(1)["look"][2], tmp_path / "p.jsonl", None).best
    assert dict(answer.sides)["adapter’s answer"][:1500] == odd[:1500]


def test_an_answer_has_the_images_of_its_question(look, report):
    for found in (look, next(t for t in report.evaluation.tasks if t.name == "name")):
        for answer in (*found.best, *found.worst):
            (picture,) = answer.pictures
            assert picture.data.startswith("data:image/png;base64,") and dict(answer.sides)["prompt"].startswith("system: Look.\n\nuser: [image] ")
            assert picture.alt.startswith("image, 112\u00a0×\u00a0112: ") and picture.alt.split(": ", 1)[1] in dict(answer.sides)["prompt"]
    assert len({a.pictures[0].data for a in look.worst}) == 10


def test_each_question_stands_beside_its_commonest_answer(look, tmp_path):
    assert look.by_question.columns == ("question", "rows", "commonest answer", "adapter", "base", "adapter above it")
    assert look.by_question.rows[0] == ("What is drawn?", "10", "30.0%", "90.0%", "10.0%", "+60.0%") and look.by_question.shares[0] == 0.9
    told = answers(1)["look"][2] | {"by_question": [{"question": "q" * 999, "rows": 2, "majority": 0.5, "adapter": 0.25}] * (QUESTIONS + 3)}
    table = task("look", told, tmp_path / "none", None).by_question
    assert len(table.rows) == QUESTIONS and "3 more" in table.note and len(table.rows[0][0]) < 200 and table.rows[0][3:] == ("25.0%", "", "-25.0%")
    assert task("look", told | {"by_question": None}, tmp_path / "none", None).by_question is None


def test_the_summary_counts_images(plan, report):
    notes = {s.name: s.note for s in report.stages}
    assert notes["shard-sft"].endswith("78.0% used, 1,020 images") and notes["prepare"].endswith(", 22 images")
    artifact = plan.resolve("evaluate").artifact
    counts = {"tasks": {"look": {"item_f1": 0.8}}}
    (artifact.path / "manifest.json").write_text(json.dumps(artifact.manifest | {"counts": counts}))
    try:
        assert gather(plan).verdict == "look item_f1 0.800; trained on 1,020 images"
    finally:
        (artifact.path / "manifest.json").write_text(json.dumps(artifact.manifest))


# ---- the page ---------------------------------------------------------------------------------------------------------
def test_the_page_holds_its_images_itself(report):
    found = parsed(page(report))
    assert len(found.images) == 2 * 20 + 12 and all(image["src"].startswith("data:image/") for image in found.images)
    for said in ("By question", "commonest answer", "adapter above it", "image, 112\u00a0×\u00a0112", "Images of the training data"):
        assert said in found.text, said


def test_hostile_texts_and_names_are_text(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", "planted-key-1")
    bad = HOSTILE + "planted-key-1"
    asked, lines, told = answers(3)["look"]
    asked = [{**q, "messages": [user(0, {"type": "image", "file": bad}, text(bad))]} for q in asked]
    lines = [{**line, "wanted": json.dumps({bad: bad}), "base": {**line["base"], "answers": [bad]}} for line in lines]
    told["by_question"] = [{"question": bad, "rows": 3, "majority": bad, "adapter": None}]
    text_ = page(gather(run_in(tmp_path, 3, look=(asked, lines, told))))
    found = parsed(text_)
    assert {image["alt"] for image in found.images if "[hidden]" in image["alt"]} == {f"image 1 of 2, 112\u00a0×\u00a0112: {HOSTILE}[hidden]"}
    assert "planted" not in text_ and found.text.count(HOSTILE) == 3 * 2 + 1 and "no image's name" in found.text
    assert found.text.count(json.dumps(HOSTILE)[:-1]) == 3 * 2, "a key and a value, as JSON writes them"


def test_a_secret_that_an_image_holds_by_chance_does_not_break_it(plan, report, monkeypatch):
    monkeypatch.setenv("SHORT_KEY", "iVBORw0KGgo")  # how every PNG begins
    assert parsed(page(gather(plan))).images == parsed(page(report)).images


def test_an_altered_image_is_a_line_of_the_page(plan):
    file = plan.resolve("questions").directory / "images" / f"{sha256(drawing(0)[0]).hexdigest()}.png"
    before = file.read_bytes()
    file.write_bytes(b"x" * len(before))
    try:
        text_ = page(gather(plan))
    finally:
        file.write_bytes(before)
    assert len(re.findall("image: altered, ", text_)) == 2 and len(parsed(text_).images) == 2 * 19 + 12


def test_the_worst_images_make_a_page_of_bounded_size(report, tmp_path):
    hard = [noise(n, 330, 330, tmp_path / "noise.png") for n in range(5)]
    small = len(page(report).encode())
    text_ = page(gather(run_in(tmp_path / "large", shown=lambda artifact, n: [put(artifact, data) for data in hard])))
    assert len(parsed(text_).images) == 2 * 20 * 4 + 12 and text_.count("1 more: not shown") == 40
    assert len(text_.encode()) < small + 2 * 20 * 4 * (4 / 3 * 24 * 1024 + 500)
