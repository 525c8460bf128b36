"""Stage `merge`: base + CPT adapter -> the model that SFT starts from, W + (alpha / r) B A for every adapted layer.

A 4-bit base is merged into its de-quantised weights, those that the adapter was trained on. The greatest logit
difference between base + adapter and the merged model on a fixed text is measured and written.
"""

from __future__ import annotations

from typing import Any

import torch

from graft.core.errors import TrainError
from graft.core.stages import Job
from graft.model.base import DTYPES, load_base
from graft.model.chat import load_tokenizer, save_tokenizer
from graft.model.lora import Rows, inject_slots, merge_into, read_adapter

PROBE = "阿明請小美畫一隻在海邊散步的柴犬，小美交出了一張圖。The quick brown fox jumps over the lazy dog."


def run(job: Job) -> None:
    base, revision = job.plan.base_model("cpt")
    precision = job.recipe.model.precision
    config, pairs = read_adapter(job.parents["cpt"].path)
    tokenizer = load_tokenizer(base, revision, job.recipe.model.chat_template)
    ids = torch.tensor([tokenizer(PROBE, add_special_tokens=False)["input_ids"]])
    with job.writing() as draft, torch.no_grad():
        lm = load_base(base, revision, precision, "cpu")
        wanted = _with_adapter(lm, config, pairs, ids, precision)
        merged = load_base(base, revision, "bf16" if precision == "nf4" else precision, "cpu")
        if precision == "nf4":
            _dequantise(lm, merged)
        layers = dict(merged.named_modules())
        for name, weight in merge_into(lambda n: layers[n].weight.data, config, pairs).items():
            layers[name].weight.data = weight
        got = merged(ids).logits.float()
        difference = (got - wanted).abs().max().item()
        spread = wanted.std().item()
        if not difference <= (0.02 if precision == "fp32" else 0.25) * max(spread, 1e-6):
            raise TrainError(f"the merged model differs from base + adapter by {difference:.3g} in logits (spread {spread:.3g}): nothing was written")
        merged.save_pretrained(draft.path, max_shard_size="2GB")
        save_tokenizer(tokenizer, draft.path)
        draft.counts.update(layers=len(pairs), logit_difference_max=difference, logit_std=spread)


def _with_adapter(lm: Any, config: dict[str, Any], pairs: dict[str, Any], ids: torch.Tensor, precision: str) -> torch.Tensor:
    """Logits [1, length, vocab] of base + adapter through the serving layers, which are taken out again."""
    rows = Rows()
    layers = inject_slots(lm, pairs, 1, config["r"], DTYPES[precision], rows)
    rows.use([1], "cpu")
    for name, (a, b) in pairs.items():
        layers[name].put(1, a, b, config["lora_alpha"] / config["r"])
    logits = lm(ids).logits.float()
    for name, layer in layers.items():
        lm.set_submodule(name, layer.base)
    return logits


def _dequantise(quantised: Any, plain: Any) -> None:
    """Put the de-quantised 4-bit weights of `quantised` into `plain`, layer by layer."""
    import bitsandbytes.functional as bnb

    layers = dict(plain.named_modules())
    for name, module in quantised.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            layers[name].weight.data = bnb.dequantize_4bit(module.weight.data, state).to(layers[name].weight.dtype)
