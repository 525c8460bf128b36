"""The reading part, called directly: records to documents, each kept or rejected with a reason."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graft.core.errors import DataError
from graft.core.rows import read_jsonl, write_jsonl
from graft.core.sections import Clean, Corpus, Decontaminate, Dedup, Mcq
from graft.data import reading
from graft.data.decontaminate import Gate
from graft.data.dedup import KEYS, SIGNATURES
from graft.data.readers.files import pieces
from graft.data.readers.layouts import to_messages
from graft.data.reading import read_pieces, runs, write_evaluation_texts
from graft.data.sources import _together

EXAM = "What is the weight of a cubic metre of dry snow that has just fallen on the hill behind the old school?"


@pytest.fixture
def read(tmp_path):
    """read(records, layout, **corpus): (texts, rejected, report) of a JSONL file with these records, or of `file`."""

    def run(records, layout="text", file=None, **corpus):
        gate, folder = tmp_path / "gate.jsonl", tmp_path / "out"
        if file is None:
            file = tmp_path / "in.jsonl"
            file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
        write_jsonl(gate, [{"text": EXAM}])
        folder.mkdir()
        spec = {
            "corpus": Corpus(path="in.jsonl", **corpus).model_dump(mode="json"),
            "layout": layout,
            "pieces": [list(p) for p in pieces(file)],
            "gate": str(gate),
            "decontaminate": Decontaminate().model_dump(mode="json"),
            "dedup": Dedup().model_dump(mode="json"),
        }
        report = read_pieces(json.loads(json.dumps(spec)), folder)
        table = pq.read_table(folder / "documents.parquet")
        assert report["documents"] == table.num_rows and report["characters"] >= 0
        return table, list(read_jsonl(folder / "rejected.jsonl")), report

    return run


def test_a_long_text_becomes_documents_and_every_record_is_accounted_for(read):
    sentence = "這是一個很長的句子，說的是海邊的風景和人。"
    records = [{"text": sentence * 20}, {"text": "太短"}, {"text": None}, {"body": 1}, "{oops", {"text": f"so: {EXAM.upper()} " + "and more. " * 5}]
    table, rejected, report = read(records, clean=Clean(max_chars=200))
    texts = table["text"].to_pylist()
    assert "".join(texts) == sentence * 20 and max(map(len, texts)) <= 200 and set(table["number"].to_pylist()) == {0}
    assert [r["number"] for r in rejected] == [1, 2, 3, 4, 5] and rejected[0]["reason"] == "too short"
    assert rejected[-1]["reason"] == "contaminated" and rejected[-1]["file"] == "in.jsonl"
    assert report["records"] == 6 and sum(report["rejected"].values()) == len(rejected) and report["changed"]["segment.documents"] == 1


def test_a_record_nested_too_deep_to_be_shown_is_rejected_like_any_other(read):
    deep = '{"text": null, "x": ' + "[" * 1000 + "]" * 1000 + "}"
    table, rejected, _ = read([deep, {"text": "a text"}], clean=Clean(min_chars=2))
    assert table["text"].to_pylist() == ["a text"] and rejected[0]["reason"] == '"text" is null' and rejected[0]["text"] == '["text", "x"]'


def test_a_file_whose_name_is_no_utf8_is_read_like_any_other(read, tmp_path):
    name = tmp_path / os.fsdecode(b"\xb7s.jsonl")
    name.write_text('{"text": null}\n{"text": "a text"}\n')
    assert [len(group) for group in _together(pieces(name))] == [1]
    table, rejected, _ = read([], file=name, clean=Clean(min_chars=2))
    assert table["text"].to_pylist() == ["a text"] and rejected[0]["file"] == "\\xb7s.jsonl"


def test_neighbours_of_one_title_are_one_text(read):
    records = [{"text": f"paragraph {i}", "title": "a" if i < 2 else "b"} for i in range(3)] + [{"text": "alone"}, {"text": "late", "title": "a"}]
    table, _, report = read(records, clean=Clean(min_chars=2, merge_by="title"))
    assert table["text"].to_pylist() == ["paragraph 0\n\nparagraph 1", "paragraph 2", "alone", "late"]
    assert table["number"].to_pylist() == [0, 2, 3, 4] and report["records"] == 5


def test_an_empty_title_is_none_and_a_refused_record_cuts_no_article(read, tmp_path):
    file = tmp_path / "articles.csv"
    file.write_text('title,text\n,first alone\n,second alone\nA,one\nA,""\nB,\nA,two\nB,other\n')
    table, rejected, _ = read([], file=file, clean=Clean(min_chars=2, merge_by="title"))
    assert table["text"].to_pylist() == ["first alone", "second alone", "one\n\ntwo", "other"]
    assert table["number"].to_pylist() == [0, 1, 2, 6] and [(r["number"], r["reason"]) for r in rejected] == [(n, '"text" is empty') for n in (3, 4)]


def test_a_row_group_is_a_thousand_documents_or_fewer_of_many_characters(read, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BATCH_CHARACTERS", 5000)
    texts = [f"a book, {i} " + "word " * (200 if i < 100 else 1) for i in range(2200)]
    table, _, _ = read([{"text": text} for text in texts], clean=Clean(min_chars=2, max_chars=None))
    assert table["text"].to_pylist() == [text.strip() for text in texts]
    meta = pq.read_metadata(tmp_path / "out/documents.parquet")
    groups = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    assert groups[:20] == [5] * 20 and max(groups[20:]) <= 1000 and sum(groups) == 2200


def test_a_documents_file_is_cut_between_row_groups_into_even_runs(tmp_path):
    with pq.ParquetWriter(tmp_path / "d.parquet", reading.COLUMNS, **reading.PARQUET) as out:
        for i in range(40):
            rows = 10 + i % 3
            out.write_table(pa.table([[f"{i} {n} " + "x" * 990 for n in range(rows)], list(range(rows))], schema=reading.COLUMNS))
    whole = runs(tmp_path / "d.parquet", 300_000)
    assert whole == [(range(40), 439)], "up to half as much again is left as it is"
    for text_bytes in (200_000, 50_000, 1):
        found = runs(tmp_path / "d.parquet", text_bytes)
        assert [i for groups, _ in found for i in groups] == list(range(40)) and sum(rows for _, rows in found) == 439
        assert len(found) == min(40, round(439_000 * 1.02 / text_bytes)) and all(rows == sum(10 + i % 3 for i in groups) for groups, rows in found)
        assert max(rows for _, rows in found) * 1000 < text_bytes * 1.5 + 12_000
    pq.ParquetWriter(tmp_path / "empty.parquet", reading.COLUMNS).close()
    assert runs(tmp_path / "empty.parquet", 1) == [(range(0), 0)]


def test_chats_are_compared_by_equality_and_texts_by_likeness(read, tmp_path):
    article = "那天清早，漁船回到港口，碼頭上的人忙著卸貨。" * 10

    def chat(question):
        return {"messages": [{"role": "user", "content": article + question}, {"role": "assistant", "content": "一"}]}

    chats, rejected, _ = read([chat("誰？"), chat("何時？"), {"messages": [{"role": "assistant", "content": "x"}]}], "messages")
    keys, signed = (np.fromfile(tmp_path / f"out/{name}", np.uint32).reshape(2, -1) for name in (KEYS, SIGNATURES))
    assert keys.shape == (2, 4) and signed.shape == (2, 128) and (signed[0] != signed[1]).all()
    assert json.loads(chats["text"][0].as_py()) == chat("誰？")["messages"]
    assert [r["number"] for r in rejected] == [2] and rejected[0]["text"]


def test_evaluation_texts_are_questions_and_texts_once_each(tmp_path):
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "an answer"}]} for q in ("one", "two", "one")]
    write_jsonl(tmp_path / "chats.jsonl", chats)
    (tmp_path / "texts.jsonl").write_text('{"text": "three"}\n{"text": null}\n{oops')
    files = {"messages": tmp_path / "chats.jsonl", "text": tmp_path / "texts.jsonl"}
    sets = [{"corpus": {"path": "x"}, "layout": layout, "pieces": [list(p) for p in pieces(path)]} for layout, path in files.items()]
    (tmp_path / "out").mkdir()
    report = write_evaluation_texts({"texts": ["zero", "two"], "sets": sets, "sent": None}, tmp_path / "out")
    assert report == {"texts": 4, "refused": {'"text" is null': 1, "no JSON": 1}}
    assert [r["text"] for r in read_jsonl(tmp_path / "out/texts.jsonl")] == ["zero", "two", "one", "three"]


@pytest.fixture
def gate(tmp_path):
    """gate(records, layout, **corpus): of an evaluation set with these records."""

    def made(records, layout, **corpus):
        write_jsonl(tmp_path / "set.jsonl", records)
        own = {"corpus": {"path": "set.jsonl", **corpus}, "layout": layout, "pieces": [list(p) for p in pieces(tmp_path / "set.jsonl")]}
        write_evaluation_texts({"texts": [], "sets": [own], "sent": None}, tmp_path)
        return Gate.of_file(tmp_path / "texts.jsonl", Decontaminate())

    return made


def exam(n, **answer):
    article, question = (" ".join(f"{key}{n}{word}" for word in "abcdefghijklmnopqrst") for key in ("told", "asked"))
    return {"article": article, "question": question, **{f"option{i}": f"{n} or {i}" for i in range(1, 5)}, **answer}


def talk(*turns):
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]}


@pytest.mark.parametrize(
    ("record", "layout"),
    [(exam(1, answer=None), "mcq"), (exam(1), "mcq"), (exam(1, answer="none of them"), "mcq"), (talk(exam(1)["article"]), "messages")],
)
def test_questions_without_answers_are_kept_out_of_training_too(gate, record, layout):
    assert gate([record], layout).hits([f"so: {exam(1)['article']}!", exam(2)["article"]]).tolist() == [True, False]


def test_a_set_that_protects_nothing_is_one_line(gate):
    with pytest.raises(DataError, match=r"^set.jsonl: no question and no text .* \(refused: {'unbalanced roles': 2}\): mend the file") as e:
        gate([talk(), talk()], "messages")
    assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="refused: nothing, it is empty"):
        gate([], "text")


def test_a_prompts_template_is_no_evaluation_text(gate):
    mcq = Mcq(
        prompt="Read the following article with care and then answer the question by giving the letter alone.\n{article}\nAsked is: {question}\n{options}"
    )
    short = {"article": "The ferry to Penghu left at dawn.", "question": "When did the ferry leave?", "option1": "at noon"}
    found = gate([exam(1, answer=1), exam(2, answer=2) | short], "mcq", mcq=mcq.model_dump())
    training = [exam(3, answer=3), exam(1, answer=1), exam(4, answer=3) | short]
    assert found.hits([to_messages(r, "mcq", mcq)[0][0]["content"] for r in training]).tolist() == [False, True, True]


def test_short_turns_of_a_conversation_are_sought_in_no_other_text(gate):
    long = "Explain why the sky over the harbour of Keelung is so often grey in the winter months."
    found = gate(
        [talk(long, "The monsoon.", "Really?", "Yes.", "Continue.", "So."), talk("Who wrote that play?", "He.", "And then?", "He slept.")], "messages"
    )
    assert not found.hits(["The list continues, and it is really long.", "And then? Continue."]).any()
    leaks = [f"{long} Wind. Really? It is.", "Who wrote that play? Another one did. And then? Nothing."]
    assert found.hits(leaks).all(), "the same turns between other answers"
