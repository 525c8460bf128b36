"""`graft augment` and `graft export` on images: real Ray tasks and actors against a server with books of its own."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from graft import cli
from graft.core.rows import read_jsonl, write_jsonl
from graft.core.stages import Plan

from ..api.faulty import FaultyEndpoint

PRICES = {"eyes-1": {"input": 1.0, "output": 4.0}}
RECIPE = """
name = "eyes"
[api]
model = "eyes-1"
max_output_tokens = 300
image_tokens = 1200
timeout_s = 5
[api.prices.eyes-1]
input = 1.0
output = 4.0
[augment.images]
system = "Answer briefly."
"""
FOLDER = 'folder = "photos"\nprompts = ["What is this?", "Which colours?"]\nquestions = 2\n'
LISTING = 'file = "images.jsonl"\nprompts = ["How many things?"]\nanswer_schema = "answer.json"\n'
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 9}, "colour": {"enum": ["red", "green"]}},
    "required": ["count", "colour"],
    "additionalProperties": False,
}
SPOILT = {"refusal": "refused", "schema": "wrong schema", "length": "truncated", "filter": "filtered", "truncated": "failed"}  # fault: reason


def picture(number, kind="JPEG", **options):
    """A smooth image that no other number's looks like, encoded."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).save(out, kind, **options)
    return out.getvalue()


def write_photos(root, n):
    """n good images and four that are rejected, each for a reason of its own."""
    photos = root / "photos"
    (photos / "more").mkdir(parents=True)
    for i in range(n):
        (photos / "more" / f"{i:02}.jpg").write_bytes(picture(i))
    (photos / "z-cut.jpg").write_bytes(picture(100)[:2000])
    (photos / "z-empty.png").write_bytes(b"")
    (photos / "z-note.png").write_text("no image at all")
    (photos / "z-twin.jpg").write_bytes(picture(0, quality=40))


def write_recipe(root, images):
    root.mkdir(exist_ok=True)
    (root / "eyes.toml").write_text(RECIPE + images)
    return root / "eyes.toml"


def graft(verb, root, *arguments):
    return cli.main([verb, str(root / "eyes.toml"), "--workspace", str(root), *arguments])


def made(root):
    """(artifact, rows, rejected) of the last run, its accounts checked."""
    artifact = Plan(root / "eyes.toml", (), root).latest("augment")
    artifact.verify()
    rows, rejected = (list(read_jsonl(artifact.path / f"{name}.jsonl")) for name in ("rows", "rejected"))
    counts = artifact.counts
    found, questions = counts["images"], counts["questions"]
    assert found["in"] == found["kept"] + sum(found["rejected"].values())
    for each in (counts, questions):
        assert each["asked"] == each["accepted"] + each["rejected"] and each["requests"] == each["asked"] + each["unasked"]
    assert len(rows) == counts["accepted"] and len({r["id"] for r in rows}) == len(rows)
    assert len(rejected) == sum(found["rejected"].values()) + counts["rejected"] + questions["rejected"]
    return artifact, rows, rejected


@pytest.fixture
def server(monkeypatch):
    with FaultyEndpoint(prices=PRICES, answers="vqa", jitter_s=0.02) as s:
        monkeypatch.setenv("OPENAI_BASE_URL", s.base_url)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        yield s


