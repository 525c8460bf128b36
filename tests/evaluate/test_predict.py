"""Predictions of an adapter that has really learned its answers, asked through the command line."""

import csv
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from itertools import count

import pytest
import torch

from graft.cli import main
from graft.core.recipe import Lora
from graft.core.rows import read_jsonl
from graft.data.prompts import source
from graft.engine.protocol import Request
from graft.evaluate.metrics import chosen
from graft.evaluate.predict import AHEAD, Predictor, sentences
from graft.model.base import load_base
from graft.model.chat import load_tokenizer, render, render_prompt, save_tokenizer
from graft.model.lora import inject, save_adapter

from ..train.small import small_plan

CALL = 'call("generate_image", {"prompt": "d"})'
ASKED = {"draw d": CALL, "draw x": 'call("generate_image")', "hi": "yo"}
OPTIONS = {f"option{n}": text for n, text in enumerate(["red", "blue", "green", "grey"], 1)}
NAMED = {"q1": "A", "q2": "D. grey", "q3": "blue", "q4": "none of it"}  # what each question was trained to be answered with
ANSWERS = {"q1": "1", "q2": "4", "q3": "2", "q4": ""}
MORE = """
[evaluate]
max_new_tokens = 60
batch_size = 2
[evaluate.tasks.exam]
kind = "choice"
path = "exam.jsonl"
mcq = { prompt = "{question}{options}", option = "{text}", reply = "{letter}" }
[evaluate.tasks.sums]
kind = "exact"
path = "sums.jsonl"
"""
LORA = Lora(r=16, alpha=32)


