import json
import random
import shutil

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.core.errors import DataError
from graft.core.rows import read_jsonl
from graft.data import prepare
from graft.data.prepare import HeldOut, clean, families_held_out, hold_out_rows, normal


def row(n, label="text", family="text-00"):
    return {"id": f"r{n}", "label": label, "family": family}


@given(st.lists(st.text("ab好，A ", max_size=9), max_size=5), st.text("ab好，A ", max_size=40))
def test_contamination_is_what_a_plain_search_finds(sentences, text):
    keys = [k for k in map(normal, sentences) if k]
    wanted = any((k in normal(text)) if len(k) >= HeldOut.HEAD else k == normal(text) for k in keys)
    assert HeldOut(sentences).within(text) == wanted


def test_spelling_does_not_hide_a_test_sentence():
    held = HeldOut(["請幫我畫一隻 Cat！"])
    assert held.within("他說：「請幫我，畫一隻ｃａｔ」然後走了")
    assert not held.within("請幫我畫一隻 dog")


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [("  e\u0301 \r\n b\t\n\n\n\nc ", "é\n b\n\nc"), ("\ufeffa\x00b\u200bc\x7f", "abc"), ("\u3000好\u3000\n", "好"), ("\n \n", "")],
)
def test_clean(raw, wanted):
    assert clean(raw) == wanted == clean(wanted)


def test_families_are_held_out_by_class():
    rows = [row(i, label, f"{label}-{i:02d}") for label, n in (("call", 18), ("text", 3)) for i in range(n)]
    chosen = families_held_out(rows, 0.25, 0)
    assert sorted(f[:4] for f in chosen) == ["call"] * 5 + ["text"], "4.5 and 0.75 families, rounded"
    assert families_held_out(random.Random(1).sample(rows, len(rows)), 0.25, 0) == chosen, "the rows' order does not matter"
    assert families_held_out(rows, 0.25, 1) != chosen
    assert len(families_held_out(rows, 0.0, 0)) == 2 and len(families_held_out(rows, 0.99, 0)) == 19, "at least one, never all"
    with pytest.raises(DataError, match="class 'text' has 1 seed families"):
        families_held_out([r for r in rows if r["label"] == "call"] + [row(0)], 0.25, 0)


def test_validation_rows_are_chosen_by_id():
    rows = [row(i) for i in range(2000)]
    train, held = hold_out_rows(rows, 0.1)
    assert 150 < len(held) < 250 and len(train) + len(held) == 2000
    fewer = hold_out_rows(rows[::2], 0.1)[1]
    assert fewer == [r for r in held if r in rows[::2]], "a row's side does not depend on the others"
    assert [len(x) for x in hold_out_rows(rows[:2], 0.0001)] == [1, 1]
    assert [len(x) for x in hold_out_rows(rows, 0.0)] == [2000, 0]


def outputs(artifact):
    return {name: (artifact.path / name).read_bytes() for name in artifact.manifest["files"]}


