"""Tasks and predictions about images by a tiny Qwen2.5-VL under an adapter, through the stage and the command line, against requests made by hand."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image

from graft.cli import main
from graft.core.errors import ArtifactError
from graft.core.recipe import Lora
from graft.core.rows import read_jsonl
from graft.data import drawings, questions
from graft.engine.hf import HFEngine
from graft.engine.protocol import Request
from graft.evaluate import stage
from graft.evaluate.json_answers import judged
from graft.evaluate.options import likelihoods, replies
from graft.evaluate.pictures import images_of
from graft.model.base import load_base
from graft.model.chat import files_of, load_tokenizer, render_prompt, save_tokenizer
from graft.model.lora import LoraLinear, inject, save_adapter

from ..train.small_vision import vision_plan

TASKS = """
[evaluate]
max_new_tokens = 6
batch_size = 3
[evaluate.tasks.drawn]
kind = "generation"
drawings = 16
[evaluate.tasks.described]
kind = "json"
drawings = 24
max_new_tokens = 12
answer_schema = "answer.schema.json"
[evaluate.tasks.pick]
kind = "choice"
path = "pick.json"
images = "pictures"
"""
LORA = Lora(r=4, alpha=8)
OPTIONS = {"option1": "red", "option2": "blue"}
MCQ = "evaluate.tasks.pick.mcq={options = ['option1', 'option2'], prompt = '{question}{options}', option = '{text}', reply = '{text}'}"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    root = tmp_path_factory.mktemp("asked")
    vision_plan(root)
    (root / "seen.toml").write_text((root / "seen.toml").read_text() + TASKS)
    (root / "answer.schema.json").write_text('{"type": "object", "required": ["kind", "colour", "count"]}')
    (root / "pictures").mkdir()
    rows = []
    for n, row in enumerate(drawings.rows(4, 5)):
        (root / "pictures" / f"{n}.png").write_bytes(row["images"][0]["bytes"])
        rows.append({"article": "a", "question": f"{n}?", **OPTIONS, "answer": "AB"[n % 2], "images": [f"{n}.png"]})
    (root / "pick.json").write_text(json.dumps(rows))
    (root / "words.txt").write_text("no image")
    base = str(root / "base")
    model = load_base(base, None, "fp32", "cpu")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.mul_(3.0)  # larger than a fresh model's, so that what is seen decides what comes next
    model.save_pretrained(base)
    plan = vision_plan(root, MCQ)
    inject(model, LORA, torch.float32, 0)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.B, std=0.3)
    with plan.resolve("sft").writing() as draft:
        save_adapter(model, LORA, draft.path, base)
        save_tokenizer(load_tokenizer(base), draft.path)
    questions.run(plan.resolve("questions"))
    return plan


@pytest.fixture(scope="module")
def asked(plan):
    """(the evaluation's folder, how many rows and images the engine was asked at once, each time)."""
    held = []
    generate = HFEngine.generate

    def noted(engine, requests):
        held.append((len(requests), sum(len(r.images) for r in requests)))
        return generate(engine, requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFEngine, "generate", noted)
        stage.run(plan.resolve("evaluate"))
    return plan.artifact("evaluate").path, held


@pytest.fixture(scope="module")
def engine(plan):
    base, revision, adapters = plan.trained()
    tokenizer = load_tokenizer(str(plan.artifact("sft").path))
    return HFEngine(base, revision, "fp32", adapters, tokenizer, device="cpu", image_pixels=plan.recipe.shard.image_pixels)


def by_hand(engine, folder, messages, most, adapter):
    seen = tuple(engine.processor.seen(Image.open(folder / "images" / file).convert("RGB")) for file in files_of(messages))
    ids = render_prompt(engine.tokenizer, messages, [engine.processor.tokens(s.grid) for s in seen])
    return engine.generate([Request(ids, most, adapter=adapter, images=seen)])[0].text


def test_answers_are_those_of_requests_made_by_hand(plan, asked, engine):
    folder = plan.artifact("questions").path
    for name, most in (("drawn", 6), ("described", 12), ("pick", 6)):
        rows, lines = read_jsonl(folder / f"{name}.jsonl"), list(read_jsonl(asked[0] / f"predictions-{name}.jsonl"))
        for row, line in list(zip(rows, lines, strict=True))[:3]:
            for system, adapter in (("adapter", "seen"), ("base", None)):
                assert line[system]["answers"] == [by_hand(engine, folder, row["messages"], most, adapter)]
    answers = {line["adapter"]["answers"][0] for line in read_jsonl(asked[0] / "predictions-drawn.jsonl")}
    assert len(answers) > 4, "of four questions: what is seen decides"


def test_no_more_images_are_decoded_than_a_batch_shows(asked):
    assert len(asked[1]) > 10 and max(rows for rows, _ in asked[1]) == 3 == max(images for _, images in asked[1])


def test_the_likelihoods_of_options_are_given_the_image(plan, asked, engine):
    rows = list(read_jsonl(plan.artifact("questions").path / "pick.jsonl"))
    folder = plan.artifact("questions").path / "images"
    own = [replies(engine.tokenizer, row, engine.processor, images_of(row["messages"], folder)) for row in rows]
    assert all(len(reply.images) == 1 for some in own for reply in some) and own[0][0].images is own[0][1].images
    for line, found in zip(read_jsonl(asked[0] / "predictions-pick.jsonl"), likelihoods(engine, own, "seen"), strict=True):
        assert line["adapter"]["loglikelihoods_nats"] == pytest.approx([nats for nats, _ in found], abs=1e-3)
    assert len({line["adapter"]["loglikelihoods_nats"][0] for line in read_jsonl(asked[0] / "predictions-pick.jsonl")}) == 4


def test_metrics_tell_json_and_what_chance_is(plan, asked):
    tasks = json.loads((asked[0] / "metrics.json").read_text())["tasks"]
    assert {"valid", "key_f1", "item_f1", "equal", "rougeL", "unreadable"} == set(tasks["described"]["systems"]["adapter"])
    lines = list(read_jsonl(asked[0] / "predictions-described.jsonl"))
    schema = json.loads((plan.root / "answer.schema.json").read_text())
    for line in lines:
        assert {m: v[0] for m, v in line["base"]["scores"].items()} == judged(line["base"]["answers"][0], line["wanted"], schema)
    rows = list(read_jsonl(plan.artifact("questions").path / "drawn.jsonl"))
    wanted = {}
    for row in rows:
        wanted.setdefault(row["messages"][0]["content"][1]["text"], Counter())[row["wanted"]] += 1
    found = {told["question"]: told for told in tasks["drawn"]["by_question"]}
    assert found.keys() == wanted.keys() and "by_question" not in tasks["pick"]
    for question, counts in wanted.items():
        told = found[question]
        assert told["rows"] == counts.total() and told["majority"] == pytest.approx(max(counts.values()) / counts.total(), abs=1e-6)
        assert {"adapter", "base"} <= told.keys()
    assert [told["rows"] for told in tasks["described"]["by_question"]] == [len(lines)]
    report = (asked[0] / "report.txt").read_text()
    assert "right, by question" in report and "What is drawn?" in report and "item_f1" in report
    assert plan.artifact("evaluate").counts["tasks"]["described"] == {"item_f1": tasks["described"]["systems"]["adapter"]["item_f1"]["mean"]}


def test_an_altered_image_is_one_line(plan, tmp_path):
    row = next(read_jsonl(plan.artifact("questions").path / "drawn.jsonl"))
    (file,) = files_of(row["messages"])
    with pytest.raises(ArtifactError, match="cannot be read"):
        images_of(row["messages"], tmp_path)
    (tmp_path / file).write_bytes(b"other")
    with pytest.raises(ArtifactError, match="was altered: its SHA-256 is not its name"):
        images_of(row["messages"], tmp_path)


@pytest.fixture
def predict(plan, capsys):
    def run(*arguments, code=0):
        assert main(["predict", str(plan.path), "--workspace", str(plan.root), "--set", MCQ, *map(str, arguments)]) == code
        found = capsys.readouterr()
        return found.err if code else found.out

    return run


def test_a_question_about_an_image(predict, plan, engine):
    one, two = (plan.root / "pictures" / f"{n}.png" for n in (0, 1))
    told = [json.loads(predict("--json", "--image", path, "Which colour is it?")) for path in (one, two)]
    for line, path in zip(told, (one, two), strict=True):
        folder = plan.artifact("questions").path  # holds the same images, by content
        (file,) = files_of(line["prompt"])
        assert (folder / "images" / file).read_bytes() == path.read_bytes()
        assert line["reply"] == by_hand(engine, folder, line["prompt"], 6, "seen")
    both = json.loads(predict("--image", one, "--json", "Which?", "--image", two))
    assert len(files_of(both["prompt"])) == 2 and both["prompt"][0]["content"][-1] == {"type": "text", "text": "Which?"}


def test_a_file_of_questions_about_images(predict, plan, tmp_path, asked):
    rows = [
        {"messages": [{"role": "user", "content": "<image>Which colour is it?"}], "images": ["0.png"]},
        {"messages": [{"role": "user", "content": "<image>Which?"}], "images": ["../words.txt"]},
        {"messages": [{"role": "user", "content": "Which?"}], "id": "text"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    said = predict("--file", tmp_path / "rows.json", "--images", plan.root / "pictures", "--like", "drawn", "--out", tmp_path / "all.jsonl")
    first, second, third = read_jsonl(tmp_path / "all.jsonl")
    assert first["reply"] and second["refused"].startswith("an image outside of") and third["reply"]
    assert "1 that could not be asked" in said
    likeliest = ("--like", "pick", "--by", "likelihood", "--out", tmp_path / "picked.csv")
    predict("--file", plan.root / "pick.json", "--images", plan.root / "pictures", *likeliest)
    kept = [line["adapter"]["loglikelihoods_nats"] for line in read_jsonl(asked[0] / "predictions-pick.jsonl")]
    assert (tmp_path / "picked.csv").read_text().splitlines()[1:] == [f"{n},{1 + (b > a)}" for n, (a, b) in enumerate(kept, 1)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "words.txt", "hi"], "--image words.txt cannot be shown: not an image: text"),
        (["--image", "gone.png", "hi"], "--image gone.png cannot be shown: not found"),
        (["--images", "pictures", "hi"], "--image FILE is what a TEXT is about"),
        (["--image", "pictures/0.png", "--file", "pick.json", "--out", "a.csv"], "--image FILE is what a TEXT is about"),
        (["--images", "gone", "--file", "pick.json", "--out", "a.csv"], "--images gone is no folder"),
    ],
)
def test_what_cannot_be_shown_is_one_line(predict, plan, monkeypatch, arguments, words):
    monkeypatch.chdir(plan.root)
    said = predict(*arguments, code=2)
    assert words in said and said.startswith("graft: ") and said.count("\n") == 1
