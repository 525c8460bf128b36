"""Questions about images: from people's files with hostile ones among them, and from drawings; and no training row shows an evaluation's image."""

import hashlib
import io
import json
from collections import Counter

import pyarrow as pa
import pytest
from PIL import Image

from graft.core.errors import ConfigError
from graft.core.recipe import load
from graft.core.rows import read_jsonl
from graft.core.sections import Decontaminate, Images
from graft.core.stages import Plan
from graft.data import drawings, questions
from graft.data.augment.images import ITEMS, read_batch
from graft.data.decontaminate import Gate
from graft.data.pictures import Pictures, below
from graft.data.prompts import images, source
from graft.data.reading import TEXTS, read_pieces, write_evaluation_texts
from graft.data.seed_rows import OF_IMAGES, select, told_by
from graft.data.sources import evaluation_sets, sources
from graft.model.chat import files_of

RECIPE = """
name = "asked"
[corpora.files]
path = "train.json"
images = "pictures"
[model]
base = "base"
[sft]
corpora = ["files"]
[evaluate.tasks.seen]
kind = "generation"
path = "seen.json"
images = "pictures"
rows = 3
[evaluate.tasks.described]
kind = "json"
path = "described.jsonl"
answer_schema = "answer.schema.json"
[evaluate.tasks.pick]
kind = "choice"
path = "pick.json"
images = "pictures"
[evaluate.tasks.drawn]
kind = "json"
drawings = 12
answer_schema = "answer.schema.json"
"""
OPTIONS = {f"option{n}": text for n, text in enumerate(["red", "blue", "green", "grey"], 1)}


def png(colour, size=(60, 40)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def asked(question, answer, *shown):
    marks = "<image>" * len(shown)
    return {"messages": [{"role": "user", "content": marks + question}, {"role": "assistant", "content": answer}], "images": list(shown)}


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "asked.toml").write_text(RECIPE)
    (tmp_path / "pictures").mkdir()
    for n in range(8):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png((n * 30, 0, 0)))
    (tmp_path / "pictures" / "broken.png").write_bytes(png("red")[:60])
    (tmp_path / "secret.png").write_bytes(png("white"))
    rows = [
        asked("What is it?", "a wall", "0.png"),
        asked("What is it?", "a wall", "broken.png"),
        asked("What is it?", "a wall", "../secret.png"),
        asked("Which differ?", "both", "1.png", "2.png"),
        asked("What is it?", "a wall", "3.png", "gone.png"),
        asked("And without one, in words that are long enough to be an n-gram of their own for the gate to find?", "nothing"),
        asked("What is it?", "one too many", "4.png"),
    ]
    (tmp_path / "seen.json").write_text(json.dumps(rows))
    said = ['{"kind": "table"}', '{"kind": 1}', "a table", '{"kind": "form", "count": 2}']
    (tmp_path / "described.jsonl").write_text("\n".join(json.dumps({"question": f"{n}?", "answer": a}) for n, a in enumerate(said)))
    (tmp_path / "pick.json").write_text(json.dumps([{"article": "a", "question": "Which?", **OPTIONS, "answer": "B", "images": ["5.png"]}]))
    (tmp_path / "answer.schema.json").write_text('{"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}')
    train = [asked("What is it?", "a wall", "6.png"), asked("Where?", "here", "7.png", "1.png"), asked("What is it?", "a wall", "5.png")]
    (tmp_path / "train.json").write_text(json.dumps(train))
    return Plan(tmp_path / "asked.toml", (), tmp_path)


@pytest.fixture
def made(plan):
    job = plan.resolve("questions")
    questions.run(job)
    return job.artifact


