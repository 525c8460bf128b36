"""Rows with images from people's files, and from augment, to shards: with real Ray, a real processor and hostile images among the good."""

import io
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from graft.core.artifact import sha256_file
from graft.core.errors import ConfigError
from graft.core.rows import read_jsonl, write_jsonl
from graft.core.sections import Mcq
from graft.core.shards import ShardSet
from graft.core.stages import Plan
from graft.data import init, prepare, questions, shard
from graft.data.export import export
from graft.data.pictures import Pictures
from graft.data.readers.layouts import detect
from graft.model.chat import IMAGE, files_of, image_parts, load_tokenizer, render
from graft.model.images import ImageProcessor

RECIPE = """
name = "seen"
[augment.images]
folder = "album"
prompts = ["What is it?"]
[prepare]
test_families = 0.25
[corpora.drawn]
kind = "drawings"
documents = 40
[corpora.files]
path = "rows.json"
images = "pictures"
[corpora.self]
kind = "identity"
name = "小圖"
author = "graft"
[dedup]
near = 1.0
[shard]
seq_len = 96
bins_per_shard = 16
[model]
base = "embedded"
precision = "fp32"
[base]
vocab_size = 400
hidden_size = 32
intermediate_size = 64
layers = 1
heads = 2
kv_heads = 1
vision = {}
[base.train]
corpora = ["drawn"]
lora = false
[sft]
corpora = ["files", "self"]
"""


def png(colour, size=(120, 90)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def swift(n, *images):
    return {
        "messages": [{"role": "user", "content": "<image>" * len(images) + f"which {n}?"}, {"role": "assistant", "content": f"the {n}"}],
        "images": list(images),
    }


@pytest.fixture(scope="module")
def plan(tmp_path_factory, ray_local):
    root = tmp_path_factory.mktemp("seen")
    (root / "album").mkdir()
    (root / "album" / "a.png").write_bytes(png("red"))
    (root / "pictures").mkdir()
    for n in range(24):
        (root / "pictures" / f"{n}.png").write_bytes(png((n * 10, 0, 0)))
    (root / "pictures" / "broken.png").write_bytes(png("red")[:60])
    (root / "pictures" / "dot.png").write_bytes(png("red", (1, 1)))
    (root / "pictures" / "large.png").write_bytes(png("blue", (1200, 900)))
    rows = [swift(n, f"{n}.png") for n in range(24)] + [swift("both", "0.png", "1.png"), swift("none"), swift("again", "0.png")]
    rows += [swift("broken", "broken.png"), swift("dot", "dot.png"), swift("lost", "lost.png"), swift("large", "large.png")]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "seen.toml").write_text(RECIPE)
    plan = Plan(root / "seen.toml", (), root)
    with plan.resolve("augment").writing() as draft:
        (draft.path / "images").mkdir()
        made = []
        for n in range(12):
            (draft.path / "images" / f"{n:064x}.jpg").write_bytes(png((0, n * 10, 0)))
            asked = [{"type": "image", "image": f"images/{n:064x}.jpg", "sha256": f"{n:064x}"}, {"type": "text", "text": "What is it?"}]
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": f'{{"green":{n}}}'}]
            made += [
                {
                    "id": f"{n}",
                    "messages": messages,
                    "family": f"{n:064x}",
                    "source": f"{n}.png",
                    "prompt_kind": "given",
                    "request": "r",
                    "parent": None,
                }
            ]
        write_jsonl(draft.path / "rows.jsonl", made)
    prepare.run(plan.resolve("prepare"))
    init.run(plan.resolve("init"))
    for stage in ("shard-base", "shard-sft"):
        shard.run(plan.resolve(stage))
    return plan


def bins(plan, stage):
    """(split, source, bin) of every row."""
    folder = plan.artifact(stage).path
    for split in ("train", "validation"):
        held = ShardSet.open(folder / split)
        assert held.of_images
        yield from ((split, held.sources(i)[0], held.bin(i)) for i in range(len(held)))


def test_hostile_images_are_rejected_with_their_reasons_and_the_run_goes_on(plan):
    counts = plan.artifact("prepare").counts["corpora"]["files"]
    assert counts["documents"] == 28 and sum(counts["rejected"].values()) == len(counts["rejected"]) == 3
    reasons = [row["reason"] for row in read_jsonl(plan.artifact("prepare").path / "rejected.jsonl")]
    assert [r.partition(":")[0] for r in reasons] == ["image truncated", "image too small", "image not found"]


@pytest.mark.parametrize("stage", ["shard-base", "shard-sft"])
def test_every_bin_is_one_row_whose_placeholders_are_its_images_patches(plan, stage):
    folder = plan.artifact(stage).path
    base = str(plan.artifact("init").path)
    processor, image = ImageProcessor(base, None, plan.recipe.shard.image_pixels), load_tokenizer(base).convert_tokens_to_ids(IMAGE)
    seen = set()
    for _, source, b in bins(plan, stage):
        assert len(b.doc_lens) == 1 and (b.input_ids == image).sum() == sum(processor.tokens(i.grid) for i in b.images)
        assert not b.loss_mask[b.input_ids == image].any() and b.targets > 0
        assert ("self" in source) == (not b.images) or source.startswith("files")
        for shown in b.images:
            path = folder / "images" / shown.file
            with Image.open(path) as opened:
                assert shown.grid == processor.grid(*opened.size)
            seen.add(shown.file)
            assert source.startswith("rows") or sha256_file(path) == path.stem
    assert seen == {path.name for path in (folder / "images").iterdir()}


