"""Does speed buy another model? LoRA on one base held in bf16, FP8 and NF4, and by PEFT + bitsandbytes, over the same bins.

    python benchmarks/precision.py --prepare DIR              (40 s on two cores; DIR has 15 MB and can be moved)
    python benchmarks/precision.py --train DIR --out RESULT   (about 5 minutes on an H200; needs neither Ray nor the data stages)

A Llama of 150 M weights is trained whole in bf16 on Taiwanese news, Wikipedia articles and GSM8K's first 1,000 problems;
LoRA then learns the other problems' answers. Graft's rows go through `accelerate launch -m graft.train`; PEFT's is a
plain loop here: same bins in the same order, same first adapters, learning rates and loss. RESULT gets precision.json,
precision.md and precision.png. Exit code 1 where at the last step, for any seed, FP8 is over 0.5 % from bf16 or graft's NF4
from PEFT's, or where bf16 learned nothing. `--tiny`, for both halves, runs on the CPU (2 minutes; no FP8 there).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from precision_data import TINY, Scale, prepare
from small_base import (
    Curve,
    both_halves,
    launch,
    machine,
    make_base,
    plan_of,
    refuse_other_bins,
    said_of,
    said_of_machine,
    where,
)

PRECISIONS, PEFT = ("bf16", "fp8", "nf4"), "PEFT + bitsandbytes nf4"
PAIRS = (("fp8", "bf16"), ("nf4", PEFT))  # that must end alike
LIMIT = 0.005  # of the held-out loss
COLOURS = {"bf16": "#222222", "fp8": "#d1495b", "nf4": "#00798c", PEFT: "#edae49"}


# ---- graft's rows -----------------------------------------------------------------------------------------------------
LORA = """
[sft]
corpora = ["made"]
lr = {scale.lr}
epochs = {scale.epochs}
global_batch = {scale.batch}
micro_batch = {scale.batch}
validate_every = {scale.every}
save_every = 100000
"""


def lora_plan(home: Path, base: Path, data: Path, scale: Scale, seed: int = 0, precision: str = "bf16") -> Any:
    return plan_of(home, "sft", base, data / "sft", scale.seq_len, LORA.format(scale=scale), seed, precision)


def run_graft(precision: str, base: Path, folder: Path, data: Path, scale: Scale, seed: int) -> Curve:
    return launch(lora_plan(folder / f"{precision}-{seed}", base, data, scale, seed, precision), "sft")


def untrained(precision: str, base: Path, folder: Path, data: Path, scale: Scale) -> Curve:
    """The held-out loss of the base in this precision: fresh adapters change nothing."""
    from graft.train.build import build

    device = where()
    train = lora_plan(folder / f"{precision}-untrained", base, data, scale, precision=precision).recipe.train_stage("sft")
    model = build(str(base), None, precision, train.model_copy(update={"compile": False}), 0, device)
    return {0: held_out_loss(model, data, train.micro_batch, device)}


# ---- the peer's -------------------------------------------------------------------------------------------------------
def run_peft(base: Path, folder: Path, data: Path, scale: Scale, seed: int) -> Curve:
    """QLoRA as PEFT's documentation has it (https://huggingface.co/docs/peft/developer_guides/quantization), over graft's bins."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from graft.core.shards import ShardSet
    from graft.model.attention import block_causal_mask
    from graft.train.batches import collate
    from graft.train.order import BinOrder, learning_rate
    from graft.train.split import total_steps

    device = where()
    train = lora_plan(folder / f"peft-{seed}", base, data, scale, seed, "nf4").recipe.train_stage("sft")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    given = {"dtype": torch.bfloat16, "quantization_config": nf4, "attn_implementation": "sdpa", "device_map": {"": device}}
    lm = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(base, **given), use_gradient_checkpointing=False)
    lora = LoraConfig(r=train.lora.r, lora_alpha=train.lora.alpha, target_modules=list(train.lora.targets), task_type="CAUSAL_LM")
    model = get_peft_model(lm, lora).train()
    draw_as_graft(model, train.lora, seed, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train.lr, betas=(0.9, 0.95), weight_decay=train.weight_decay)

    def loss_of(batch: Any) -> Any:
        mask = block_causal_mask(batch.cu, *batch.input_ids.shape)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1)[batch.target_at].float(), batch.targets, reduction="sum")

    shards = ShardSet.open(data / "sft/train", verify=False)
    order, total = BinOrder(len(shards), seed), total_steps(len(shards), train.epochs, train.global_batch, train.max_steps)
    curve = {0: held_out_loss(loss_of, data, train.micro_batch, device)}
    for step in range(total):
        batch = collate([shards.bin(i) for i in order.take(step * train.global_batch, train.global_batch)]).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, train.lr, train.warmup, train.schedule)
        (loss_of(batch) / batch.targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (done := step + 1) == total or done % train.validate_every == 0:
            curve[done] = held_out_loss(loss_of, data, train.micro_batch, device)
    return curve


def draw_as_graft(model: Any, lora: Any, seed: int, device: Any) -> None:
    """Give PEFT's layers the A that graft draws from this seed; B is zero in both."""
    import torch

    from graft.model.lora import new_pair

    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in (m for m in model.modules() if hasattr(m, "lora_A")):
            a, _ = new_pair(lora, layer.in_features, layer.out_features, torch.bfloat16, device)
            layer.lora_A["default"].weight.copy_(a)


# ---- both -------------------------------------------------------------------------------------------------------------
def held_out_loss(loss_of: Callable[[Any], Any], data: Path, micro: int, device: Any) -> float:
    """Mean nats a target over the held-out bins of the LoRA task; loss_of: their sum over a batch."""
    import torch

    from graft.core.shards import ShardSet
    from graft.train.batches import collate

    shards = ShardSet.open(data / "sft/validation", verify=False)
    bins = [shards.bin(i) for i in range(len(shards))]
    batches = [collate(bins[at : at + micro]).to(device) for at in range(0, len(bins), micro)]
    with torch.no_grad():
        return sum(loss_of(batch).item() for batch in batches) / sum(batch.targets.numel() for batch in batches)


def run(row: str, seed: int | None, *given: Any) -> tuple[Curve, float]:
    """(curve, seconds) of one training run, or with no seed of the base as it is; in a process of its own, which gives its memory back."""
    began_s = time.perf_counter()
    if seed is None:
        return untrained(row, *given), time.perf_counter() - began_s
    return run_peft(*given, seed) if row == PEFT else run_graft(row, *given, seed), time.perf_counter() - began_s


def run_all(rows: list[str], seeds: list[int], at_once: int, *given: Any) -> dict[str, dict[int, Curve]]:
    """Curves by row and seed. Several share the GPU, which a model of this size leaves idle: no speed is measured here."""
    found: dict[str, dict[int, Curve]] = {row: {} for row in rows}
    tasks: list[tuple[str, int | None]] = [(row, seed) for seed in seeds for row in rows]
    tasks += [(row, None) for row in rows if row != PEFT]
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        started = [(task, pool.submit(run, *task, *given)) for task in tasks]
        for (row, seed), result in started:
            try:
                curve, wall_s = result.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            for some in seeds if seed is None else [seed]:
                found[row][some] = curve | found[row].get(some, {})
            said = "untrained" if seed is None else f"seed {seed}, {max(curve)} steps"
            print(f"{row}, {said}: held-out loss {end(curve):.4f}, {wall_s:.0f} s", flush=True)
    return found


# ---- what is said -----------------------------------------------------------------------------------------------------
def end(curve: Curve) -> float:
    return curve[max(curve)]


def difference(found: dict[str, dict[int, Curve]], row: str, other: str) -> list[float]:
    """Of the last held-out loss, as a share, seed by seed."""
    return [end(found[row][seed]) / end(found[other][seed]) - 1 for seed in found[row]]


def table(found: dict[str, dict[int, Curve]]) -> str:
    lines = ["| row | held-out loss of the base | at the end, mean | standard deviation | to bf16, mean | largest |", "|---|---|---|---|---|---|"]
    for row, curves in found.items():
        ends, apart = [end(c) for c in curves.values()], difference(found, row, "bf16")
        spread = f"{stdev(ends):.4f} ({stdev(ends) / mean(ends):.2%})" if len(ends) > 1 else ""
        first = next(iter(curves.values()))[0]
        lines.append(f"| {row} | {first:.4f} | {mean(ends):.4f} | {spread} | {mean(apart):+.2%} | {max(apart, key=abs):+.2%} |")
    return "\n".join(lines)


def bounds(found: dict[str, dict[int, Curve]], learns: float) -> list[dict[str, Any]]:
    """Each bound with what was found."""
    fell = min(1 - end(curve) / curve[0] for curve in found["bf16"].values())
    kept = [{"what": "bf16 lowers its held-out loss", "least": learns, "found": fell, "holds": fell >= learns}]
    for row, other in PAIRS:
        if row in found:
            apart = difference(found, row, other)
            holds = all(abs(d) <= LIMIT for d in apart)  # no NaN does
            kept.append({"what": f"graft's {row} is near {other}", "most": LIMIT, "found": max(apart, key=abs), "holds": holds})
    return kept


def draw(found: dict[str, dict[int, Curve]], path: Path) -> None:
    """Held-out loss by step, the mean over the seeds, and beside it each seed's difference to bf16."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for row, curves in found.items():
        steps, style = sorted(next(iter(curves.values()))), {"color": COLOURS[row], "linewidth": 1.6, "linestyle": "--" if row == PEFT else "-"}
        left.plot(steps, [mean(c[step] for c in curves.values()) for step in steps], label=f"graft {row}" if row != PEFT else row, **style)
        for seed, curve in curves.items() if row != "bf16" else ():
            right.plot(steps, [100 * (curve[step] / found["bf16"][seed][step] - 1) for step in steps], **style)
    right.axhspan(-100 * LIMIT, 100 * LIMIT, color="#dddddd", zorder=0, label=f"bf16 \u00b1 {LIMIT:.1%}")
    left.set(xlabel="step", ylabel="held-out loss, nats a target", title=f"mean of {len(found['bf16'])} seeds")
    right.set(xlabel="step", ylabel="difference to bf16 of the same seed, %", title="each seed")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def train(args: argparse.Namespace, scale: Scale) -> bool:
    """Whether every bound holds."""
    from graft.model.frozen import fp8_works

    began_s, device, data = time.perf_counter(), where(), args.train.resolve()
    refuse_other_bins(data / "sft", scale.seq_len)
    args.out.mkdir(parents=True, exist_ok=True)
    at_once = args.at_once or (6 if device.type == "cuda" else 1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    rows = [row for row in PRECISIONS if row != "fp8" or fp8_works(device)] + [PEFT]
    with tempfile.TemporaryDirectory(prefix="graft-precision-") as own:
        base, said = make_base(Path(own), data, scale)
        print(f"{said_of(said)}, {time.perf_counter() - began_s:.0f} s", flush=True)
        found = run_all(rows, args.seeds, at_once, base, Path(own), data, scale)
    kept = bounds(found, scale.learns)
    result = {
        **machine(device),
        "scale": asdict(scale),
        "base": said,
        "held_out": found,
        "bounds": kept,
        "wall_s": time.perf_counter() - began_s,
    }
    (args.out / "precision.json").write_text(json.dumps(result, indent=1))
    (args.out / "precision.md").write_text(table(found) + "\n")
    draw(found, args.out / "precision.png")
    print(table(found))
    for bound in kept:
        wanted = f"at most {bound['most']:.1%}" if "most" in bound else f"at least {bound['least']:.1%}"
        print(f"{'holds' if bound['holds'] else 'BROKEN'}: {bound['what']}: {bound['found']:+.2%}, {wanted}")
    print(f"{said_of_machine(result)}; {result['wall_s']:.0f} s in all")
    return all(bound["holds"] for bound in kept)


if __name__ == "__main__":
    sys.exit(both_halves(__doc__, "runs that share the GPU (6) or the CPU (1)", Scale(), TINY, prepare, train))
