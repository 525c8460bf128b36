"""A recipe whose every stage is made by hand: manifests, metrics and predictions as the real stages write them, no Ray, no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from graft.core.rows import write_jsonl
from graft.core.shards import Columns, write_index, write_shard
from graft.core.stages import Plan

KINDS = {"chat": "generation", "reading": "choice", "maths": "exact", "texts": "perplexity"}
TASKS = f"evaluate.tasks={{{', '.join(f'{name} = {{ kind = {chr(34)}{kind}{chr(34)}, path = {chr(34)}notes.jsonl{chr(34)} }}' for name, kind in KINDS.items())}}}"
RECIPE = """
name = "made"
seed = 3
deepspeed = "zero2.json"
[augment]
seeds = "seeds.jsonl"
[corpora.notes]
path = "notes.jsonl"
[shard]
seq_len = 32
[base]
vocab_size = 400
hidden_size = 32
intermediate_size = 64
layers = 1
heads = 2
kv_heads = 1
[base.train]
corpora = ["notes"]
lora = false
[cpt]
corpora = ["notes"]
[sft]
"""
SHIBA = "請畫一隻在海邊散步的柴犬🐕"
CALL = 'call("generate_image", {"prompt": "柴犬"})'
MATRIX = {"call": {"call": 8, "text": 2, "malformed": 1}, "text": {"call": 3, "text": 9, "malformed": 0}}


def plan_in(root: Path, *overrides: str) -> Plan:
    root.mkdir(parents=True, exist_ok=True)
    (root / "made.toml").write_text(RECIPE, encoding="utf-8")
    (root / "zero2.json").write_text("{}")
    (root / "notes.jsonl").write_text('{"text": "海邊"}\n', encoding="utf-8")
    write_jsonl(root / "seeds.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": a}]} for a in (CALL, "b")])
    return Plan(root / "made.toml", overrides, root)


def make(plan: Plan, until: str = "serve", steps: int = 300, **fill: object) -> Plan:
    """Complete the stages up to `until`. fill: predictions, of the evaluation; metrics, of each training stage, or by stage; tasks, as tasks() gives
    them; also, called with each stage's draft and its name."""
    for stage in plan.stages:
        job = plan.resolve(stage)
        with job.writing() as draft:
            _fill(draft, stage, steps, fill)
            if "also" in fill:
                fill["also"](draft, stage)
        if stage == until:
            break
    return plan


def metrics(steps: int, resumed_at: int | None = None, left_out: int | None = None, validate_every: int = 50):
    """The lines of metrics.jsonl of a run on a GPU; resumed_at: 40 s passed before that step."""
    at = 1.7e9
    for step in range(steps):
        at += 0.5 + (40 if step == resumed_at else 0)
        yield {
            "step": step, "loss": None if step == left_out else 2 * math.exp(-step / 100) + 0.1, "lr": 1e-3 * (1 - step / steps), "grad_norm": 0.5, "tokens": 1000,
            "targets": 900, "data_s": 0.01, "step_time_s": 0.5, "total_steps": steps, "tokens_per_s": 2000.0, "tflops_per_process": 1.5, "mfu_nominal": 0.31, "mfu_measured": 0.41,
            "peak_mem_gib": 20.5, "predicted_mem_gib": 21.0, "micro_batch": 2, "activation_checkpointing": "none", "ended_unix_s": at,
            **({"skipped": "the loss is nan", "bins": [1]} if step == left_out else {}),
            **({"validation_loss": 1.5 - step / steps} if (step + 1) % validate_every == 0 else {}),
        }  # fmt: skip


def predictions():
    """One row a cell count of MATRIX; the answers grow longer."""
    cells = [(label, predicted) for label, row in MATRIX.items() for predicted, n in row.items() for _ in range(n)]
    for n, (label, predicted) in enumerate(cells):
        answer = {"call": CALL, "text": "我" * (n + 1), "malformed": "call("}[predicted]
        argument = "柴犬" if predicted == "call" else None
        wanted = "柴犬" if label == "call" else None
        yield {
            "id": str(n), "family": f"{label}-{n % 2:02d}", "label": label, "predicted": predicted, "user": f"{SHIBA} {n}", "answer": answer,
            "reason": "no JSON" if predicted == "malformed" else None, "argument": argument, "wanted_argument": wanted,
        }  # fmt: skip


