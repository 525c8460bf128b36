"""Exports read back: the same texts, images in their places, nothing overwritten and nothing left behind."""

import hashlib
import json
import os

import pytest
from PIL import Image

from graft.core.artifact import writing
from graft.core.errors import ArtifactError, ConfigError
from graft.core.rows import read_jsonl, write_jsonl
from graft.data.export import JOINER, export

TAGS = ["image", "video", "audio", "img", "bbox", "ref-object", "cot-process", "start-image"]
NASTY = [
    "<image>",
    "a <image> b<video><audio>",
    f"<{JOINER}image> was escaped before",
    "<img>x.jpg</img>",
    "<bbox><ref-object>",
    "<imagery> <p>",
    "圖<image>片",
]


def text_row(n, user, system=None):
    head = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": f"答{n} <image>"}]
    return {"id": f"t{n}", "messages": [*head, *turns], "label": "text", "family": "text-00", "parent": None, "request": None}


def artifact(root, rows, name="rows-1", images=()):
    with writing(root / name, kind="augment", fingerprint="f", head={}) as draft:
        (draft.path / "images").mkdir()
        for data in images:
            (draft.path / "images" / f"{hashlib.sha256(data).hexdigest()}.jpg").write_bytes(data)
        write_jsonl(draft.path / "rows.jsonl", rows)
    return root / name


def jpeg(tmp_path, colour):
    Image.new("RGB", (8, 8), colour).save(tmp_path / "x.jpg")
    return (tmp_path / "x.jpg").read_bytes()


def image_row(n, data, user, system=None):
    row, sha = text_row(n, user, system), hashlib.sha256(data).hexdigest()
    row["messages"][-2]["content"] = [{"type": "image", "image": f"images/{sha}.jpg", "sha256": sha}, {"type": "text", "text": user}]
    return row


@pytest.fixture
def pictured(tmp_path):
    """(artifact of two images and all NASTY texts, its rows)"""
    data = [jpeg(tmp_path, c) for c in ("red", "blue")]
    rows = [image_row(n, data[n % 2], user, "看圖" if n % 2 else None) for n, user in enumerate(NASTY)]
    return artifact(tmp_path, rows, images=data), rows


def spoken(row):
    """The texts of a graft row."""
    return ["".join(p.get("text", "") for p in m["content"]) if isinstance(m["content"], list) else m["content"] for m in row["messages"]]


def restored(text):
    return text.replace(f"<{JOINER}", "<")


def read_back(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else list(read_jsonl(path))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_ms_swift_gives_the_same_texts_and_one_tag_an_image(pictured, tmp_path, suffix):
    path, rows = pictured
    out = tmp_path / "swift" / f"train.{suffix}"
    counts = export(path, "ms-swift", out)
    found = read_back(out)
    for row, swift in zip(rows, found, strict=True):
        assert [m["role"] for m in swift["messages"]] == [m["role"] for m in row["messages"]]
        user = swift["messages"][-2]["content"]
        assert user.startswith("<image>") and len(swift["images"]) == 1
        texts = [m["content"] for m in swift["messages"]]
        assert sum(text.count(f"<{tag}>") for text in texts for tag in TAGS) == 1, "no text of the row's own is a tag"
        assert [restored(t.removeprefix("<image>") if t is user else t) for t in texts] == spoken(row)
        image = out.parent / swift["images"][0]
        assert hashlib.sha256(image.read_bytes()).hexdigest() == image.stem and os.stat(image).st_nlink == 2
    assert counts == {"rows": 7, "images": 2, "escaped": 6 + 7} and "圖" in out.read_text(encoding="utf-8")


def test_llama_factory_finds_rows_images_and_its_entry(pictured, tmp_path):
    path, rows = pictured
    out = tmp_path / "lf" / "vqa.json"
    out.parent.mkdir()
    (out.parent / "dataset_info.json").write_text('{"theirs": {"file_name": "x.json"}}')
    export(path, "llama-factory", out)
    info = json.loads((out.parent / "dataset_info.json").read_text(encoding="ascii"))
    assert info["theirs"] == {"file_name": "x.json"}
    assert info["vqa"] == {
        "file_name": "vqa.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system", "images": "images"},
    }
    for row, found in zip(rows, read_back(out), strict=True):
        assert [t["from"] for t in found["conversations"]] == ["human", "gpt"]
        texts = [t["value"] for t in found["conversations"]]
        assert sum(text.count(f"<{tag}>") for text in texts for tag in ("image", "video", "audio")) == len(found["images"]) == 1
        system = [found["system"]] if found["system"] else []
        assert [*system, restored(texts[0].removeprefix("<image>")), restored(texts[1])] == spoken(row)
    with pytest.raises(ConfigError, match=r"another data set 'vqa'"):
        export(path, "llama-factory", out.with_suffix(".jsonl"))
    assert sorted(p.name for p in out.parent.iterdir()) == ["dataset_info.json", "images", "vqa.json"]


