"""Training speed on images: 20 steps of configs/recipes/ui-vqa-7b.toml on one GPU in bf16, fp8 and nf4, beside TRL's or transformers' same work.

    python benchmarks/vision_gpu.py --prepare DIR              (on the CPU, a minute; DIR has 6 MB and can be moved)
    python benchmarks/vision_gpu.py --train DIR --out RESULT   (on the GPU, 9 minutes, 18 GB of disk; needs neither Ray nor the data stages)

The recipe as it is, through `accelerate launch -m graft.train`, but for its base, Qwen2.5-VL-7B's shape with random weights, its rows, the drawn screens of
vision_data.py, and its steps. A peer (vision_gpu_peers.py) trains on the same tokens, images and targets in the same order, with the same LoRA and batch; it has
no FP8 base, so its bf16 stands beside that. Runs are interleaved, a process each. Figures are medians of the steps after the first five: tokens without padding
and images a second, what the step waited for data; and the highest memory of all steps. RESULT gets vision_gpu.json after each run and vision_gpu.md;
what stands there is not run again. `--tiny`, for both halves: a small shape on the CPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from small_base import ROOT, machine, said_of_machine, size, where
from train_gpu import SETTLE, attempt, finished, installed
from vision_data import prepare

RECIPE = ROOT / "configs/recipes/ui-vqa-7b.toml"
LIKE, STEPS = "qwen2.5-vl-7b", 20
TINY_TEXT = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 60, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
TINY_SET = ("sft.global_batch=2", "shard.seq_len=1024", "shard.image_pixels=50176")
PRECISIONS = ("bf16", "fp8", "nf4")
HEAD = ("base", "of", "tokens/s", "to the best peer", "images/s", "step", "waited for data", "peak GiB", "first step", "loss, first and last")


# ---- what is given ----------------------------------------------------------------------------------------------------
def write_base(folder: Path, tokenizer_folder: Path, tiny: bool) -> int:
    """The model folder; the number of weights."""
    from transformers import AutoConfig

    from graft.data.tokenizer import VISION
    from graft.model.chat import load_tokenizer
    from graft.model.shapes import SHAPES, write_random_base

    if tiny:
        real = SHAPES[LIKE]
        rotary = real["text_config"]["rope_parameters"] | {"mrope_section": [2, 3, 3]}
        SHAPES["tiny"] = real | {
            "text_config": real["text_config"] | TINY_TEXT | {"rope_parameters": rotary},
            "vision_config": real["vision_config"] | TINY_TOWER,
        }
    weights = write_random_base("tiny" if tiny else LIKE, folder)
    tokenizer, config = load_tokenizer(str(tokenizer_folder)), AutoConfig.from_pretrained(folder)
    config.vision_start_token_id, config.vision_end_token_id, config.image_token_id = tokenizer.convert_tokens_to_ids(VISION)
    config.text_config.bos_token_id, config.text_config.eos_token_id, config.text_config.pad_token_id = (
        None,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    config.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return weights


def ready(data: Path, home: Path, precision: str, args: argparse.Namespace) -> Any:
    """The recipe's plan with all that its training reads given."""
    from graft.core.stages import Plan

    cut = ("tracking.wandb=off", f"model.base={home / 'base'}", f"model.precision={precision}", f"sft.max_steps={args.steps}")
    plan = Plan(RECIPE, (*cut, *(TINY_SET if args.tiny else ()), *args.set), home)
    for stage in plan.stages:
        if stage == "sft":
            break
        job = plan.resolve(stage)
        if job.artifact is None:
            with job.writing() as draft:
                if stage == "shard-sft":
                    shutil.copytree(data / "shards", draft.path, dirs_exist_ok=True)
    return plan