def test_what_cannot_be_shown_is_refused_with_its_reason_and_the_run_goes_on(made):
    rows = list(read_jsonl(made.path / "seen.jsonl"))
    assert [(row["id"], row["wanted"], len(files_of(row["messages"]))) for row in rows] == [("0", "a wall", 1), ("3", "both", 2), ("5", "nothing", 0)]
    part = rows[0]["messages"][0]["content"][0]
    assert part == {"type": "image", "file": f"{hashlib.sha256(png('black')).hexdigest()}.png", "width": 60, "height": 40}
    refused = made.counts["seen"]["refused"]
    assert {reason.partition(":")[0] for reason in refused} == {
        "image truncated",
        "image not found",
        "an image outside of the corpus's folder of images",
    }
    shown = {file for task in ("seen", "pick", "drawn") for row in read_jsonl(made.path / f"{task}.jsonl") for file in files_of(row["messages"])}
    assert shown == {path.name for path in (made.path / "images").iterdir()}, "what is refused, or one too many, leaves no image"
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.stem for path in (made.path / "images").iterdir())


def test_options_are_asked_about_an_image(made):
    (row,) = read_jsonl(made.path / "pick.jsonl")
    first, second = row["messages"][0]["content"]
    assert first["type"] == "image" and "Which?" in second["text"] and "B. blue" in second["text"]
    assert row["right"] == 1 and row["options"] == list(OPTIONS.values()) and row["replies"][1] == "B. blue"


def test_what_is_wanted_of_json_is_json_by_the_schema(made):
    assert [row["wanted"] for row in read_jsonl(made.path / "described.jsonl")] == ['{"kind": "table"}', '{"kind": "form", "count": 2}']
    assert made.counts["described"]["refused"] == {"the answer is no JSON": 1, "the answer is not by the schema": 1}
    wanted = [row["messages"][1]["content"] for row in drawings.rows(12, 1_000_003)]
    assert [row["wanted"] for row in read_jsonl(made.path / "drawn.jsonl")] == [text for text in wanted if text.startswith("{")]


def test_images_and_drawings_and_schemas_are_inputs(plan):
    before = {name: plan.external_input(name) for name in ("tasks", "schemas", "evaluation")}
    assert before["tasks"].keys() == {"seen", "seen.images", "described", "pick", "pick.images", "drawn"}
    assert before["schemas"].keys() == {"described", "drawn"} and "schemas" in plan.stages["evaluate"].inputs
    fingerprint = plan.resolve("questions").fingerprint
    other = Plan(plan.path, ("evaluate.tasks.drawn.seed=1",), plan.root)
    assert other.external_input("evaluation") != before["evaluation"] and other.resolve("questions").fingerprint != fingerprint
    (plan.root / "answer.schema.json").write_text("{}")
    assert plan.external_input("schemas") != before["schemas"] and plan.external_input("evaluation") == before["evaluation"]
    assert plan.resolve("questions").fingerprint != fingerprint and "shard.image_pixels" in plan.stages["evaluate"].keys
    (plan.root / "pictures" / "0.png").write_bytes(png("white"))
    assert plan.external_input("tasks") != before["tasks"] and plan.external_input("evaluation") != before["evaluation"]