def tasks(rows=30):
    """{name: (questions, predictions, what metrics.json says)} of a task of each kind, as data/questions.py and evaluate/tasks.py write them."""
    found = {}
    for name, kind in KINDS.items():
        asked, lines = [], []
        for n in range(rows):
            say = [{"role": "user", "content": f"{SHIBA} {n} of {name}"}]
            replies = [f"{letter}. {'海山河湖'[at]} {n}" for at, letter in enumerate("ABCD")]
            more = {
                "generation": {"messages": [{"role": "system", "content": "short"}, *say], "wanted": f"wanted {n}"},
                "choice": {
                    "messages": [{"role": "user", "content": "文" * 3000 + f" question {n}"}],
                    "options": replies,
                    "replies": replies,
                    "right": n % 4,
                },
                "exact": {"messages": say, "wanted": f"so #### {n}"},
                "perplexity": {"text": f"text {n} " + "海" * 40},
            }[kind]
            asked.append({"id": str(n), **more})
            lines.append({"id": str(n), **({"wanted": more.get("wanted", more.get("right"))} if kind != "perplexity" else {})})
            for system, offset in (("adapter", 1), ("base", 0)):
                right, unread = float((n + offset) % 3 > 0), float(n % 7 == 0 and (n + offset) % 3 == 0)
                scores = {
                    "generation": {"rouge1": [0.5, 0.5], "rougeL": [n / rows, (n + offset) / rows], "equal": [0.0, 0.0]},
                    "choice": {"correct": [right], "unreadable": [unread]},
                    "exact": {"correct": [right], "unreadable": [unread]},
                }.get(kind)
                own = {"answers": [f"{system} says {n}"] * (2 if kind == "generation" else 1), "scores": scores}
                own |= {"loglikelihoods_nats": [-3.0, -2.0 - offset, -2.5, -9.0]} if kind == "choice" else {}
                lines[-1][system] = own if scores else {"nats": 50.0 + n - 10 * offset, "tokens": 20 if n else 0}
        mean = {"mean": 0.5, "low": 0.4, "high": 0.6, "rows": rows}
        names = {"perplexity": ["perplexity", "bits_per_character", "nats_per_token"], "generation": ["bleu", "rouge1", "rougeL", "equal"]}.get(kind)
        names = names or ["correct", "unreadable", *(["correct_loglikelihood", "correct_loglikelihood_per_character"] if kind == "choice" else [])]
        told = {
            "kind": kind,
            "rows": rows,
            "systems": {s: dict.fromkeys(names, mean | ({"std": 0.01} if kind == "generation" else {})) for s in ("adapter", "base")},
        }
        apart = {"difference": 0.1, "low": -0.05, "high": 0.25, "p": 0.04, "wins": 5, "losses": 2}
        told["paired"] = {"of": "adapter less base", **{m: apart for m in names if m not in ("bleu", "perplexity", "bits_per_character")}}
        found[name] = (asked, lines, told)
    return found


