"""The half of precision.py that needs graft whole: a tokenizer and packed shards, which the other half trains on elsewhere.

The base reads Taiwanese news, Wikipedia articles (DRCD) and GSM8K's first 1,000 problems in chat markup, so that LoRA meets no
token that is new to the frozen embedding; the task is to answer the problems that follow. 40 s on two cores.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from small_base import ROOT, TINY_BASE, Base, articles, hand_over, size


@dataclass(frozen=True)
class Scale(Base):
    """Of the data, the base and both trainings."""

    documents: int = 100_000  # of news and of articles, at most
    shown: int = 1000  # problems for the base
    problems: int = 10_000  # that follow, at most: the task
    batch: int = 8  # bins
    lr: float = 1e-3
    epochs: float = 3.0
    every: int = 25  # steps between two held-out losses
    learns: float = 0.05  # share of its held-out loss that bf16 must lose, else the comparison says nothing


TINY = Scale(**TINY_BASE, documents=40, shown=400, problems=400, batch=4, lr=1e-2, epochs=3)
RECIPE = """
name = "precision-data"
deepspeed = "{root}/configs/deepspeed/zero2.json"
[corpora.taigi]
path = "{data}/taigi_news.txt"
documents = {documents}
[corpora.drcd]
path = "drcd.jsonl"
clean = {{ merge_by = "title" }}
documents = {documents}
[corpora.shown]
path = "shown.jsonl"
[corpora.problems]
path = "problems.jsonl"
[shard]
seq_len = {seq_len}
[base]  # of which the tokenizer alone is wanted
vocab_size = {vocabulary}
hidden_size = 8
layers = 1
heads = 1
kv_heads = 1
[base.train]
corpora = ["taigi", "drcd", "shown"]
lora = false
[sft]
corpora = ["problems"]
"""


def prepare(folder: Path, data: Path, scale: Scale) -> None:
    """Write folder/tokenizer, and folder/base and folder/sft with train and validation shards; nothing in it names a place."""
    from graft import pipeline
    from graft.core.rows import read_jsonl, write_jsonl
    from graft.core.stages import Plan
    from graft.model.chat import in_chatml

    if folder.exists():
        sys.exit(f"{folder} exists: remove it, or name another folder")
    with tempfile.TemporaryDirectory(prefix="graft-") as own:
        home = Path(own)
        write_jsonl(home / "drcd.jsonl", articles(data))
        rows = list(read_jsonl(data / "gsm8k_train.jsonl"))
        chats = [[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows]
        write_jsonl(home / "shown.jsonl", [{"text": in_chatml(chat)} for chat in chats[: scale.shown]])
        write_jsonl(home / "problems.jsonl", [{"messages": chat} for chat in chats[scale.shown : scale.shown + scale.problems]])
        (home / "recipe.toml").write_text(RECIPE.format(root=ROOT, data=data, **asdict(scale)), encoding="utf-8")
        plan = Plan(home / "recipe.toml", (), home)
        pipeline.run(plan, until="shard-sft")
        hand_over(plan, folder, ["base", "sft"])
    print(size(folder))
