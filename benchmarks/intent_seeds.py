"""The tiny recipe under several seeds: each draws its own held-out families, rewrites, weights and order of bins.

    python benchmarks/intent_seeds.py --seeds 0 1 2 --workspace /tmp/seeds     (about 4 minutes a seed on two cores)

Prints a table of F1 on held-out families, and mean ± standard deviation (n - 1) over the seeds.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from graft.core.stages import Plan

RECIPE = Path(__file__).parents[1] / "configs/recipes/image-intent-tiny.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workspace", default=".")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        overrides = [f"seed={seed}", *args.overrides]
        sets = [a for o in overrides for a in ("--set", o)]
        subprocess.run(
            [sys.executable, "-m", "graft.cli", "run", str(RECIPE), "--workspace", args.workspace, "--until", "evaluate", *sets], check=True
        )
        artifact = Plan(RECIPE, tuple(overrides), args.workspace).artifact("evaluate")
        metrics = json.loads((artifact.path / "metrics.json").read_text())
        scores, held_out = metrics["scores"], metrics["per_family_accuracy"]
        rows.append((seed, scores["adapter"], max(scores[c]["strict"]["f1"] for c in ("always-call", "always-text")), metrics["rows"], held_out))
    print(
        "| seed | F1 strict | precision | recall | F1 intent | best constant | rows | accuracy by held-out family |\n|---|---|---|---|---|---|---|---|"
    )
    for seed, a, constant, n, held_out in rows:
        s, families = a["strict"], ", ".join(f"{f} {v:.2f}" for f, v in held_out.items())
        print(f"| {seed} | {s['f1']:.3f} | {s['precision']:.3f} | {s['recall']:.3f} | {a['intent']['f1']:.3f} | {constant:.3f} | {n} | {families} |")
    f1 = [a["strict"]["f1"] for _, a, *_ in rows]
    print(f"F1 strict {mean(f1):.3f} ± {stdev(f1) if len(f1) > 1 else 0:.3f}, {len(f1)} seeds")


if __name__ == "__main__":
    main()