def _fill(draft, stage, steps, fill):
    folder, counts = draft.path, draft.counts
    if stage == "augment":
        write_jsonl(folder / "rows.jsonl", [{"id": "0"}])
        counts.update(
            rows={"call": 60, "text": 55}, seeds=4, requests=23, failed=1, rewrites=120, accepted=111, rejected=9, reasons={"similar": 5, "short": 4},
            stopped={"call": "target", "text": "saturation"}, endpoint="api.example.com", sent=23,
        )  # fmt: skip
        draft.cost.update(usd_of_recipe=1.25, usd_of_run=0.5, usd_presumed=0.0, usd_per_accepted_row=0.004, tokens_of_recipe=98_765, retries=2)
    elif stage == "prepare":
        (folder / "corpora").mkdir()
        (folder / "corpora" / "notes.jsonl").write_text("{}\n")
        found = fill.get("predictions") or list(predictions())
        write_jsonl(
            folder / "rows" / "test.jsonl", [{"id": p["id"], "messages": [{"role": "assistant", "content": f"wanted of {p['id']}"}]} for p in found]
        )
        counts.update(
            corpora={"notes": {"layout": "text", "files": 1, "records": 30, "documents": 28, "characters": 900, "rejected": {"duplicate": 2}, "changed": {}}},
            rows={"in": 115, "kept": 110, "rejected": {"contaminated": 5}, "train": {"call": 40, "text": 30}, "validation": {"call": 5, "text": 5}, "test": {"call": 11, "text": 12}},
            families={"train": 6, "test": 4},
        )  # fmt: skip
    elif stage.startswith("shard-"):
        for split in ("train", "validation"):
            _shard(folder / split)
        shares = {"rows": 1.0} if stage == "shard-sft" else {"notes": 1.0}
        split = {"bins": 6, "documents": 12, "tokens": 150, "supervised_tokens": 100, "cost": 999, "utilisation": 0.78, "shares": shares}
        counts.update({"in": 12, "kept": 11, "rejected": {"too long": 1}, "train": split, "validation": split})
    elif stage in ("base", "cpt", "sft"):
        lines = fill.get("metrics")
        write_jsonl(folder / "metrics.jsonl", (lines.get(stage) if isinstance(lines, dict) else lines) or metrics(steps))
        counts.update(
            loss=0.2, validation_loss=0.5, tokens_per_s=2000.0, steps=steps, tokens=steps * 1000, processes=2, skipped_steps=0, device_hours=3.5
        )
    elif stage == "questions":
        for name, (asked, _, told) in (fill.get("tasks") or tasks()).items():
            counts[name] = {"kind": told["kind"], "rows": write_jsonl(folder / f"{name}.jsonl", asked), "refused": {}}
    elif stage == "evaluate":
        found = fill.get("predictions") or list(predictions())
        write_jsonl(folder / "predictions.jsonl", found)
        score = {
            "accuracy": 0.74,
            "strict": {"precision": 0.73, "recall": 0.72, "f1": 0.725},
            "intent": {"precision": 0.7, "recall": 0.8, "f1": 0.75},
        }
        scores = {name: score for name in ("adapter", "base", "always-call", "always-text")}
        families = {"call-00": 0.5, "call-01": 1.0, "text-00": 0.75}
        sure = {"accuracy": [0.7, 0.8], "strict": {"precision": [0.6, 0.8], "recall": [0.6, 0.8], "f1": [0.65, 0.77]}, "intent": {"f1": [0.7, 0.8]}}
        apart = {"of": "adapter less base", "strict": {"f1": {"difference": 0.1, "low": -0.02, "high": 0.2, "p": 0.1}}}
        certain = {"families": 3, "intervals": {name: sure for name in scores}, "paired": apart}
        told = {"rows": len(found), "scores": scores, **certain, "confusion": MATRIX, "per_family_accuracy": families, "argument_exact_share": 0.9}
        if (folder.parents[3] / "data_shards/made/questions").exists():
            made = fill.get("tasks") or tasks()
            told["tasks"] = {name: of for name, (_, _, of) in made.items()}
            for name, (_, lines, _) in made.items():
                write_jsonl(folder / f"predictions-{name}.jsonl", lines)
        (folder / "metrics.json").write_text(json.dumps(told))
        counts.update(rows=len(found), strict_f1=0.725, accuracy=0.74, best_constant_f1=0.65, failures=6)
    else:
        (folder / "made.json").write_text("{}")
        counts.update(first_token_s=0.04) if stage == "serve" else counts.update(layers=2)


def _shard(folder):
    folder.mkdir()
    lens = np.array([10, 12, 3, 20, 16, 16, 5, 5, 1, 30, 12, 20], np.int32)
    ids = np.ones((6, 32), np.int32)
    bins = Columns(ids, np.zeros((6, 32), np.uint8), lens, np.arange(0, 13, 2), np.zeros(12, np.int32), np.arange(12))
    write_index(folder, seq_len=32, pad_id=0, tokenizer="t", shards=[write_shard(folder / "0.arrow", bins, ["notes"])])
