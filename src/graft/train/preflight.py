"""What a training stage will need before anything is allocated: `graft check RECIPE --gpus 8xH100`. Imports no torch.

Memory is counted, weight by weight and activation by activation (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198,
for what the fused layers of model/blocks.py keep; Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054, for ZeRO-2's
shares). Time is FLOPs over what share of the nominal peak was measured; MEASURED says on what, and ERROR how far off.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from graft.core.errors import ArtifactError, ConfigError
from graft.core.hub import model_folder
from graft.core.recipe import Train
from graft.core.stages import Plan
from graft.train.flops import PEAK_BF16_FLOPS, Flops
from graft.train.order import micro_batch_of, total_steps

GIB = 2**30
MEMORY_GIB = {"H200": 139.8, "H100": 79.2, "A100": 79.2, "L40S": 44.4, "RTX 4090": 23.5}  # that a process can have
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "nf4": 0.516}  # a weight of a decoder layer; nf4 with its scales
CHUNK = 4096  # rows of logits at once (model/loss.py)
# Share of the nominal bf16 peak that a step reaches on one H200, Llama-3.1-8B, LoRA, 16,384 tokens (benchmarks/RESULTS.md)
EFFICIENCY = {"bf16": 0.545, "fp8": 0.766, "nf4": 0.52}
MEASURED = "measured on one H200, 16,384 tokens a forward: peaks of 8B (bf16, fp8) and 1.1B (fp8, nf4), step times of 8B (bf16, fp8)"
ERROR = {"peak_gib": 0.03, "step_time_s": 0.05}  # the largest difference on those


class Shape(NamedTuple):
    """A Llama-like decoder."""

    vocab: int
    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From a Hugging Face config.json; ConfigError where a number is missing."""
        c = config.get("text_config") or config
        try:
            hidden, heads = c["hidden_size"], c["num_attention_heads"]
            return cls(
                c["vocab_size"],
                hidden,
                c["intermediate_size"],
                c["num_hidden_layers"],
                heads,
                c.get("num_key_value_heads") or heads,
                c.get("head_dim") or hidden // heads,
                bool(c.get("tie_word_embeddings")),
            )
        except KeyError as e:
            raise ConfigError(f"the base's config.json has no {e}: its needs cannot be told") from None

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Of all decoder layers' matmuls."""
        return self.layers * self.hidden * (self.qkv + self.heads * self.head_dim + 3 * self.inter)

    @property
    def adapter_sizes(self) -> dict[str, int]:
        """ins + outs of each projection."""
        kv, q = self.kv_heads * self.head_dim, self.heads * self.head_dim
        sizes = {"q_proj": self.hidden + q, "k_proj": self.hidden + kv, "v_proj": self.hidden + kv, "o_proj": q + self.hidden}
        return sizes | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), self.hidden + self.inter)


@dataclass(frozen=True)
class Need:
    """Of one GPU, in GiB and seconds."""

    weights_gib: float
    optimizer_gib: float  # gradients, masters and moments of what is trained
    activations_gib: float
    logits_gib: float
    step_time_s: float
    tokens_per_s: float  # of all GPUs

    @property
    def peak_gib(self) -> float:
        return self.weights_gib + self.optimizer_gib + self.activations_gib + self.logits_gib


def need(shape: Shape, precision: str, train: Train, seq_len: int, gpus: int, gpu: str, mean_length: float | None = None) -> Need:
    """mean_length: of the documents, weighted by length; seq_len where it is not known."""
    micro = micro_batch_of(train.global_batch, gpus, train.micro_batch)
    tokens, width = micro * seq_len, 4.0 if precision == "fp32" else 2.0
    embedding = shape.vocab * shape.hidden
    ends = embedding * (1 if shape.tied else 2) * width  # embedding and head stay as they are
    weights = shape.layer_weights * BYTES[precision] + ends
    if train.lora:
        trained = sum(shape.adapter_sizes.get(t, 0) for t in train.lora.targets) * shape.layers * train.lora.r
        weights += trained * width
    else:
        trained = shape.layer_weights + embedding * (1 if shape.tied else 2)
    # gradients 2 bytes, fp32 master and two moments 12: ZeRO-2 shares both, but for a bucket of each
    optimizer = trained * (width + 12) / gpus + min(trained, 100_000_000) * width
    activations = _activations(shape, train, tokens, width)
    logits = 2 * min(CHUNK, tokens) * shape.vocab * width + 3 * tokens * shape.hidden * width
    flops = Flops(shape.layer_weights + embedding, trained if train.lora else 0, shape.layers * shape.heads * shape.head_dim)
    work = flops.per_step(tokens, mean_length or seq_len) * _again(shape, train)
    forward_s = work / (PEAK_BF16_FLOPS[gpu] * EFFICIENCY["bf16" if precision == "fp32" else precision])
    step_s = forward_s * train.global_batch / gpus / micro
    return Need(weights / GIB, optimizer / GIB, activations / GIB, logits / GIB, step_s, train.global_batch * seq_len / step_s)


