"""The stage: rows split and rejected, corpora read, compared and counted; what is made once is kept."""

import gzip
import json
import shutil
from collections import Counter

import pyarrow.parquet as pq
import pytest

from graft.core.errors import DataError
from graft.core.rows import read_jsonl
from graft.core.stages import Plan
from graft.data import prepare
from graft.data.normal import normal
from graft.data.seed_rows import families_held_out

ARTICLE = (
    "那天清早，漁船回到港口，碼頭上的人忙著卸貨，孩子們在旁邊看，海風吹得旗子啪啪作響，遠處的燈塔還亮著。"
    "老船長坐在木箱上，數著今天的魚，一邊和鄰居談起三十年前的那場颱風，誰家的屋頂飛了，誰家的狗救了人。"
)


def texts(artifact, corpus):
    return list(prepare.documents(artifact.path, corpus))


def prepared(plan):
    prepare.run(plan.resolve("prepare"))
    return plan.artifact("prepare")


def test_the_stage_splits_rejects_and_counts(tmp_path, workspace, ray_local):
    plan = workspace(tmp_path)
    rows = list(read_jsonl(plan.artifact("augment").path / "rows.jsonl"))
    test = families_held_out(rows, 0.25, 3)
    tested, trained = (next(r for r in rows if (r["family"] in test) == side) for side in (True, False))
    sentence = tested["messages"][0]["content"]
    leak = [{"role": "user", "content": f"你好，{sentence[:3]} {sentence[3:]}！"}, trained["messages"][1]]
    rows += [{**trained, "id": "leak", "messages": leak}, {**trained, "id": "same"}]
    notes = [
        json.dumps({"text": "a clean note about nothing much"}),
        json.dumps({"text": "a clean note about nothing much  "}),
        json.dumps({"text": f"前文。{sentence}。後文", "more": 1}),
        "{oops",
        json.dumps({"text": " "}),
        b'{"text": "bad \xff"}',
        json.dumps({"text": "x"}),
        json.dumps({"text": ARTICLE}),
        json.dumps({"text": ARTICLE.replace("清早", "清晨")}),
    ]
    shutil.rmtree(tmp_path)
    artifact = prepared(workspace(tmp_path, rows, notes))
    split = {name: list(read_jsonl(artifact.path / "rows" / f"{name}.jsonl")) for name in ("train", "validation", "test")}
    rejected = list(read_jsonl(artifact.path / "rejected.jsonl"))

    assert {r["family"] for r in split["test"]} == test and split["validation"] and split["train"]
    assert not test & {r["family"] for name in ("train", "validation") for r in split[name]}
    assert {r["id"]: r["reason"] for r in rejected if r["source"] == "rows"} == {"leak": "contaminated", "same": "duplicate"}
    reasons = {r["number"]: r["reason"] for r in rejected if r["source"] == "notes"}
    assert reasons.pop(3).startswith("no JSON") and reasons.pop(5).startswith("invalid UTF-8")
    assert reasons == {1: "duplicate", 2: "contaminated", 4: '"text" is empty', 6: "too short", 8: "near duplicate"}
    assert texts(artifact, "notes") == ["a clean note about nothing much", ARTICLE]
    clusters = pq.read_table(artifact.path / "clusters.parquet").to_pylist()
    assert sorted(c["kind"] for c in clusters) == ["exact", "near"] and all(c["similarity"] >= 0.8 for c in clusters)

    counts = artifact.counts
    assert counts["rows"]["in"] == len(rows) == counts["rows"]["kept"] + sum(counts["rows"]["rejected"].values())
    assert counts["rows"]["test"] == {"call": 10, "text": 10} and counts["families"] == {"train": 6, "test": 2}
    for name, c in counts["corpora"].items():
        found = texts(artifact, name)
        assert c["documents"] == len(found) and c["records"] == len(found) + sum(c["rejected"].values()), "no document was cut: records balance"
        assert c["characters"] == sum(map(len, found))
    held = [normal(r["messages"][0]["content"]) for r in split["test"]]
    others = [t for name in counts["corpora"] for t in texts(artifact, name)]
    others += [m["content"] for name in ("train", "validation") for r in split[name] for m in r["messages"]]
    assert not [(h, t) for t in map(normal, others) for h in held if h in t]

    first = artifact.digest
    shutil.rmtree(tmp_path)
    assert prepared(workspace(tmp_path, rows, notes)).digest == first


def test_a_corpus_of_which_nothing_is_left_is_named_and_nothing_is_written(tmp_path, workspace, ray_local):
    plan = workspace(tmp_path, notes=['{"text": null}', '{"text": 3}'])
    with pytest.raises(DataError, match=r"nothing is left of corpus 'notes' \(rejected: ") as e:
        prepare.run(plan.resolve("prepare"))
    assert "\n" not in str(e.value)
    job = plan.resolve("prepare")
    assert job.artifact is None and not list(job.directory.parent.iterdir())


def parts_of(plan):
    return {p.name: p.stat().st_ino for p in (plan.root / "data_shards/small/parts/prepare").iterdir()}


def test_an_added_file_is_read_and_the_others_are_not(tmp_path, workspace, ray_local):
    plan = workspace(tmp_path)
    folder = tmp_path / "many"
    folder.mkdir()

    def write(name, start):
        lines = (json.dumps({"text": f"{name} {i} " + "words of one kind " * (i % 50 + 5) + str(i * 7919)}) for i in range(start, start + 4000))
        (folder / name).write_text("\n".join(lines))
        assert (folder / name).stat().st_size > 1 << 20, "a file of a MiB is a part"

    write("a.jsonl", 0)
    write("c.jsonl", 10_000)
    plan = Plan(plan.path, ('corpora.many={path="many", clean={min_chars=2}}', "dedup.near=1.0"), tmp_path)
    first, before = prepared(plan), parts_of(plan)
    write("b.jsonl", 20_000)
    second, after = prepared(plan), parts_of(plan)
    kept = {name for name, inode in after.items() if before.get(name) == inode}
    assert texts(second, "many") == texts(first, "many")[:4000] + texts(second, "many")[4000:8000] + texts(first, "many")[4000:]
    # the new file was read and its documents written; equal keys and clusters are of all files
    assert len(kept) == len(before) - 2 and len(after) == len(before) + 2
    assert second.counts["corpora"]["many"]["files"] == 3