# ---- runs -------------------------------------------------------------------------------------------------------------
def of_graft(plan: Any, args: argparse.Namespace) -> dict[str, Any]:
    words = [word for o in plan.overrides for word in ("--set", o)]
    command = [sys.executable, "-m", "graft.train.launch", str(plan.path), "--stage", "sft", "--workspace", str(plan.root), *words]
    began_s = time.time()
    finished(command + (["--profile"] if args.profile else []), args.limit, {"GRAFT_PROCESSES": "1"})
    steps = [json.loads(line) for line in (plan.artifact("sft").path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if args.profile:
        print((plan.resolve("sft").run_directory / "profile.txt").read_text(encoding="utf-8"))
    more = {"predicted_mem_gib": steps[-1].get("predicted_mem_gib"), "compilations": steps[-1]["compilations"]}
    return told(steps) | more | {"launch_s": time.time() - began_s - sum(s["step_time_s"] for s in steps)}


def of_peer(peer: str, plan: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What vision_gpu_peers.py measured."""
    recipe, out = plan.recipe, plan.root / "peer.json"
    out.unlink(missing_ok=True)
    train = recipe.sft
    given = {
        "base": plan.root / "base",
        "shards": plan.artifact("shard-sft").path,
        "precision": recipe.model.precision,
        "steps": args.steps,
        "out": out,
    }
    given |= {"batch": train.global_batch, "micro": train.micro_batch, "lr": train.lr, "rank": train.lora.r, "alpha": train.lora.alpha}
    given |= {"pixels": recipe.shard.image_pixels, "seed": recipe.seed}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    began_s = time.time()
    finished([sys.executable, str(Path(__file__).with_name("vision_gpu_peers.py")), "--peer", *peer.split(), *words], args.limit)
    found = json.loads(out.read_text(encoding="utf-8"))
    steps = found.pop("steps")
    return told(steps) | found | {"launch_s": time.time() - began_s - sum(s["step_time_s"] for s in steps)}


def told(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run. steps: tokens, images, step_time_s, data_s, peak_mem_gib and loss of each."""
    settled = steps[SETTLE:]
    rates = {f"{name}_per_s": median(s[name] / s["step_time_s"] for s in settled) for name in ("tokens", "images")}
    times = {name: median(s[name] for s in settled) for name in ("step_time_s", "data_s")}
    peak = max((s["peak_mem_gib"] or 0.0) for s in steps)
    return {
        **rates,
        **times,
        "peak_mem_gib": peak,
        "first_step_s": steps[0]["step_time_s"],
        "steps": len(steps),
        "losses": [s["loss"] for s in steps],
    }


def train(args: argparse.Namespace) -> None:
    data, home, out = args.train.resolve(), args.workspace.resolve(), args.out.resolve()
    for folder in (home, out):
        folder.mkdir(parents=True, exist_ok=True)
    kept = out / "vision_gpu.json"
    about = {**machine(where()), "versions": installed(), "command": shlex.join(["python", *sys.argv]), "runs": []}
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else about
    if not (home / "base/tokenizer.json").exists():
        began_s = time.perf_counter()
        weights = write_base(home / "base", data / "tokenizer", args.tiny)
        print(f"base: {weights:,} weights in {time.perf_counter() - began_s:.0f} s", flush=True)

    def run(precision: str, of: str, measure: Callable[[], dict[str, Any]]) -> None:
        result["runs"] = [r for r in result["runs"] if (r["precision"], r["of"]) != (precision, of) or "failed" not in r]
        if any((r["precision"], r["of"]) == (precision, of) for r in result["runs"]):
            return
        figures = attempt(measure)
        result["runs"].append({"precision": precision, "of": of, **figures})
        kept.write_text(json.dumps(result, indent=1), encoding="utf-8")  # after each: the call may be cut off
        print(
            f"{precision}, {of}:",
            figures.get("failed") or f"{figures['tokens_per_s']:,.0f} tokens/s, {figures['step_time_s']:.2f} s a step",
            flush=True,
        )

    peers = args.peers if args.peers is not None else ["trl" if there("trl") and there("datasets") else "transformers"]
    for precision in args.precisions:
        plan = ready(data, home, precision, args)
        run(precision, "graft", lambda plan=plan: of_graft(plan, args))
        for peer in peers if precision != "fp8" else ():
            run(precision, peer, lambda peer=peer, plan=plan: of_peer(peer, plan, args))
    (out / "vision_gpu.md").write_text(report(result), encoding="utf-8")
    print(report(result))


def there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


# ---- the table --------------------------------------------------------------------------------------------------------
def report(result: dict[str, Any]) -> str:
    """Markdown: a row a run, graft's tokens/s over those of the best peer of the same base; fp8's over those in bf16."""
    best: dict[str, float] = {}
    for r in result["runs"]:
        if r["of"] != "graft" and "failed" not in r:
            best[r["precision"]] = max(best.get(r["precision"], 0.0), r["tokens_per_s"])
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for r in result["runs"]:
        cells = [r["precision"], r["of"]]
        if "failed" in r:
            cells += [f"failed: {r['failed'].replace('|', '/')[:200]}", *[""] * (len(HEAD) - 3)]
        else:
            beside = best.get("bf16" if r["precision"] == "fp8" else r["precision"])
            cells += [f"{r['tokens_per_s']:,.0f}", f"{r['tokens_per_s'] / beside:.2f}" if beside else "", f"{r['images_per_s']:.1f}"]
            cells += [
                f"{r['step_time_s']:.3f} s",
                f"{r['data_s'] * 1e3:.0f} ms",
                f"{r['peak_mem_gib']:.1f}",
                f"{r['first_step_s']:.1f} s",
                f"{r['losses'][0]:.3f}, {r['losses'][-1]:.3f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{said_of_machine(result)}\n\n    {result['command']}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    half = parser.add_mutually_exclusive_group(required=True)
    half.add_argument("--prepare", type=Path, metavar="DIR")
    half.add_argument("--train", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--workspace", type=Path, default=Path("/tmp/graft-vision-gpu"), help="of the base and the runs")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument(
        "--peers", nargs="*", help='words for vision_gpu_peers.py --peer, such as "trl --attention flash_attention_2"; TRL where it is installed'
    )
    parser.add_argument("--limit", type=float, default=280, help="seconds that one run may take")
    parser.add_argument("--profile", action="store_true", help="print where three steps of graft's go; slower")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.steps <= SETTLE:
        parser.error(f"--steps is more than {SETTLE}")
    if args.train:
        return train(args)
    if args.prepare.exists():
        sys.exit(f"{args.prepare} exists: remove it, or name another folder")
    shape = (2 * args.steps, 1024, 50_176, 0.2) if args.tiny else (16 * args.steps, 2048, 1_003_520, 1.0)  # as the recipe says
    print(prepare(args.prepare, *shape), size(args.prepare))


if __name__ == "__main__":
    main()
