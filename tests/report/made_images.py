"""What made.py makes, of a recipe that shows images: drawings of known contents, in the artifacts as prepare, the shards, questions and evaluate write them."""

from __future__ import annotations

import hashlib
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from graft.core.rows import write_jsonl
from graft.data.drawings import COLOURS, COUNTS, KINDS, drawn

from .made import make, plan_in

KIND = {"look": "json", "name": "generation"}
TASKS = (
    f"evaluate.tasks={{{', '.join(f'{name} = {{ kind = {chr(34)}generation{chr(34)}, path = {chr(34)}notes.jsonl{chr(34)} }}' for name in KIND)}}}"
)
ASKED = ("What is drawn?", "圖中有幾個部分？", "Describe it in JSON.")


def drawing(n):
    """(PNG, what it shows)."""
    rng = random.Random(n)
    said = {"kind": rng.choice(list(KINDS)), "colour": rng.choice(list(COLOURS)), "count": rng.choice(COUNTS)}
    return drawn(said["kind"], said["colour"], said["count"], rng), said


def put(artifact, data, suffix="png"):
    """The part of a message that shows `data`, which is put into the artifact's images."""
    (artifact / "images").mkdir(exist_ok=True)
    name = f"{hashlib.sha256(data).hexdigest()}.{suffix}"
    (artifact / "images" / name).write_bytes(data)
    return {"type": "image", "file": name, "width": 112, "height": 112}


def text(said):
    return {"type": "text", "text": said}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def answers(rows=30):
    """{task: (questions with numbers in the images' place, predictions, what metrics.json says)}: an adapter that knows two of three, a base that is unreadable."""
    found = {}
    for name, kind in KIND.items():
        asked, lines = [], []
        for n in range(rows):
            said = drawing(n)[1]
            wanted = json.dumps(said) if kind == "json" else said["kind"]
            asked.append({"id": str(n), "messages": [{"role": "system", "content": "Look."}, user(n, text(ASKED[n % 3]))], "wanted": wanted})
            answer = wanted if n % 3 else json.dumps({**said, "colour": "pink"}) if n % 2 else json.dumps({"kind": said["kind"]})
            right, part = float(n % 3 > 0), (1.0 if n % 3 else 2 / 3 if n % 2 else 0.5)
            scores = {"valid": [float(n % 2 or n % 3 > 0)], "key_f1": [1.0], "item_f1": [part], "equal": [right], "unreadable": [0.0]}
            unread = {"valid": [0.0], "key_f1": [0.0], "item_f1": [0.0], "equal": [0.0], "unreadable": [1.0]}
            if kind == "generation":
                scores, unread = {"rougeL": [right]}, {"rougeL": [0.0]}
            base = {"answers": ["I see a drawing."], "scores": unread}
            lines.append({"id": str(n), "wanted": wanted, "adapter": {"answers": [answer], "scores": scores}, "base": base})
        mean = {"mean": 0.5, "low": 0.4, "high": 0.6, "rows": rows}
        told = {"kind": kind, "rows": rows, "systems": {s: {m: mean for m in lines[0][s]["scores"]} for s in ("adapter", "base")}}
        told["paired"] = {
            "of": "adapter less base",
            **{m: {"difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.04} for m in lines[0]["base"]["scores"]},
        }
        told["by_question"] = [{"question": q, "rows": rows // 3, "majority": 0.3, "adapter": 0.9 - n / 5, "base": 0.1} for n, q in enumerate(ASKED)]
        found[name] = (asked, lines, told)
    return found


def run_in(root, rows=30, shown=lambda artifact, n: [put(artifact, drawing(n)[0])], until="serve", steps=20, **changed):
    """The plan of a complete run. shown: the parts that question n shows; changed: of a task, (questions, predictions, told) in answers()' place."""
    tasks = answers(rows) | changed

    def also(draft, stage):
        counts, folder = draft.counts, draft.path
        if stage == "prepare":
            train = [
                {
                    "id": str(n),
                    "messages": [user(put(folder, drawing(n)[0]), text(ASKED[n % 3])), {"role": "assistant", "content": json.dumps(drawing(n)[1])}],
                }
                for n in range(100, 120)
            ]
            write_jsonl(folder / "rows" / "train.jsonl", train)
            chats = [
                [user(put(folder, drawing(n)[0]), text(f"<{n}>?")), {"role": "assistant", "content": drawing(n)[1]["colour"]}]
                for n in (200, 200, 201)
            ]
            (folder / "corpora" / "drawn").mkdir()
            pq.write_table(pa.table({"text": [json.dumps(chat) for chat in chats]}), folder / "corpora" / "drawn" / "00000.parquet")
            told = {"layout": "conversations", "files": 1, "records": 6, "documents": 3, "characters": 90}
            rejected = {"duplicate": 1, "image corrupt: broken data stream": 1, "image corrupt: no more": 1, "image not found": 1}
            counts["corpora"]["drawn"] = told | {"rejected": rejected, "changed": {"RGBA image to RGB": 2, "nfc.documents": 7}}
        elif stage == "augment":
            counts["images"] = {"in": 30, "kept": 27, "rejected": {"corrupt": 2, "duplicate": 1}}
        elif stage == "shard-sft":
            counts.update({split: {**counts[split], "images": n} for split, n in (("train", 1020), ("validation", 12))})
        elif stage == "questions":
            for name, (asked, _, _) in tasks.items():
                filled = [{**q, "messages": [_filled(m, folder, shown) for m in q["messages"]]} for q in asked]
                write_jsonl(folder / f"{name}.jsonl", filled)
            counts["look"]["changed"] = {"image turned upright": 3}

    return make(plan_in(root, TASKS), until, steps, tasks=tasks, also=also)


def _filled(message, artifact, shown):
    content = message["content"]
    if isinstance(content, list):
        content = [one for part in content for one in (shown(artifact, part) if isinstance(part, int) else [part])]
    return {**message, "content": content}


def noise(seed, width, height, path, **options):
    """An image that compresses to nothing."""
    data = random.Random(seed).randbytes(3 * width * height)
    Image.frombytes("RGB", (width, height), data).save(path, **options)
    return path.read_bytes()