def test_probes_say_how_rows_with_images_render(plan):
    base = str(plan.artifact("init").path)
    processor, tokenizer = ImageProcessor(base, None, plan.recipe.shard.image_pixels), load_tokenizer(base)
    probes = json.loads((plan.artifact("shard-sft").path / "probes.json").read_text(encoding="utf-8"))
    sizes = [[(part["width"], part["height"]) for part in image_parts(p["messages"])] for p in probes]
    assert [len(own) for own in sizes] == [1, 1, 1, 0, 1, 1, 1, 0, 0, 0], "three of augment's rows, of the files' and of identity's"
    for probe, own in zip(probes, sizes, strict=True):
        done = render(tokenizer, probe["messages"], [processor.tokens(processor.grid(*size)) for size in own])
        assert (probe["ids"], probe["loss_mask"]) == (done.ids, done.loss_mask)
        assert bool(own) == (tokenizer.convert_tokens_to_ids(IMAGE) in done.ids)


def test_a_row_too_long_is_rejected_and_no_image_is_on_both_sides(plan):
    rejected = [row for row in read_jsonl(plan.artifact("shard-sft").path / "rejected.jsonl") if row["source"] == "files"]
    assert [r["reason"] for r in rejected] == ["longer than shard.seq_len"] and "which large?" in rejected[0]["text"]
    sides = {"train": set(), "validation": set()}
    for split, source, b in bins(plan, "shard-sft"):
        if source.startswith("files") and len(b.images) == 1:
            sides[split].update(i.file for i in b.images)
    assert sides["train"] and sides["validation"] and not sides["train"] & sides["validation"]


def test_augmented_rows_are_split_by_image(plan):
    rows = {split: list(read_jsonl(plan.artifact("prepare").path / "rows" / f"{split}.jsonl")) for split in ("train", "validation", "test")}
    families = {split: {row["family"] for row in some} for split, some in rows.items()}
    assert len(families["test"]) == 3 and not families["test"] & (families["train"] | families["validation"])
    assert sum(map(len, rows.values())) == 12
    assert all(row["messages"][0]["content"][0]["width"] == 120 for some in rows.values() for row in some)
    trained = {i.file for _, source, b in bins(plan, "shard-sft") if source.startswith("rows") for i in b.images}
    assert trained == {f"{family}.jpg" for split in ("train", "validation") for family in families[split]}


def test_the_rows_that_are_held_out_are_asked_as_a_task(plan):
    assert plan.recipe.tasks["test"].kind == "generation" and plan.stages["questions"].parents == {"prepare": "rows/test.jsonl"}
    questions.run(plan.resolve("questions"))
    folder, rows = plan.artifact("questions").path, list(read_jsonl(plan.artifact("prepare").path / "rows" / "test.jsonl"))
    found = list(read_jsonl(folder / "test.jsonl"))
    assert [(q["id"], q["messages"], q["wanted"]) for q in found] == [
        (row["id"], row["messages"][:-1], row["messages"][-1]["content"]) for row in rows
    ]
    assert {path.name for path in (folder / "images").iterdir()} == {file for row in rows for file in files_of(row["messages"])}
    with pytest.raises(ConfigError, match=r"evaluate.tasks.test: so the held-out rows of \[augment.images\] are called"):
        Plan(plan.path, ("evaluate.tasks.test={kind='generation', path='x'}",), plan.root)


def test_an_edited_image_makes_the_stages_anew(plan, tmp_path):
    for name in ("rows.json", "seen.toml", "pictures", "album"):
        copy = shutil.copytree if (plan.root / name).is_dir() else shutil.copy
        copy(plan.root / name, tmp_path / name)
    before, other = (Plan(root / "seen.toml", (), root).external_input("corpora") for root in (plan.root, tmp_path))
    assert before == other
    (tmp_path / "pictures" / "3.png").write_bytes(png("white"))
    assert Plan(tmp_path / "seen.toml", (), tmp_path).external_input("corpora") != before


def test_graft_reads_the_ms_swift_rows_that_it_writes(plan, tmp_path):
    export(plan.artifact("augment").path, "ms-swift", tmp_path / "rows.jsonl")
    row = next(iter(read_jsonl(tmp_path / "rows.jsonl")))
    messages, reason = Pictures(tmp_path / "kept", tmp_path, Counter()).messages(row, detect([row]), Mcq())
    assert not reason and [p["type"] for p in messages[0]["content"]] == ["image", "text"]
    assert np.array_equal(Image.open(tmp_path / "kept" / messages[0]["content"][0]["file"]), Image.open(tmp_path / row["images"][0]))
