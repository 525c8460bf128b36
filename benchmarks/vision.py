"""How often a model that was trained on drawings names what is drawn, on drawings that no corpus of its recipe holds, by several seeds.

    python benchmarks/vision.py configs/recipes/ui-vqa-tiny.toml --workspace W [--seeds 0 1 2] [--set sft.epochs=3]

Each seed is a `graft run` up to its evaluation; what is complete is skipped. One JSON object a seed: each task's shares by question, of the adapter, of
its base and of the commonest answer (majority); identity: the share of answers to the recipe's identity rows that hold what theirs name.
"""

import argparse
import json
from contextlib import closing

from graft import pipeline
from graft.core.stages import Plan
from graft.data import identity
from graft.evaluate.predict import Predictor


def named(plan: Plan, base: bool) -> float:
    """Of the last identity that the recipe has: that of its adapter."""
    own = [c for c in plan.recipe.corpora.values() if c.kind == "identity"][-1]
    rows = [(*row["messages"], str(n)) for n, row in enumerate(identity.rows(own.name, own.author))]
    with closing(Predictor.of(plan, base=base)) as predictor:
        replies = [line["reply"] for line in predictor.answers({"id": n, "messages": [question]} for question, _, n in rows)]
    holds = [
        all(word in said for word in (own.name, own.author) if word in wanted["content"]) for said, (_, wanted, _) in zip(replies, rows, strict=True)
    ]
    return sum(holds) / len(holds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--workspace", default=".")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    for seed in args.seeds:
        plan = Plan(args.recipe, (*args.overrides, f"seed={seed}"), args.workspace)
        pipeline.run(plan, until="evaluate")
        tasks = json.loads((plan.artifact("evaluate").path / "metrics.json").read_text(encoding="utf-8"))["tasks"]
        questions = {name: told["by_question"] for name, told in tasks.items() if "by_question" in told}
        told = {"identity": round(named(plan, base=False), 3), "identity_base": round(named(plan, base=True), 3)}
        print(json.dumps({"recipe": plan.recipe.name, "seed": seed, "questions": questions, **told}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
