"""Images to rows: every request is accepted or rejected, made lazily, answered in order; the schema holds."""

import itertools
import json
import re
import tracemalloc

import pytest

from graft.core.errors import ConfigError
from graft.core.json_schema import read_schema
from graft.core.recipe import Recipe
from graft.core.rows import read_jsonl
from graft.data.api.request import Answer
from graft.data.augment.images import Picture
from graft.data.augment.vqa import foreseen, make_rows

SCHEMA = {
    "type": "object",
    "properties": {"animal": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["animal", "count"],
    "additionalProperties": False,
}


def recipe(api=None, augment=None, **images):
    tree = {"prompts": ["這是什麼？"], "folder": "photos", **images}
    return Recipe.model_validate({"name": "eyes", "seed": 7, "api": {"model": "m", **(api or {})}, "augment": {"images": tree, **(augment or {})}})


def picture(n, prompt=None, system=None, sha=None):
    sha = sha or f"{n:064x}"
    return Picture(f"photos/{n}.jpg", sha, sha, 10, 10, 100, prompt, system)


def completion(content, **choice):
    return {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}, **choice}]}


class Model:
    """An `ask` that answers by a function of the request; `asked` holds (title, request) in order, at most `ahead` unanswered."""

    def __init__(self, answer, ahead=4, budget=None):
        self.answer, self.ahead, self.budget, self.asked = answer, ahead, budget, []

    def __call__(self, requests, title):
        requests = iter(requests)
        while chunk := list(itertools.islice(requests, self.ahead)):
            self.asked += [(title, r) for r in chunk]
            for r in chunk:
                if self.budget is not None and len(self.asked) > self.budget:
                    yield Answer(r.key, asked=False, error="budget")
                else:
                    found = self.answer(title, r)
                    yield Answer(r.key, error=found) if isinstance(found, str) else Answer(r.key, found)


def plain(title, request):
    if title == "questions":
        return completion(json.dumps({"questions": ["顏色？", " 顏色? ", "", "how\nmany?", "where?", "who?"]}, ensure_ascii=False))
    return completion(f" {text_of(request)}的回答 ")


def text_of(request):
    return request.body["messages"][-1]["content"][1]["text"]


def rows_of(folder):
    return list(read_jsonl(folder / "rows.jsonl")), list(read_jsonl(folder / "rejected.jsonl"))


def holds(counts):
    for c in (counts, counts["questions"]):
        assert c["requests"] == c["asked"] + c["unasked"] and c["asked"] == c["accepted"] + c["rejected"] == c["accepted"] + sum(
            c["reasons"].values()
        )


def test_given_prompts_become_rows(tmp_path):
    model = Model(plain)
    pictures = [picture(1), picture(2, prompt="幾隻？", system="簡短"), picture(3)]
    api = {"output_limit": "max_completion_tokens", "max_output_tokens": 50, "service_tier": "flex"}
    counts = make_rows(recipe(api, prompts=["這是什麼？", "誰？"], system="看圖"), pictures, model, tmp_path)
    holds(counts)
    rows, rejected = rows_of(tmp_path)
    assert counts["accepted"] == 5 == len(rows) and not rejected and counts["stopped"] == "end"
    assert [(r["source"], r["messages"][1]["content"][1]["text"]) for r in rows] == [
        ("photos/1.jpg", "這是什麼？"),
        ("photos/1.jpg", "誰？"),
        ("photos/2.jpg", "幾隻？"),
        ("photos/3.jpg", "這是什麼？"),
        ("photos/3.jpg", "誰？"),
    ]
    sha = f"{2:064x}"
    key = model.asked[2][1].key
    assert rows[2] == {
        "id": key[:12],
        "messages": [
            {"role": "system", "content": "簡短"},
            {"role": "user", "content": [{"type": "image", "image": f"images/{sha}.jpg", "sha256": sha}, {"type": "text", "text": "幾隻？"}]},
            {"role": "assistant", "content": "幾隻？的回答"},
        ],
        "family": sha,
        "source": "photos/2.jpg",
        "prompt_kind": "given",
        "request": key,
        "parent": None,
    }
    request = model.asked[2][1]
    assert request.body == {
        "model": "m",
        "temperature": 1.0,
        "seed": 7_000_000,
        "max_completion_tokens": 50,
        "service_tier": "flex",
        "messages": [
            {"role": "system", "content": "簡短"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"sha256:{sha}"}}, {"type": "text", "text": "幾隻？"}]},
        ],
    }
    assert request.files == {sha: str(tmp_path / "images" / f"{sha}.jpg")}
    assert not (tmp_path / "questions.jsonl").exists()


