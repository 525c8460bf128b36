"""How often a model that was trained on drawings names what is drawn, on drawings that no corpus of its recipe holds.

    python benchmarks/vision.py configs/recipes/ui-vqa-tiny.toml --workspace W [--set seed=1] [--rows 200]

Greedy answers by transformers' own generate, of the adapter and of its base; one JSON object. By question: the share of answers that are right to the
letter, beside it that of the commonest answer (chance); identity: the share of answers to the recipe's identity rows that hold what theirs name.
"""

import argparse
import io
import json
from collections import Counter, defaultdict

import torch
from PIL import Image

from graft.core.stages import Plan
from graft.data import drawings, identity
from graft.model.base import DTYPES, load_base
from graft.model.chat import load_tokenizer, render
from graft.model.images import ImageProcessor
from graft.model.lora import adapters, inject, read_adapter

HELD_OUT = 1_000_003  # seed


def asked(count: int):
    """(question, picture, answer) of drawings."""
    for row in drawings.rows(count, HELD_OUT):
        question, answer = (m["content"] for m in row["messages"])
        yield question.removeprefix("<image>"), Image.open(io.BytesIO(row["images"][0]["bytes"])), answer


class Model:
    def __init__(self, plan: Plan, adapter: bool):
        recipe, base = plan.recipe, plan.base_model("sft")
        self.lm, self.tokenizer = load_base(*base, "fp32", "cpu"), load_tokenizer(*base, plan.chat_template)
        self.processor = ImageProcessor(*base, recipe.shard.image_pixels)
        if adapter:
            train = recipe.train_stage("sft")
            inject(self.lm, train.lora, DTYPES["fp32"], 0, train.train_vision)
            _, pairs = read_adapter(plan.artifact("sft").path)
            with torch.no_grad():
                for name, a, b in adapters(self.lm):
                    a.copy_(pairs[name][0])
                    b.copy_(pairs[name][1])

    @torch.no_grad()
    def answer(self, question: str, picture: Image.Image | None = None) -> str:
        content, counts, seen = question, [], {}
        if picture:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            grid = self.processor.grid(*picture.size)
            counts = [self.processor.tokens(grid)]
            seen = {"pixel_values": torch.from_numpy(self.processor.patches(picture)), "image_grid_thw": torch.tensor([grid])}
        done = render(self.tokenizer, [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}], counts)
        ids = torch.tensor([done.ids[: done.loss_mask.index(1)]])
        kinds = (ids == self.lm.config.image_token_id).int()
        out = self.lm.generate(
            input_ids=ids, mm_token_type_ids=kinds, max_new_tokens=64, do_sample=False, eos_token_id=self.tokenizer.eos_token_id, **seen
        )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--workspace", default=".")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    plan = Plan(args.recipe, tuple(args.overrides), args.workspace)
    rows = list(asked(args.rows))
    answers = defaultdict(Counter)
    for question, _, answer in rows:
        answers[question][answer] += 1
    found = {q: {"rows": c.total(), "chance": round(c.most_common(1)[0][1] / c.total(), 3)} for q, c in answers.items()}
    named = [c for c in plan.recipe.corpora.values() if c.kind == "identity"][-1]
    told = [(*(m["content"] for m in row["messages"]), row) for row in identity.rows(named.name, named.author)]
    result = {"recipe": plan.recipe.name, "seed": plan.recipe.seed, "questions": found}
    for system in ("base", "adapter"):
        model = Model(plan, system == "adapter")
        right = Counter(question for question, picture, answer in rows if model.answer(question, picture) == answer)
        for question, counts in found.items():
            counts[system] = round(right[question] / counts["rows"], 3)
        holds = [all(word in said for word in (named.name, named.author) if word in wanted) for q, wanted, _ in told for said in [model.answer(q)]]
        result[f"identity_{system}"] = round(sum(holds) / len(holds), 3)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
