"""Does a resumed run end as the undisturbed one, on GPUs, through the ordinary path `accelerate launch -m graft.train`?

    python benchmarks/resume.py --gpus 2 --rows fp8-short nf4-short              (8B on two H200: about 8 minutes)
    python benchmarks/resume.py --gpus 2 --rows fp8-short --way default --dropout 0.05

Of each row (as in train_gpu.py), deterministic and not: a run, gone on from its checkpoint half-way, and by default a second undisturbed
one. Told is whether losses, gradient norms and the adapter's file equal the first's to the last bit, and the largest relative
difference of a loss.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_gpu import SEQ_LEN, finished, gpus, installed, write_workspace

COMPARED = ("step", "loss", "grad_norm", "lr", "targets")
WAYS = ("deterministic", "default")


def trained(plan: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The curve of a run to its end and the SHA-256 of its adapter; seconds of the launch."""
    from graft.core.artifact import sha256_file

    overrides = [word for o in plan.overrides for word in ("--set", o)]
    began_s = time.perf_counter()
    command = [sys.executable, "-m", "graft.train.launch", str(plan.path), "--stage", "sft", "--workspace", str(plan.root), *overrides]
    finished(command, args.limit, {"GRAFT_PROCESSES": str(args.gpus)})
    folder = plan.artifact("sft").path
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "curve": [[line[key] for key in COMPARED] for line in lines],
        "adapter": sha256_file(folder / "adapter_model.safetensors"),
        "step_time_s": sorted(line["step_time_s"] for line in lines)[len(lines) // 2],
        "launch_s": time.perf_counter() - began_s,
    }


def go_on(plan: Any, step: int) -> None:
    """Leave of a finished run what it was at `step`."""
    from graft.train.checkpoint import cursor_of, steps

    shutil.rmtree(plan.artifact("sft").path)
    kept = [folder for folder in steps(plan.resolve("sft").run_directory) if cursor_of(folder)["step"] <= step or shutil.rmtree(folder)]
    assert cursor_of(kept[-1])["step"] == step, f"there is no checkpoint of step {step}"


def apart(one: dict[str, Any], other: dict[str, Any]) -> str:
    """How two runs differ, in words."""
    if one["curve"] == other["curve"] and one["adapter"] == other["adapter"]:
        return "bitwise equal"
    differences = [abs(a[1] / b[1] - 1) for a, b in zip(one["curve"], other["curve"], strict=True)]
    return f"losses {max(differences):.1e} apart, adapters {'equal' if one['adapter'] == other['adapter'] else 'not equal'}"


def measured(row: str, way: str, folder: Path, base: Path, args: argparse.Namespace) -> dict[str, Any]:
    half = args.steps // 2
    settings = [f"sft.deterministic={json.dumps(way == 'deterministic')}", f"sft.save_every={half}", "sft.keep_checkpoints=9", *args.set]
    if args.dropout:
        settings.append(f"sft.lora.dropout={args.dropout}")
    given = argparse.Namespace(gpus=args.gpus, micro=args.micro, steps=args.steps, set=settings)
    plan = write_workspace(folder / "first", base, row, given, args.seq_len)
    runs = {"undisturbed": trained(plan, args)}
    go_on(plan, half)
    runs["resumed"] = trained(plan, args)
    if way == "default":
        runs["undisturbed again"] = trained(write_workspace(folder / "second", base, row, given, args.seq_len), args)
    shutil.rmtree(folder)
    return {"row": row, "way": way, **{of: apart(runs["undisturbed"], run) for of, run in runs.items() if of != "undisturbed"}, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default="llama-3.1-8b")
    parser.add_argument("--base", type=Path, help="a model folder instead of --like's")
    parser.add_argument("--rows", nargs="+", default=["fp8-short", "nf4-short"])
    parser.add_argument("--way", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--micro", type=int, default=4, help="bins a forward")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one run may take")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/graft-train-gpu"))
    parser.add_argument("--out", type=Path, default=Path("resume.json"))
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    base = args.base.absolute() if args.base else args.folder / "bases" / args.like
    if not (base / "tokenizer.json").exists():
        from graft.data.like import write_like

        write_like(args.like, base)
    name, driver = gpus()
    print(f"{name}, driver {driver}, {installed()}", flush=True)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as workspaces:
        for row in args.rows:
            for way in args.way:
                found.append(measured(row, way, Path(workspaces) / f"{row}-{way}", base, args))
                one = found[-1]
                times_s = ", ".join(f"{of} {run['step_time_s']:.3f} s a step" for of, run in one["runs"].items())
                others = "; ".join(f"{of} {one[of]}" for of in one["runs"] if of in one)
                print(f"{row}, {way}: {others}; {times_s}", flush=True)
                args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")  # after each: the call may be cut off


if __name__ == "__main__":
    main()