def test_a_row_that_a_person_rejected_is_none(tmp_path):
    def made(name, review):
        (tmp_path / name).mkdir()
        counts = make_rows(recipe(prompts=["What is it?", "Where?"]), [picture(1)], Model(plain), tmp_path / name, review=review)
        holds(counts)
        return counts, *rows_of(tmp_path / name)

    _, before, _ = made("before", {})
    counts, after, rejected = made("after", {before[0]["id"]: "reject", before[1]["id"]: "keep", "gone": "reject"})
    assert after == before[1:] and counts["reasons"] == {"rejected by a person": 1} and rejected[0]["request"] == before[0]["request"]


def test_questions_are_made_and_then_asked(tmp_path):
    model = Model(plain)
    pictures = [picture(1, prompt="顏色?"), picture(2), picture(1, prompt="其他？")]
    counts = make_rows(recipe(questions=3), pictures, model, tmp_path)
    holds(counts)
    titles = [title for title, _ in model.asked]
    assert titles == ["questions"] * 2 + ["answers"] * len(titles[2:]), "an image that two lines name is asked for questions once"
    made = model.asked[0][1].body
    assert made["response_format"]["json_schema"]["schema"]["properties"]["questions"] and re.search(r"Write 3 .*顏色\?", text_of(model.asked[0][1]))
    rows, _ = rows_of(tmp_path)
    assert [(r["source"][-5], r["prompt_kind"], r["messages"][0]["content"][1]["text"]) for r in rows] == [
        ("1", "given", "顏色?"),
        ("1", "made", "how\nmany?"),
        ("1", "made", "where?"),
        ("2", "given", "這是什麼？"),
        ("2", "made", "顏色？"),
        ("2", "made", "how\nmany?"),
        ("2", "made", "where?"),
        ("1", "given", "其他？"),
    ]
    assert [r["parent"] for r in rows[4:7]] == [model.asked[1][1].key] * 3 and rows[0]["parent"] is None
    assert counts["repeated"] == 1 and counts["questions"]["accepted"] == 2
    assert [len(q["questions"]) for q in read_jsonl(tmp_path / "questions.jsonl")] == [3, 3]


def test_what_cannot_be_used_is_rejected_by_its_reason(tmp_path):
    broken = {
        2: completion("cut", finish_reason="length"),
        3: completion(None, finish_reason="content_filter"),
        4: completion(None, message={"role": "assistant", "content": None, "refusal": "no"}),
        5: "400 invalid_image",
        6: {"error": {"message": "odd"}},
    }

    def answer(title, request):
        n = int(next(iter(request.files)), 16)
        return broken.get(n) or (completion("nothing here") if title == "questions" and n == 7 else plain(title, request))

    seen = []
    before = [{"image": "photos/x.jpg", "line": None, "reason": "not found"}]
    counts = make_rows(recipe(questions=1), [picture(n) for n in range(1, 9)], Model(answer), tmp_path, rejected=before, on_answer=seen.append)
    holds(counts)
    rows, rejected = rows_of(tmp_path)
    assert rejected[0] == before[0] and len(rejected) == 1 + 6 + 5
    assert counts["reasons"] == {"truncated": 1, "filtered": 1, "refused": 1, "failed": 1, "malformed": 1}
    assert counts["questions"]["reasons"] == {"truncated": 1, "filtered": 1, "refused": 1, "failed": 1, "malformed": 2}
    assert {r["source"][-5] for r in rows} == {"1", "7", "8"} and seen.count(True) == len(rows) == counts["accepted"] == 5 and seen.count(False) == 5
    assert all(r["request"] and r["image"] and r["prompt"] and r["reason"] for r in rejected[1:])
    assert "failed: 400 invalid_image" in {r["reason"] for r in rejected[1:]}


@pytest.mark.parametrize("budget", [0, 1, 3, 6, 20])
def test_a_budget_that_ends_loses_nothing(tmp_path, budget):
    pictures = [picture(n) for n in range(1, 5)]
    counts = make_rows(recipe(questions=2), pictures, Model(plain, budget=budget, ahead=1), tmp_path)
    holds(counts)
    assert counts["stopped"] == ("end" if budget == 20 else "budget")
    assert counts["asked"] + counts["questions"]["asked"] == min(budget, 4 + 4 * 3)
    assert len(rows_of(tmp_path)[0]) == counts["accepted"] and not rows_of(tmp_path)[1]