def test_contamination_can_be_refused(tmp_path, workspace, ray_local):
    (tmp_path / "exam.jsonl").write_text(
        json.dumps({"text": "What is the weight of a cubic metre of dry snow that has just fallen on the hill behind the old school?"})
    )
    question = "what is the weight of a cubic metre of dry snow, that has just fallen on the HILL behind the old school"
    notes = [json.dumps({"text": f"Someone asked: {question}? And nobody knew."}), json.dumps({"text": "a clean note"})]
    plan = workspace(tmp_path, notes=notes)
    sets = 'decontaminate={sets=["exam.jsonl"], on_hit="refuse"}'
    with pytest.raises(DataError, match=r"^prepare: contaminated by the evaluation sets: 1 of notes; remove them, or set decontaminate.on_hit"):
        prepared(Plan(plan.path, (sets,), tmp_path))
    artifact = prepared(Plan(plan.path, (sets.replace("refuse", "quarantine"),), tmp_path))
    assert texts(artifact, "notes") == ["a clean note"] and artifact.counts["corpora"]["notes"]["rejected"] == {"contaminated": 1}


def test_a_limit_counts_what_is_left_and_titles_are_one_article(tmp_path, workspace, ray_local):
    notes = [json.dumps({"text": f"paragraph {i} of its article", "title": f"title {i // 3}"}) for i in range(9)]
    plan = workspace(tmp_path, notes=[*notes, notes[0]])
    override = 'corpora.notes={path="notes.jsonl", clean={min_chars=2, merge_by="title"}, documents=2}'
    artifact = prepared(Plan(plan.path, (override,), tmp_path))
    whole = ["\n\n".join(f"paragraph {i} of its article" for i in range(3 * k, 3 * k + 3)) for k in range(3)]
    assert texts(artifact, "notes") == whole[:2]
    assert artifact.counts["corpora"]["notes"]["records"] == 10


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


@pytest.fixture(scope="module")
def many():
    """Records of 3 MiB: prose, some of which is not Unicode, empty, or a copy of what came much earlier."""
    texts = [f'note {i}, "quoted":\n' + " ".join(f"word{i * k % 7919}" for k in range(1, 120)) for i in range(3600)]
    texts[3000:3100], texts[1500:1510] = texts[:100], [""] * 10
    return texts


def write(folder, how, texts):
    lines = "".join(json.dumps({"text": text, "source": "web"}) + "\n" for text in texts)
    rows = "text,source\n" + "".join(f"{quoted(text)},web\n" for text in texts)
    (folder / how).write_bytes({"a.jsonl": lines.encode(), "a.jsonl.gz": gzip.compress(lines.encode(), 1), "a.csv": rows.encode()}[how])


@pytest.mark.parametrize("how", ["a.jsonl.gz", "a.csv"])
def test_a_file_that_cannot_be_cut_beforehand_gives_what_pieces_give(tmp_path, workspace, ray_local, many, how):
    plan, found = workspace(tmp_path), {}
    for name in ("a.jsonl", how):
        write(tmp_path, name, many)
        for limit in ("", ", documents=2000"):
            corpus = f'corpora.many={{path="{name}", clean={{min_chars=2}}{limit}}}'
            artifact = prepared(Plan(plan.path, (corpus, "shard.part_mib=1"), tmp_path))
            files = sorted((artifact.path / "corpora/many").glob("*.parquet"))
            assert len(files) >= 3 and all(sum(map(len, pq.read_table(f)["text"].to_pylist())) < 1.5 * 2**20 for f in files)
            rejected = [row for row in read_jsonl(artifact.path / "rejected.jsonl") if row["source"] == "many"]
            found[name, limit] = (
                texts(artifact, "many"),
                Counter((row["reason"], row["text"]) for row in rejected),
                artifact.counts["corpora"]["many"],
            )
    assert found[how, ""] == found["a.jsonl", ""] and found[how, ", documents=2000"] == found["a.jsonl", ", documents=2000"]
    whole, (some, _, _) = found[how, ""], found[how, ", documents=2000"]
    assert whole[0] == many[:1500] + many[1510:3000] + many[3100:] and some == whole[0][:2000]
    assert whole[2]["rejected"] == {'"text" is empty': 10, "duplicate": 100} and whole[1].total() == 110


def test_after_a_kill_the_pieces_of_a_compressed_file_that_are_there_stay(tmp_path, workspace, ray_local, many):
    plan = workspace(tmp_path)
    write(tmp_path, "a.jsonl.gz", many)
    plan = Plan(plan.path, ('corpora.many={path="a.jsonl.gz", clean={min_chars=2}}', "shard.part_mib=1"), tmp_path)
    first = prepared(plan)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "data_shards/small/parts/prepare").glob("*/part.json")}
    last = max((first.path / "corpora/many").glob("*.parquet"))
    (lost,) = [path for path in parts if (path.parent / "documents.parquet").exists() and last.samefile(path.parent / "documents.parquet")]
    shutil.rmtree(lost.parent)
    shutil.rmtree(first.path)
    assert prepared(plan).digest == first.digest
    assert [path for path, made in parts.items() if path.stat().st_mtime_ns != made] == [lost]