def test_messages_load_as_one_table(pictured, tmp_path):
    from datasets import load_dataset

    path, rows = pictured
    out = tmp_path / "plain" / "rows.jsonl"
    assert export(path, "messages", out)["escaped"] == 0
    table = load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    for row, found in zip(rows, table, strict=True):
        assert [m["role"] for m in found["messages"]] == [m["role"] for m in row["messages"]]
        assert ["".join(p.get("text") or "" for p in m["content"]) for m in found["messages"]] == spoken(row)
        assert (out.parent / found["messages"][-2]["content"][0]["image"]).is_file()


@pytest.mark.parametrize("format", ["ms-swift", "llama-factory", "messages"])
def test_rows_of_text_alone(tmp_path, format):
    rows = [text_row(n, user) for n, user in enumerate(NASTY)]
    out = tmp_path / "out" / "rows.jsonl"
    assert export(artifact(tmp_path, rows), format, out)["images"] == 0
    for row, found in zip(rows, read_back(out), strict=True):
        assert set(found) == {"conversations" if format == "llama-factory" else "messages"}
        turns = found.get("conversations") or found["messages"]
        assert [restored(t.get("value") or t["content"]) if format != "messages" else t["content"] for t in turns] == spoken(row)
    if format == "messages":
        assert [r["messages"] for r in read_back(out)] == [r["messages"] for r in rows]


def test_nothing_is_overwritten_and_nothing_left_behind(pictured, tmp_path):
    path, rows = pictured
    name = rows[-1]["messages"][-2]["content"][0]["image"]
    out = tmp_path / "there" / "rows.jsonl"
    out.parent.mkdir()
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"rows\.jsonl exists"):
        export(path, "ms-swift", out)
    assert out.read_text() == "mine" and os.listdir(out.parent) == ["rows.jsonl"]
    out.unlink()
    (out.parent / "images").mkdir()
    (out.parent / name).write_bytes(b"another")
    with pytest.raises(ConfigError, match="is another image"):
        export(path, "ms-swift", out)
    assert os.listdir(out.parent) == ["images"] and os.listdir(out.parent / "images") == [os.path.basename(name)], "what was placed is gone again"
    (out.parent / name).unlink()
    assert export(path, "ms-swift", out)["images"] == 2
    assert export(path, "messages", out.with_name("again.jsonl"))["images"] == 2, "the same images serve two files"
    for format, target, message in [
        ("alpaca", "a.json", "unknown export format 'alpaca'"),
        ("messages", "a.txt", "ends neither in"),
        ("messages", str(path / "a.json"), "lies in the artifact"),
    ]:
        with pytest.raises(ConfigError, match=message):
            export(path, format, tmp_path / target)


def test_a_damaged_artifact_is_refused(pictured, tmp_path):
    path, rows = pictured
    out = tmp_path / "out" / "a.json"
    image = path / rows[0]["messages"][-2]["content"][0]["image"]
    good = image.read_bytes()
    image.write_bytes(bytes(len(good)))
    with pytest.raises(ArtifactError, match=r"was altered"):
        export(path, "messages", out)
    image.unlink()
    with pytest.raises(ArtifactError, match=r"is missing"):
        export(path, "messages", out)
    with pytest.raises(ArtifactError, match=r"which the artifact does not hold"):
        export(artifact(tmp_path, rows, "bare"), "messages", out)
    with pytest.raises(ArtifactError, match=r"is empty"):
        export(artifact(tmp_path, [], "empty"), "messages", out)
    assert not out.parent.exists()
