"""A recipe of drawings whose parents of training are made by hand: a tiny random Qwen2.5-VL, and shards of image rows, no Ray; and an adapter as if it
had been trained on them."""

import json
from collections import Counter
from pathlib import Path

import torch

from graft.core.recipe import Train
from graft.core.sections import Corpus, Mcq
from graft.core.shards import write_index
from graft.core.stages import Plan
from graft.data.corpora import made
from graft.data.pictures import Pictures
from graft.data.shard import probes_of, shard_documents
from graft.data.tokenizer import VISION, train_tokenizer
from graft.model.chat import files_of, load_tokenizer, save_tokenizer, tokenizer_digest
from graft.model.images import ImageProcessor, copy_config
from graft.model.lora import adapters, save_adapter
from graft.train.build import build
from graft.train.parity import record

from ..model.tiny_vision import write

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = """
name = "seen"
seed = 3
deepspeed = "{configs}/deepspeed/zero2.json"
[corpora.drawn]
kind = "drawings"
documents = 14
[corpora.self]
kind = "identity"
name = "n"
author = "a"
documents = 4
[shard]
seq_len = 192
[model]
base = "base"
precision = "fp32"
[sft]
corpora = ["drawn", "self"]
lora = {{ r = 4, alpha = 8 }}
lr = 1e-2
epochs = 4
max_steps = 4
global_batch = 4
micro_batch = 2
save_every = 2
validate_every = 2
"""


def vision_plan(root: Path, *overrides: str) -> Plan:
    """A plan in `root` whose sft stage is ready to run."""
    root.mkdir(exist_ok=True)
    if not (root / "seen.toml").exists():
        (root / "seen.toml").write_text(RECIPE.format(configs=CONFIGS))
        texts = [m["content"] for row in made(Corpus(kind="drawings", documents=9)) for m in row["messages"]]
        tokenizer = train_tokenizer(texts, 300, images=True)
        write(root / "base", vocab_size=len(tokenizer), images={t: tokenizer.convert_tokens_to_ids(t) for t in VISION})
        tokenizer.save_pretrained(root / "base", save_jinja_files=False)
    plan = Plan(root / "seen.toml", overrides, root)
    for stage, fill in (("prepare", _prepared), ("shard-sft", _sharded)):
        job = plan.resolve(stage)
        if job.artifact is None:
            with job.writing() as draft:
                fill(draft.path, plan)
    return plan


def _prepared(folder, plan):
    pictures = Pictures(folder / "images", None, Counter())
    (folder / "corpora").mkdir()
    with (folder / "corpora" / "rows.jsonl").open("w") as f:
        for corpus in plan.recipe.corpora.values():
            for value in made(corpus):
                f.write(json.dumps({"messages": pictures.messages(value, "messages", Mcq())[0]}) + "\n")


def _sharded(folder, plan):
    prepared, source = plan.artifact("prepare").path, (str(plan.beside("base")), None, "tokenizer")
    file = {"path": str(prepared / "corpora" / "rows.jsonl"), "name": "rows", "kind": "chat", "split": None, "weight": 1.0}
    spec = {"files": [file], "source": source, "seq_len": plan.recipe.shard.seq_len, "bins_per_shard": 8, "pack": False, "pad": 3}
    report = shard_documents(spec | {"images": plan.recipe.shard.image_pixels, "held_out": 0.2}, folder)
    tokenizer = load_tokenizer(*source)
    digest = tokenizer_digest(tokenizer)
    for split in ("train", "validation"):
        write_index(folder / split, seq_len=plan.recipe.shard.seq_len, pad_id=3, tokenizer=digest, shards=report[split])
    (folder / "rejected.jsonl").unlink()
    (folder / "images").mkdir()
    chats = [json.loads(line)["messages"] for line in (prepared / "corpora" / "rows.jsonl").read_text().splitlines()]
    for name in (name for messages in chats for name in files_of(messages)):
        (folder / "images" / name).write_bytes((prepared / "images" / name).read_bytes())
    probes = probes_of(tokenizer, [*chats[:2], *chats[-2:]], ImageProcessor(source[0], None, plan.recipe.shard.image_pixels))
    (folder / "probes.json").write_text(json.dumps(probes, ensure_ascii=False))


def as_trained(plan: Plan, folder: Path) -> Path:
    """Write a random adapter of the tower and of the recipe's targets, and what training leaves beside it."""
    base, revision = plan.base_model("sft")
    lora = plan.recipe.train_stage("sft").lora
    model = build(base, revision, "fp32", Train(lora=lora, train_vision=True), 0, torch.device("cpu"))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, _, b in adapters(model.lm):
            b.normal_(std=0.3)
    folder.mkdir()
    save_adapter(model.lm, lora, folder, base)
    tokenizer = load_tokenizer(base, revision)
    save_tokenizer(tokenizer, folder)
    copy_config(base, revision, folder)
    record(plan.resolve("sft"), model, tokenizer, folder)
    return folder