@pytest.mark.parametrize("form", ["json_schema", "json_object", "none"])
def test_answers_by_a_schema_are_compact_json(tmp_path, form):
    answers = ['```json\n{"animal": "貓", "count": 2}\n```', '{"animal": "cat"}', "a cat"]
    model = Model(lambda _t, r: completion(answers[int(next(iter(r.files)), 16)]))
    counts = make_rows(recipe({"response_format": form}), [picture(n) for n in range(3)], model, tmp_path, SCHEMA)
    holds(counts)
    rows, _ = rows_of(tmp_path)
    assert [r["messages"][-1]["content"] for r in rows] == ['{"animal":"貓","count":2}']
    assert counts["reasons"] == {"wrong schema": 1, "malformed": 1}
    body, text = model.asked[0][1].body, text_of(model.asked[0][1])
    assert body.get("response_format", {}).get("type", "none") == form
    assert ('"animal"' in text) is (form != "json_schema"), "a server that takes no schema is told it in words"
    assert rows[0]["messages"][0]["content"][1]["text"] == "這是什麼？", "but the row holds the prompt alone"


def test_answers_out_of_turn_or_missing_are_an_error(tmp_path):
    def swapped(requests, title):
        return (Answer(r.key, completion("x")) for r in reversed(list(requests)))

    def short(requests, title):
        return (Answer(r.key, completion("x")) for r in list(requests)[:-1])

    for ask, message in ((swapped, "stands where"), (short, "1 requests were taken and not answered")):
        with pytest.raises(ValueError, match=message):
            make_rows(recipe(), [picture(1), picture(2)], ask, tmp_path)


def test_the_same_images_make_the_same_bytes_and_keys_do_not_know_the_folder(tmp_path):
    made = []
    for name, ahead in (("a", 1), ("b", 50)):
        (tmp_path / name).mkdir()
        make_rows(recipe(questions=2), [picture(n) for n in range(20)], Model(plain, ahead), tmp_path / name)
        made.append([(tmp_path / name / f).read_bytes() for f in ("rows.jsonl", "rejected.jsonl", "questions.jsonl")])
    assert made[0] == made[1]


def test_memory_is_flat(tmp_path):
    """10,000 requests through a window of 100 hold no more than 1,000 do, but for 1 kB an image; its requests and answers would be 5."""

    def peak(n):
        pictures = [picture(i) for i in range(n)]
        tracemalloc.start()
        counts = make_rows(recipe(prompts=["a?", "b?"]), pictures, forgetful, tmp_path)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert counts["accepted"] == 2 * n
        return found

    small = peak(500)
    grown = [peak(5_000) - small]
    while grown[-1] >= 4_500 * 1000 and len(grown) < 3:  # what other threads of this process took meanwhile counts too
        grown.append(peak(5_000) - small)
    assert min(grown) < 4_500 * 1000, grown


def forgetful(requests, title):
    requests = iter(requests)
    while chunk := list(itertools.islice(requests, 100)):
        yield from (Answer(r.key, completion("x" * 1000)) for r in chunk)


def test_an_estimate_foresees_every_request(tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(3):
        (tmp_path / "photos" / f"{n}.jpg").write_bytes(b"never read")
    bodies = list(foreseen(recipe(prompts=["a?", "b?"], questions=3), tmp_path, SCHEMA))
    assert len(bodies) == 3 * (1 + 2 + 3) and len({json.dumps(b) for b in bodies}) == 3 * (1 + 2 + 1)
    model = Model(plain)
    make_rows(recipe(prompts=["a?", "b?"], questions=3), [picture(n) for n in range(3)], model, tmp_path)
    assert len(model.asked) == len(bodies)


def test_a_schema_is_checked_when_it_is_read(tmp_path):
    file = tmp_path / "answer.json"
    cases = {
        "[]": "write an object",
        "{": "is no JSON",
        '{"type": "objekt"}': "is no JSON Schema",
        '{"$ref": "#/$defs/gone"}': "refers to '#/\\$defs/gone'",
        '{"properties": {"a": {"$ref": "https://example.com/s.json"}}}': "refers to 'https://example.com/s.json'",
    }
    for text, message in cases.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=message) as e:
            read_schema(file, "key")
        assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_schema(tmp_path / "none.json", "key")
    for good in (
        SCHEMA,
        {"$ref": "#/$defs/a", "$defs": {"a": SCHEMA}},
        {"$id": "https://x.test/s", "$ref": "https://x.test/s#/$defs/a", "$defs": {"a": SCHEMA}},
    ):
        file.write_text(json.dumps(good))
        assert read_schema(file, "key") == good