def question(name, **more):
    return {"article": "a", "question": name, **OPTIONS, **more}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A recipe whose adapter knows ASKED and NAMED by heart, and one sum."""
    root = tmp_path_factory.mktemp("predict")
    small_plan(root)
    (root / "small.toml").write_text((root / "small.toml").read_text() + MORE)
    (root / "exam.jsonl").write_text(json.dumps(question("q1", answer="A")) + "\n")
    (root / "sums.jsonl").write_text(json.dumps({"question": "2+2", "answer": "#### 4"}) + "\n")
    base = str(root / "base")
    model = load_base(base, None, "fp32", "cpu")
    model.config.max_position_embeddings = 128
    with torch.no_grad():
        for p in model.parameters():
            p *= 8 if p.dim() == 2 else 1  # larger than a fresh model's, or an adapter could decide nothing
    model.save_pretrained(base)
    plan = small_plan(root, "sft.lora={r=16, alpha=32}")
    tokenizer = load_tokenizer(base, None, "chatml")
    options = "\n".join(OPTIONS.values())
    known = {**ASKED, **{f"{name}{options}": reply for name, reply in NAMED.items()}, "2+2": "so #### 4", "3+3": "six"}
    inject(model, LORA, torch.float32, 0)
    learn(model, [render(tokenizer, [{"role": "user", "content": q}, {"role": "assistant", "content": a}]) for q, a in known.items()])
    with plan.resolve("sft").writing() as draft:
        save_adapter(model, LORA, draft.path, base)
        save_tokenizer(tokenizer, draft.path)
    return plan


def learn(model, rows):
    """Until each supervised token is the likeliest, and by far."""
    longest = max(len(r.ids) for r in rows)
    ids = torch.tensor([r.ids + [0] * (longest - len(r.ids)) for r in rows])
    targets = torch.tensor([[t if m else -100 for t, m in zip(r.ids, r.loss_mask, strict=True)] + [-100] * (longest - len(r.ids)) for r in rows])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step in count():
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets[:, 1:], reduction="none").max()
        if loss < 0.1:
            return
        assert step < 600, f"it does not learn: {loss}"
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def predict(plan, capsys):
    def run(*arguments, code=0):
        assert main(["predict", str(plan.path), "--workspace", str(plan.root), "--set", "sft.lora={r=16, alpha=32}", *map(str, arguments)]) == code
        found = capsys.readouterr()
        return found.err if code else found.out

    return run


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_sentences(predict, plan, monkeypatch):
    assert predict("draw d") == f'{CALL}\n  call generate_image {{"prompt": "d"}}\n'
    assert predict("draw x", "hi").splitlines() == ['call("generate_image")', "  malformed a comma is missing at character 21", "yo", "  text"]
    first, second = map(json.loads, predict("--json", "draw d", "hi").splitlines())
    assert first["parsed"] == {"kind": "call", "name": "generate_image", "arguments": {"prompt": "d"}} and first["reply"] == CALL
    assert second == {"id": "2", "prompt": [{"role": "user", "content": "hi"}], "reply": "yo", "parsed": {"kind": "text"}}
    assert json.loads(predict("--json", "--base", "hi"))["reply"] != "yo", "the base has not learned it"
    told = json.loads(predict("--json", "--system", "s", "hi"))
    assert [m["role"] for m in told["prompt"]] == ["system", "user"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nhi\n"))
    assert predict("-").splitlines() == ["yo", "  text"] * 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n" + "a" * 120 + "\n\udc80\n"))
    assert predict("-", code=2).splitlines()[-2:] == [
        "graft: text 2 was not asked: too long with its answer: the model holds 128 tokens",
        "graft: text 3 was not asked: no UTF-8",
    ]


def test_options_become_numbers_and_what_names_none_stays_empty(predict, tmp_path):
    rows = [question(name, id=name.upper()) for name in NAMED]  # a set to be submitted: no answer
    rows[2:2] = ["{broken", question("q2") | {"option2": None}, question("q2", ID=17)]
    out = tmp_path / "answers.csv"
    said = predict("--file", write(tmp_path / "test.jsonl", rows), "--out", out)
    wanted = "ID,Answer\nQ1,1\nQ2,4\n3,\n4,\n17,4\nQ3,2\nQ4,\n"
    assert out.read_bytes().decode() == wanted
    assert said.splitlines()[0].endswith("layout mcq, read as exam says")
    assert (
        said.splitlines()[1]
        == f'{out}: 7 answers; 1 without an option that can be read, left empty; 2 that could not be asked ("option2" is null: 1, no JSON: 1), left empty'
    )
    assert next(csv.DictReader(out.open())) == {"ID": "Q1", "Answer": "1"} and not list(tmp_path.glob(".*"))


def test_all_that_is_known_is_kept_and_the_parser_is_the_evaluations(predict, plan, tmp_path):
    rows = [question(name, answer=answer) for name, answer in zip(NAMED, ["A", 4, "no such", "B"], strict=True)]
    predict("--file", write(tmp_path / "test.jsonl", rows), "--out", tmp_path / "all.jsonl")
    lines = list(read_jsonl(tmp_path / "all.jsonl"))
    assert [line["reply"] for line in lines] == list(NAMED.values()) and [line.get("reference") for line in lines] == [1, 4, None, 2]
    for line, wanted in zip(lines, ANSWERS.values(), strict=True):
        index = chosen(line["reply"], list(OPTIONS.values()))
        assert line["parsed"] == (None if index is None else index + 1) and str(line["parsed"] or "") == wanted
        assert line["prompt"][0]["content"].endswith("red\nblue\ngreen\ngrey")


def test_a_reply_by_number_is_no_other_options_text(plan):
    predictor = Predictor(plan, None, None, None, plan.recipe.tasks["exam"], False, None)
    row = {"options": ["3", "1", "2", "4"], "replies": ["1", "2", "3", "4"]}
    assert predictor._parsed(row, ["1"]) == {"parsed": 1} and predictor._parsed(row, ["1, 2, 3, 4"]) == {"parsed": None}


def test_the_likeliest_option_is_that_of_the_engine(predict, plan, tmp_path):
    file = write(tmp_path / "test.jsonl", [question(name) for name in NAMED])
    predict("--file", file, "--out", tmp_path / "all.jsonl", "--by", "likelihood")
    predict("--file", file, "--out", tmp_path / "all.csv", "--by", "likelihood")
    predictor = Predictor.of(plan)
    for line, row in zip(read_jsonl(tmp_path / "all.jsonl"), csv.DictReader((tmp_path / "all.csv").open()), strict=True):
        alone = []
        for reply in "ABCD":
            done = render(predictor.tokenizer, [*line["prompt"], {"role": "assistant", "content": reply}])
            first = done.loss_mask.index(1)
            scores = predictor.engine.score(done.ids, first, "small")
            alone.append(sum(s for s, m in zip(scores, done.loss_mask[first:], strict=True) if m))
        assert line["loglikelihoods_nats"] == pytest.approx(alone, abs=1e-4)
        assert line["parsed"] == alone.index(max(alone)) + 1 == int(row["Answer"])


def test_final_answers_and_plain_replies(predict, tmp_path):
    sums = write(tmp_path / "sums.jsonl", [{"question": "2+2"}, {"question": "3+3", "answer": "#### 6"}])
    said = predict("--file", sums, "--out", tmp_path / "sums.csv")
    assert (tmp_path / "sums.csv").read_text() == "ID,Answer\n1,4\n2,\n" and said.endswith(
        "; 1 without a final answer that can be read, left empty\n"
    )
    chats = [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    ]
    plain = ["--set", "evaluate.tasks={}", "--file", write(tmp_path / "chats.jsonl", chats)]
    predict(*plain, "--out", tmp_path / "chats.csv")
    assert (tmp_path / "chats.csv").read_text() == "ID,Answer\n1,yo\n2,yo\n"
    predict(*plain, "--out", tmp_path / "all.jsonl")
    assert [line.get("reference") for line in read_jsonl(tmp_path / "all.jsonl")] == [None, "hello"]


def test_repeats_are_by_other_seeds_and_most_of_them_decide(plan, predict, tmp_path):
    file = write(tmp_path / "test.jsonl", [question(name) for name in NAMED])
    hot = ["--set", "evaluate.temperature=2.0", "--set", "evaluate.repeats=3", "--file", file]
    predict(*hot, "--out", tmp_path / "a.jsonl")
    predict(*hot, "--out", tmp_path / "b.jsonl", "--set", "evaluate.batch_size=16")
    lines = list(read_jsonl(tmp_path / "a.jsonl"))
    assert lines == list(read_jsonl(tmp_path / "b.jsonl")), "a row does not depend on its batch mates"
    assert all(len(line["replies"]) == 3 and line["reply"] == line["replies"][0] for line in lines)
    assert any(len(set(line["replies"])) > 1 for line in lines)
    for line in lines:
        votes = [n + 1 for reply in line["replies"] if (n := chosen(reply, list(OPTIONS.values()))) is not None]
        assert line["parsed"] == (max(votes, key=votes.count) if votes else None)


def test_rows_stream_and_each_is_the_engines(plan):
    predictor, asked = Predictor.of(plan), []
    texts = (asked.append(n) or f"draw {n}" for n in range(1000))
    found = predictor.answers(sentences(texts))
    first = next(found)
    assert len(asked) == AHEAD * 2, "some batches are read, whatever a file holds"
    alone = predictor.engine.generate([Request(render_prompt(predictor.tokenizer, first["prompt"]), 60, adapter="small")])
    assert first["reply"] == alone[0].text


def test_a_kill_leaves_nothing_half_written(plan, predict, tmp_path):
    out, part = tmp_path / "answers.csv", tmp_path / ".answers.csv.part"
    rows = write(tmp_path / "long.jsonl", [{"id": "n" * 9000, "question": f"{n}+{n}"} for n in range(1000)])  # ids that fill the writer's buffer
    words = ["predict", str(plan.path), "--workspace", str(plan.root), "--set", "sft.lora={r=16, alpha=32}", "--file", str(rows), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "graft.cli", *words], stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 180
    while not (part.exists() and part.stat().st_size) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and part.exists() and not out.exists()
    predict("--file", write(tmp_path / "short.jsonl", [{"question": "2+2"}]), "--out", out)
    assert out.read_text() == "ID,Answer\n1,4\n" and not part.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "takes a recipe and TEXT"),
        (["hi", "--file", "sums.jsonl", "--out", "a.csv"], "takes a recipe and TEXT"),
        (["--file", "sums.jsonl"], "and --out FILE.csv"),
        (["hi", "--by", "likelihood"], "sentences have no options"),
        (["--file", "gone.jsonl", "--out", "a.csv"], "gone.jsonl is no file"),
        (["--file", "sums.jsonl", "--out", "a.txt"], "names no format"),
        (["--file", "sums.jsonl", "--out", "sums.jsonl"], "is the file that is read"),
        (["--file", "sums.jsonl", "--out", "no/a.csv"], "lies in no folder that is there"),
        (["--file", "sums.jsonl", "--out", "a.csv", "--by", "likelihood"], "which these questions do not have"),
        (["--file", "sums.jsonl", "--out", "a.csv", "--like", "exam"], "which is not that of exam"),
        (["--file", "sums.jsonl", "--out", "a.csv", "--like", "exams"], "it has exam, sums"),
        (["--file", "texts.txt", "--out", "a.csv"], "holds texts, which ask nothing"),
        (["--file", "empty.jsonl", "--out", "a.csv"], "none of the first records can be read"),
        (["hi", "--set", "seed=9"], "needs"),
        pytest.param(
            ["hi", "--set", "serve.engine=vllm"],
            "vLLM cannot be imported",
            marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here"),
        ),
    ],
)
def test_what_cannot_be_predicted_is_one_line(plan, predict, monkeypatch, arguments, words):
    monkeypatch.chdir(plan.root)
    (plan.root / "texts.txt").write_text("a\n")
    (plan.root / "empty.jsonl").write_text("")
    said = predict(*arguments, code=2)
    assert words in said and said.startswith("graft: ") and said.count("\n") == 1 and not (plan.root / "a.csv").exists()


def test_two_ways_of_reading_a_file_that_differ_are_not_guessed_between(plan, tmp_path, predict):
    other = "evaluate.tasks.other={kind='choice', path='exam.jsonl'}"
    file = write(tmp_path / "test.jsonl", [question("q1")])
    assert "can be read as exam or as other says" in predict("--set", other, "--file", file, "--out", tmp_path / "a.csv", code=2)
    assert source(plan.recipe, file, "exam").task.mcq.reply == "{letter}"
    recipe = plan.recipe.model_copy(update={"evaluate": plan.recipe.evaluate.model_copy(update={"tasks": {}})})
    assert source(recipe, file).task.kind == "choice" and source(recipe, file).name == ""