def test_a_folder_with_questions_made(ray_local, server, tmp_path, capsys):
    write_recipe(tmp_path, FOLDER)
    write_photos(tmp_path, 8)
    assert graft("augment", tmp_path, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "60 requests at most" in said and "cost: about $ 0." in said and server.report()["requests"] == 0, "12 files, 1 + 2 + 2 requests each"
    assert not (tmp_path / "data_shards/eyes/augment").exists()

    assert graft("augment", tmp_path) == 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "8 of 12 images kept" in said.out and "rows accepted" in said.out
    artifact, rows, rejected = made(tmp_path)
    reasons = {r["image"]: r["reason"].partition(":")[0] for r in rejected}
    assert reasons.keys() == {f"photos/z-{name}" for name in ("cut.jpg", "empty.png", "note.png", "twin.jpg")} and len(rejected) == 4
    assert reasons["photos/z-twin.jpg"] == "duplicate" and "photos/more/00.jpg" in next(r["reason"] for r in rejected if "twin" in r["image"])
    assert [(r["source"], r["prompt_kind"]) for r in rows if r["prompt_kind"] == "given"] == [
        (f"photos/more/{i:02}.jpg", "given") for i in range(8) for _ in range(2)
    ]
    assert 8 <= sum(r["prompt_kind"] == "made" for r in rows) <= 16
    image, text = rows[0]["messages"][1]["content"]
    assert rows[0]["messages"][0] == {"role": "system", "content": "Answer briefly."} and text["text"] == "What is this?"
    assert rows[0]["messages"][2]["content"].startswith("The picture shows") and f"images/{image['sha256']}.jpg" == image["image"]
    assert {f for f in artifact.manifest["files"] if f.startswith("images/")} == {r["messages"][1]["content"][0]["image"] for r in rows}
    truth = server.report()
    assert truth["requests"] == truth["unique"] == artifact.counts["sent"] == artifact.counts["requests"] + 8
    assert artifact.manifest["cost"]["usd_of_run"] == pytest.approx(truth["billed_usd"])

    assert graft("run", tmp_path, "--from", "augment") == 0
    again, _, _ = made(tmp_path)
    assert again.digest == artifact.digest and server.report()["requests"] == truth["requests"], "the ledger answered everything"

    (tmp_path / "photos/a-new.webp").write_bytes(picture(50, "WEBP"))
    assert graft("augment", tmp_path) == 0
    _, more, _ = made(tmp_path)
    new = set(server.report()["by_key"]) - set(truth["by_key"])
    of_it = [r for r in more if r["source"] == "photos/a-new.webp"]
    assert new == {r["request"] for r in of_it} | {r["parent"] for r in of_it if r["parent"]} and 4 <= len(new) <= 5
    assert [r for r in more if r not in of_it] == rows


def listing(root):
    (root / "answer.json").write_text(json.dumps(SCHEMA))
    (root / "photos").mkdir()
    for i in range(60):
        (root / "photos" / f"{i}.png").write_bytes(picture(i, "PNG"))
    lines = [{"image": f"photos/{i}.png", **({"prompt": f"How many in {i}?", "system": "Count."} if i % 2 else {})} for i in range(60)]
    bad = [{"image": "photos/absent.png"}, {"picture": "x"}, {"image": "http://127.0.0.1:9/a.jpg?token=hidden"}]
    write_jsonl(root / "images.jsonl", [*lines, *bad])


def test_a_listing_with_a_schema_through_spoilt_answers_and_faults(ray_local, server, tmp_path):
    """5 % of 500, 429 and cut connections are waited out; an answer that cannot be used is rejected by its reason."""
    write_recipe(tmp_path, LISTING)
    listing(tmp_path)
    server.control(faults={"500": 0.05, "429": 0.05, "reset": 0.05, **dict.fromkeys(SPOILT, 0.05)}, retry_after_s=0.2)
    assert graft("augment", tmp_path) == 0
    artifact, rows, rejected = made(tmp_path)
    truth, counts = server.report(), artifact.counts
    assert {"500", "429", "reset"} <= truth["faults"].keys() and len(truth["faults"].keys() & SPOILT.keys()) >= 3, "the faults were met"
    assert counts["requests"] == counts["asked"] == 60 and counts["stopped"] == "end" and counts["questions"]["requests"] == 0
    assert truth["undercuts_key"] == 0 and truth["billed_twice"] == 0 and truth["unique"] == 60
    spoilt = Counter({SPOILT[f]: n for f, n in truth["faults"].items() if f in SPOILT})
    assert counts["reasons"] == spoilt and counts["rejected"] == spoilt.total() and len(rows) == 60 - spoilt.total()
    assert all("unreadable" in r["reason"] for r in rejected if r["reason"].startswith("failed")), "nothing failed for want of patience"
    for row in rows:
        said = json.loads(row["messages"][-1]["content"])
        assert said.keys() == {"count", "colour"} and 0 <= said["count"] <= 9 and said["colour"] in ("red", "green")
    asked = {r["source"]: (r["messages"][0]["content"], r["messages"][1]["content"][1]["text"]) for r in rows}
    assert all(of == (("Count.", f"How many in {n}?") if n % 2 else ("Answer briefly.", "How many things?")) for n, of in numbered(asked))
    refused = {r["image"]: r["reason"] for r in rejected if "line" in r}
    assert "not found" in refused["photos/absent.png"] and 'no "image"' in refused["images.jsonl:62"]
    assert "http://127.0.0.1:9/a.jpg" in refused and "hidden" not in json.dumps(rejected)


def numbered(by_name):
    return [(int(name.removeprefix("photos/").removesuffix(".png")), of) for name, of in by_name.items()]


def test_retries_can_be_forbidden_and_what_failed_is_asked_again(ray_local, server, tmp_path):
    write_recipe(tmp_path, 'folder = "photos"\nprompts = ["What is this?"]\n')
    (tmp_path / "photos").mkdir()
    for i in range(40):
        (tmp_path / "photos" / f"{i:02}.jpg").write_bytes(picture(i))
    server.control(faults={"500": 0.2})
    assert graft("augment", tmp_path, "--max-retries", "0") == 0
    _, rows, rejected = made(tmp_path)
    truth = server.report()
    assert truth["requests"] == 40 and 0 < truth["faults"]["500"] == len(rejected) == 40 - len(rows)
    assert all(r["reason"].startswith("failed: no answer after 1 attempt") and r["image"] and r["prompt"] for r in rejected)
    server.control(faults={})
    assert graft("run", tmp_path, "--from", "augment") == 0
    _, rows, rejected = made(tmp_path)
    assert len(rows) == 40 and not rejected and server.report()["requests"] == 40 + truth["faults"]["500"]


def test_rows_are_exported_in_three_formats(ray_local, server, tmp_path, capsys):
    write_recipe(tmp_path, FOLDER)
    write_photos(tmp_path, 3)
    assert graft("augment", tmp_path) == 0
    artifact, rows, _ = made(tmp_path)
    names = [r["messages"][1]["content"][0]["image"] for r in rows]
    files = {name: (artifact.path / name).read_bytes() for name in names}
    out = {format: tmp_path / format / "rows.jsonl" for format in ("messages", "ms-swift", "llama-factory")}
    for format, path in out.items():
        path.parent.mkdir()
        assert graft("export", tmp_path, "--format", format, "--out", str(path)) == 0
        assert f"{len(rows)} rows and 3 images" in capsys.readouterr().out
        assert {f"images/{p.name}": p.read_bytes() for p in (path.parent / "images").iterdir()} == files
    swift, factory, plain = (list(read_jsonl(out[f])) for f in ("ms-swift", "llama-factory", "messages"))
    assert [r["images"] for r in swift] == [r["images"] for r in factory] == [[name] for name in names]
    assert [r["messages"][1]["content"] for r in swift] == ["<image>" + r["messages"][1]["content"][1]["text"] for r in rows]
    assert [r["conversations"][1] for r in factory] == [{"from": "gpt", "value": r["messages"][2]["content"]} for r in rows]
    assert {r["system"] for r in factory} == {"Answer briefly."} and "rows" in json.loads((tmp_path / "llama-factory/dataset_info.json").read_text())
    assert [r["messages"][1]["content"][0] for r in plain] == [{"type": "image", "image": name} for name in names]
    assert graft("export", tmp_path, "--format", "messages", "--out", str(out["messages"])) == 2
    assert "Traceback" not in (said := capsys.readouterr().err) and len(said.strip().splitlines()) == 1