def _activations(shape: Shape, train: Train, tokens: int, width: float) -> float:
    """Bytes that live when the loss is taken."""
    r = train.lora.r * len(train.lora.targets) if train.lora else 0
    wide = 3 * shape.inter  # gate, up and the activation
    narrow = 4 * shape.hidden + shape.qkv + shape.heads * shape.head_dim + r
    layer = {"none": wide + narrow, "selective": narrow, "full": shape.hidden}[train.activation_checkpointing]
    live = {"none": 0, "selective": wide, "full": wide + narrow}[train.activation_checkpointing]  # of the layer that is computed again
    statistics = 4 * shape.heads if train.activation_checkpointing != "full" else 0
    return float(tokens) * (shape.layers * (layer * width + statistics) + live * width)


def _again(shape: Shape, train: Train) -> float:
    """Work with what is computed again, over the work without."""
    passes = 4 if train.lora else 6  # FLOPs a weight and token
    share = {"none": 0.0, "selective": shape.layers * shape.hidden * 2 * shape.inter / shape.layer_weights, "full": 1.0}
    return 1 + 2 * share[train.activation_checkpointing] / passes


def fitting(shape: Shape, precision: str, train: Train, seq_len: int, gpus: int, gpu: str) -> str | None:
    """The smallest change of the recipe with which a step fits, None where none does."""
    room = MEMORY_GIB[gpu] * (1 - ERROR["peak_gib"])
    precisions = [precision, *[p for p in ("fp8", "nf4") if train.lora and BYTES[p] < BYTES[precision] and (p != "fp8" or gpu != "A100")]]
    for held in precisions:
        for micro in sorted({train.micro_batch, *(m for m in (4, 2, 1) if m < train.micro_batch)}, reverse=True):
            for kept in ("none", "selective", "full"):
                other = train.model_copy(update={"micro_batch": micro, "activation_checkpointing": kept})
                if need(shape, held, other, seq_len, gpus, gpu).peak_gib <= room:
                    changes = {"activation_checkpointing": (train.activation_checkpointing, kept), "micro_batch": (train.micro_batch, micro)}
                    said = [f"{key} = {new!r}".replace("'", '"') for key, (old, new) in changes.items() if old != new]
                    return ", ".join([*([f'model.precision = "{held}"'] if held != precision else []), *said]) or "as it is"
    return None


# ---- the report -------------------------------------------------------------------------------------------------------
def report(plan: Plan, gpus: str, price_usd: float | None) -> list[str]:
    """Lines on each training stage of the recipe on GPUs such as "8xH100"; price_usd: an hour of one GPU."""
    count, kind = _gpus(gpus)
    if plan.recipe.base:
        raise ConfigError("`--gpus` is of a base that is there, not of one that the recipe builds: name it as model.base")
    base, commit = plan.external_base()
    config = model_folder(base, commit) / "config.json"
    shape = Shape.of(json.loads(config.read_text(encoding="utf-8")))
    lines = []
    for stage in plan.recipe.train_stages():
        train, precision, seq_len = plan.recipe.train_stage(stage), plan.recipe.model.precision, plan.recipe.shard.seq_len
        n = need(shape, precision, train, seq_len, count, kind)
        lines.append(
            f"{stage}: {n.peak_gib:.1f} of {MEMORY_GIB[kind]:.0f} GiB a GPU (weights {n.weights_gib:.1f}, trained {n.optimizer_gib:.1f}, "
            f"activations {n.activations_gib:.1f}, logits {n.logits_gib:.1f}); {n.step_time_s:.2f} s a step, {n.tokens_per_s:,.0f} tokens/s"
        )
        if steps := _steps(plan, stage, train):
            hours = steps * n.step_time_s / 3600
            cost = f", {hours * count * price_usd:,.2f} USD" if price_usd else ""
            lines.append(f"{stage}: {steps:,} steps, {hours:.2f} hours{cost}")
        if n.peak_gib > MEMORY_GIB[kind] * (1 - ERROR["peak_gib"]):
            change = fitting(shape, precision, train, seq_len, count, kind)
            lines.append(
                f"{stage}: does not fit: " + (f"set {change}" if change else f"no setting fits {gpus}: take more or larger GPUs, or shorter bins")
            )
    lines.append(f"error: {ERROR['peak_gib']:.0%} of memory, {ERROR['step_time_s']:.0%} of time at most where {MEASURED}; elsewhere not measured")
    return lines


def _gpus(text: str) -> tuple[int, str]:
    count, _, kind = text.partition("x")
    known = next((name for name in MEMORY_GIB if name.replace(" ", "").lower() == kind.replace(" ", "").replace("-", "").lower()), None)
    if not count.isdigit() or not int(count) or known is None:
        raise ConfigError(f"--gpus {text!r} is not like 8xH100: a number, x, and one of {', '.join(MEMORY_GIB)}")
    return int(count), known


def _steps(plan: Plan, stage: str, train: Train) -> int | None:
    """Of the run, where its shards are made."""
    try:
        bins = plan.artifact(f"shard-{stage}").counts["train"]["bins"]
    except (ArtifactError, KeyError):
        return None
    return total_steps(bins, train.epochs, train.global_batch, train.max_steps)