def test_no_training_row_shows_an_image_of_an_evaluation(plan, tmp_path):
    """The same question may be asked of other images; words count where there is no image."""
    sent = Images(folder="pictures", prompts=("?",)).model_dump(include={"max_side", "max_bytes"})
    gate, out = tmp_path / "gate", tmp_path / "out"
    gate.mkdir()
    out.mkdir()
    write_evaluation_texts({"texts": [], "sets": json.loads(json.dumps(evaluation_sets(plan))), "sent": sent}, gate)
    texts = [row["text"] for row in read_jsonl(gate / TEXTS)]
    assert "What is it?" not in texts and any("n-gram of their own" in text for text in texts) and not (gate / "images").exists()
    rules = {key: getattr(plan.recipe, key).model_dump(mode="json") for key in ("decontaminate", "dedup")}
    (source,) = sources(plan)
    report = read_pieces(json.loads(json.dumps(source.specs[0] | rules | {"gate": str(gate / TEXTS)})), out)
    assert report["documents"] == 1 and report["rejected"] == {"contaminated": 2}
    assert [row["number"] for row in read_jsonl(out / "rejected.jsonl")] == [1, 2]

    album = tmp_path / "album"
    album.mkdir()
    items = [(0, False, str(plan.root / "pictures" / "0.png").encode()), (1, False, str(plan.root / "pictures" / "6.png").encode())]
    batch = pa.table(dict(zip(ITEMS.names, zip(*items, strict=True), strict=True)), schema=ITEMS)
    found = read_batch(batch, Images(folder="x", prompts=("?",)), album, 1.0, lambda a: True).to_pylist()

    def row(name, sha, family):
        shown = [{"type": "image", "file": f"{sha}.jpg", "width": 60, "height": 40}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": "a wall"}]
        return {"id": name, "messages": messages, "label": OF_IMAGES, "family": family}

    recipe = load(plan.path)
    rows = [
        row("evaluated", found[0]["sha256"], "a"),
        row("other", found[1]["sha256"], "b"),
        row("held out", "0" * 64, "c"),
        row("it", "0" * 64, "d"),
    ]
    held_out = told_by(rows[2], recipe.prepare, recipe.task)
    kept, rejected = select(rows, {"c"}, Gate.of([*texts, *held_out], Decontaminate()), recipe)
    assert [r["id"] for r in rejected] == ["evaluated", "it"] and {r["reason"] for r in rejected} == {"contaminated"}
    assert [r["id"] for r in kept["test"]] == ["held out"] and [r["id"] for r in kept["train"]] == ["other"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluate.tasks.seen={kind='generation'}", "needs either path = "),
        ("evaluate.tasks.drawn={kind='generation', drawings=3, path='x'}", "needs either path = "),
        ("evaluate.tasks.drawn={kind='generation', drawings=3, images='x'}", "are shown in the conversations of a file"),
        ("evaluate.tasks.seen={kind='perplexity', path='x', images='x'}", "are shown in the conversations of a file"),
        ("evaluate.tasks.drawn={kind='choice', drawings=3}", "drawings have answers"),
        ("evaluate.tasks.seen.answer_schema='x'", "is of kind 'json', and kind = 'generation'"),
        ("evaluate.tasks.described.answer_schema='gone.json'", "evaluate.tasks.described.answer_schema: .*gone.json cannot be read"),
        ("evaluate.tasks.seen.images='gone'", "evaluate.tasks.seen.images names .*gone, which is no folder"),
    ],
)
def test_what_cannot_be_asked_is_one_line(plan, override, words):
    with pytest.raises(ConfigError, match=words) as e:
        questions.run(Plan(plan.path, (override,), plan.root).resolve("questions"))
    assert "\n" not in str(e.value)


def test_a_file_to_be_predicted_shows_images_with_or_without_answers(plan, tmp_path):
    pictures = Pictures(tmp_path / "kept", plan.root / "pictures", Counter())
    rows = [asked("What?", "x", "0.png"), asked("What?", "x", "broken.png"), {**OPTIONS, "article": "a", "question": "Which?", "image": "1.png"}]
    rows[0]["messages"].pop()
    (tmp_path / "f.json").write_text(json.dumps(rows[:2]))
    (tmp_path / "options.json").write_text(json.dumps(rows[2:]))
    first, second = source(plan.recipe, tmp_path / "f.json", "seen", pictures).rows()
    assert len(files_of(first["messages"])) == 1 and "reference" not in first and second["refused"].startswith("image truncated")
    (row,) = source(plan.recipe, tmp_path / "options.json", "pick", pictures).rows()
    assert row["messages"][0]["content"][0]["file"] in {p.name for p in pictures.folder.iterdir()} and row["replies"][1] == "B. blue"
    assert [row["refused"] for row in source(plan.recipe, tmp_path / "f.json", "seen").rows()] == ["images, audio or video"] * 2
    anywhere = below("/", tmp_path / "kept")
    assert images([str(plan.root / "secret.png")], anywhere)[0]["width"] == 60
    with pytest.raises(ConfigError, match=r"--image .*asked.toml cannot be shown: not an image: text"):
        images([str(plan.path)], anywhere)
