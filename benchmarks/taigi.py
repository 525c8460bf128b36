"""taigi-13b at its full shape: CPT, merge, SFT, evaluation and answers.csv, from random weights, over real Taigi text and DRCD's questions.

    python benchmarks/taigi.py --prepare DIR              (two minutes on two cores; DIR has 24 MB and can be moved)
    python benchmarks/taigi.py --train DIR --out RESULT   (9 minutes on an H200, 60 GB of disk; needs neither Ray nor the data stages)

It is configs/recipes/taigi-13b.toml through `graft run` and `graft predict`, a process a stage, with its steps cut to --steps and two things in place of
what cannot be had: the base is of Taigi-Llama-2-13B's shape with weights drawn by a seed, its tokenizer learns the articles here. The articles are
the Taiwanese news, the questions DRCD's with three other answers from the same article. Of random weights every answer is a guess: this says that the stages run at this size,
how long they take and how much memory. RESULT gets taigi.json, taigi.md, answers.csv and the evaluation. `--tiny`, for both halves: one small layer on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cpt_data import news
from small_base import ROOT, hand_over, machine, said_of_machine, size, where

RECIPE = ROOT / "configs/recipes/taigi-13b.toml"
LIKE, TINY = "taigi-llama-2-13b", {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 1, "num_attention_heads": 2}
VOCABULARY = 8192
ASKED = 100  # questions of the exam
OPTIONS = 4
STAGES = ("cpt", "merge", "sft", "evaluate")


# ---- data -------------------------------------------------------------------------------------------------------------
def prepare(folder: Path, data: Path, tiny: bool) -> None:
    """Write folder/given, which the recipe's corpora and exam are, folder/tokenizer, folder/{cpt,sft} with their shards and folder/questions."""
    from graft import pipeline
    from graft.core.rows import write_jsonl
    from graft.core.stages import Plan

    if folder.exists():
        sys.exit(f"{folder} exists: remove it, or name another folder")
    given = folder / "given"
    articles = list(news((data / "taigi_news.txt").read_text(encoding="utf-8")))[: 60 if tiny else None]
    (given / "articles").mkdir(parents=True)
    records = [{"title": text.partition("\n")[0], "text": text.partition("\n")[2]} for text in articles]
    (given / "articles/news.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    about = [list(items(article)) for article in json.loads((data / "drcd_dev.json").read_text(encoding="utf-8"))["data"]]
    random.Random(0).shuffle(about)  # whole articles: none is in both
    exam: list[dict[str, Any]] = []
    while len(exam) < (8 if tiny else ASKED):
        exam += about.pop()
    write_jsonl(given / "exam.jsonl", exam[: 8 if tiny else ASKED])
    write_jsonl(given / "questions.jsonl", [item for own in about for item in own][: 60 if tiny else None])
    with tempfile.TemporaryDirectory(prefix="graft-") as own:
        embedded = [f"base.vocab_size={VOCABULARY}", "base.hidden_size=8", "base.heads=1", "base.kv_heads=1", "base.layers=1"]
        embedded += ['base.train.corpora=["articles", "questions"]', "base.train.lora=false", "model.base=embedded"]
        plan = Plan(RECIPE, (*overrides(folder), *embedded), Path(own))
        pipeline.run(plan, until="shard-sft")
        hand_over(plan, folder, ["cpt", "sft"])
        shutil.copytree(plan.artifact("questions").path, folder / "questions", ignore=shutil.ignore_patterns("manifest.json"))
    print(size(folder))


def overrides(data: Path) -> tuple[str, ...]:
    given = data.resolve() / "given"
    paths = {"corpora.articles": "articles", "corpora.questions": "questions.jsonl", "evaluate.tasks.reading": "exam.jsonl"}
    return tuple(f"{section}.path={given / name}" for section, name in paths.items())


def items(article: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A question with four options of each of DRCD's, where its article has three other answers."""
    draw = random.Random(article["id"])
    asked = [(p["context"], qa["question"], qa["answers"][0]["text"], qa["id"]) for p in article["paragraphs"] for qa in p["qas"]]
    answers = sorted({answer for _, _, answer, _ in asked})
    for context, question, answer, number in asked:
        others = [a for a in answers if a not in answer and answer not in a]
        if len(others) >= OPTIONS - 1:
            options = draw.sample([answer, *draw.sample(others, OPTIONS - 1)], OPTIONS)
            found = {"id": number, "article": context, "question": question, "answer": options.index(answer) + 1}
            yield found | {f"option{n}": option for n, option in enumerate(options, 1)}


# ---- the half on the GPU ----------------------------------------------------------------------------------------------
def train(args: argparse.Namespace) -> None:
    """Every step whose figures are not yet in the workspace."""
    from graft.core.rows import read_jsonl, write_jsonl
    from graft.core.stages import Plan

    data, home, out = args.train.resolve(), args.workspace.resolve(), args.out.resolve()
    for folder in (home, out):
        folder.mkdir(parents=True, exist_ok=True)
    kept = home / "taigi.json"
    told = {**machine(where()), "command": shlex.join(["python", *sys.argv]), "steps": {}}
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else told

    def step(name: str, act: Callable[[], dict[str, Any]]) -> None:
        if name not in result["steps"]:
            began_s = time.perf_counter()
            figures = act()
            result["steps"][name] = {"wall_s": time.perf_counter() - began_s, **figures}
            kept.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
            print(f"{name}: {result['steps'][name]}", flush=True)

    base = home / "base"
    step("base", lambda: {"weights": write_base(base, data / "tokenizer", args.tiny)})
    cut = ("tracking.wandb=off", f"cpt.max_steps={args.steps}", f"sft.max_steps={args.steps}", f"model.base={base}")
    plan = Plan(RECIPE, (*overrides(data), *cut, *args.set), home)

    def give() -> dict[str, Any]:
        for stage, source in (("prepare", None), ("questions", "questions"), ("shard-cpt", "cpt"), ("shard-sft", "sft")):
            with plan.resolve(stage).writing() as draft:
                if source:
                    shutil.copytree(data / source, draft.path, dirs_exist_ok=True)
        return {}

    words = [str(plan.path), *(word for o in plan.overrides for word in ("--set", o)), "--workspace", str(home)]

    def run(stage: str) -> dict[str, Any]:
        graft("run", *words, "--only", stage)
        return dict(plan.artifact(stage).counts)

    def predict() -> dict[str, Any]:
        write_jsonl(home / "asked.jsonl", ({k: v for k, v in row.items() if k != "answer"} for row in read_jsonl(data / "given/exam.jsonl")))
        graft("predict", *words, "--file", str(home / "asked.jsonl"), "--out", str(home / "answers.csv"))
        answers = (home / "answers.csv").read_text(encoding="utf-8").splitlines()[1:]
        return {"rows": len(answers), "answered": sum(not line.endswith(",") for line in answers)}

    step("base hashed, shards given", give)
    for stage in STAGES:
        step(stage, partial(run, stage))
    step("predict", predict)
    for file in (kept, home / "answers.csv", *(plan.artifact("evaluate").path / name for name in ("metrics.json", "report.txt"))):
        shutil.copy(file, out)
    (out / "taigi.md").write_text(report(result), encoding="utf-8")
    print(report(result))


def write_base(folder: Path, tokenizer_folder: Path, tiny: bool) -> int:
    """The model folder; the number of weights."""
    from transformers import AutoConfig

    from graft.model.chat import load_tokenizer
    from graft.model.shapes import SHAPES, write_random_base

    if tiny:
        SHAPES["tiny"] = {**SHAPES[LIKE], **TINY, "num_key_value_heads": TINY["num_attention_heads"]}
    weights = write_random_base("tiny" if tiny else LIKE, folder)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    config = AutoConfig.from_pretrained(folder)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return weights


def graft(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "graft.cli", *words], env={**os.environ, "GRAFT_PROCESSES": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"graft {words[0]}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def report(result: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else json.dumps(value, ensure_ascii=False)

    lines = ["| step | wall time | what |", "|---|---|---|"]
    for name, told in result["steps"].items():
        lines.append(f"| {name} | {told['wall_s']:.0f} s | {', '.join(f'{k} {shown(v)}' for k, v in told.items() if k != 'wall_s')} |")
    return "\n".join(lines) + f"\n\nRandom weights: every answer is a guess. {said_of_machine(result)}\n\n    {result['command']}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    half = parser.add_mutually_exclusive_group(required=True)
    half.add_argument("--prepare", type=Path, metavar="DIR")
    half.add_argument("--train", type=Path, metavar="DIR")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="the folder with taigi_news.txt and drcd_dev.json")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--workspace", type=Path, default=Path("/tmp/graft-taigi"), help="55 GB; what is complete there is not done again")
    parser.add_argument("--steps", type=int, default=20, help="of each training stage")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.prepare:
        prepare(args.prepare, args.data.resolve(), args.tiny)
    else:
        train(args)


if __name__ == "__main__":
    main()