def test_the_stage_splits_rejects_and_counts(tmp_path, workspace, ray_local, monkeypatch):
    plan = workspace(tmp_path)
    rows = list(read_jsonl(plan.artifact("augment").path / "rows.jsonl"))
    test = families_held_out(rows, 0.25, 3)
    tested, trained = (next(r for r in rows if (r["family"] in test) == side) for side in (True, False))
    sentence = tested["messages"][0]["content"]

    def variant(name, of, user=None, assistant=None):
        talk = [m["content"] for m in of["messages"]]
        messages = [{"role": "user", "content": user or talk[0]}, {"role": "assistant", "content": assistant or talk[1]}]
        return {**of, "id": name, "messages": messages}

    rows += [
        variant("same", trained),
        variant("same-user", trained, assistant=trained["messages"][1]["content"].replace("}", " }") if trained["label"] == "call" else "另一個回答"),
        variant("leak", trained, user=f"你好，{sentence[:3]} {sentence[3:]}！"),
        variant("malformed", trained, assistant='call("generate_image", {"prompt": '),
        variant("surrogate", trained, user="abc \ud800 def"),
        variant("long", trained, user="長" * 5000),
        {**variant("roles", trained), "messages": trained["messages"][:1]},
    ]
    notes = [
        json.dumps({"text": "a clean note about nothing much"}),
        json.dumps({"text": "a clean note about nothing much  "}),
        json.dumps({"text": f"前文。{sentence}。後文", "more": 1}),
        "{oops",
        json.dumps({"text": " "}),
        b'{"text": "bad \xff"}',
        json.dumps({"text": "x"}),
    ]
    shutil.rmtree(tmp_path)
    plan = workspace(tmp_path, rows, notes)
    prepare.run(plan.resolve("prepare"))
    artifact = plan.artifact("prepare")
    split = {name: list(read_jsonl(artifact.path / "rows" / f"{name}.jsonl")) for name in ("train", "validation", "test")}
    corpora = {name: list(read_jsonl(artifact.path / "corpora" / f"{name}.jsonl")) for name in ("made", "notes")}
    rejected = list(read_jsonl(artifact.path / "rejected.jsonl"))

    assert {r["family"] for r in split["test"]} == test
    assert not test & {r["family"] for name in ("train", "validation") for r in split[name]}
    assert split["validation"] and split["train"]
    assert {r["id"]: r["reason"] for r in rejected if r["source"] == "rows"} == {
        "same": "duplicate",
        "same-user": "duplicate user text",
        "leak": "contaminated",
        "malformed": f"the answer is malformed, the label {trained['label']}",
        "surrogate": "invalid UTF-8",
        "long": "too long",
        "roles": "unbalanced roles",
    }
    reasons = {r["index"]: r["reason"] for r in rejected if r["source"] == "notes"}
    assert reasons == {1: "duplicate", 2: "contaminated", 3: "no JSON", 4: "empty", 5: "invalid UTF-8", 6: "too short"}
    assert corpora["notes"] == [{"text": "a clean note about nothing much", "source": "notes", "index": 0}]

    order = {r["id"]: i for i, r in enumerate(rows)}
    for found in split.values():
        assert [order[r["id"]] for r in found] == sorted(order[r["id"]] for r in found), "rows keep their order"
    assert [d["index"] for d in corpora["made"]] == sorted(d["index"] for d in corpora["made"])

    counts = artifact.counts
    assert counts["rows"]["in"] == len(rows) == counts["rows"]["kept"] + sum(counts["rows"]["rejected"].values())
    assert counts["rows"]["kept"] == sum(map(len, split.values()))
    assert counts["rows"]["test"] == {"call": 10, "text": 10}
    assert counts["families"] == {"train": 6, "test": 2}
    for name, found in corpora.items():
        c = counts["corpora"][name]
        assert (
            c["kept"] == len(found) and c["in"] == c["kept"] + sum(c["rejected"].values()) and c["characters"] == sum(len(d["text"]) for d in found)
        )
    assert counts["corpora"]["made"]["in"] == 120 and sum(counts["rejected"].values()) == len(rejected)

    held = [normal(r["messages"][0]["content"]) for r in split["test"]]
    texts = [d["text"] for found in corpora.values() for d in found] + [
        m["content"] for name in ("train", "validation") for r in split[name] for m in r["messages"]
    ]
    assert not [(h, t) for t in map(normal, texts) for h in held if h in t]

    first = outputs(artifact)
    shutil.rmtree(artifact.path)
    monkeypatch.setattr(prepare, "BLOCK", 7)
    prepare.run(plan.resolve("prepare"))
    assert outputs(plan.artifact("prepare")) == first, "the result does not depend on how the work was cut"


def test_the_first_by_index_is_kept_whatever_the_order_of_arrival():
    items = [("", i, "{}", "too long" if i == 0 else "", bytes(16), bytes([i % 2] * 16), 0) for i in range(6)]
    for order in (items, items[::-1], random.Random(0).sample(items, 6)):
        group = pa.table(dict(zip(prepare.JUDGED.names, zip(*order, strict=True), strict=True)), schema=prepare.JUDGED)
        found = prepare.first_of_each(group)
        assert dict(zip(found["index"].to_pylist(), found["reason"].to_pylist(), strict=True)) == {
            0: "too long",
            1: "",
            2: "duplicate user text",
            3: "duplicate",
            4: "duplicate",
            5: "duplicate",
        }


def test_a_corpus_of_which_nothing_is_left_is_named_and_nothing_is_written(tmp_path, workspace, ray_local):
    plan = workspace(tmp_path, notes=["{}", "[]"])
    with pytest.raises(DataError, match=r"no document of corpus 'notes' is left .*'no \"text\"': 2") as e:
        prepare.run(plan.resolve("prepare"))
    assert "\n" not in str(e.value)
    job = plan.resolve("prepare")
    assert job.artifact is None and not list(job.directory.parent.iterdir())
