"""What a training step needs, in GiB and seconds, before anything is allocated. Imports no torch.

Memory is counted, weight by weight and activation by activation, at the three moments of a step where it can peak: the
loss, the backward and the optimizer's step. Activations after Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198), for
what the layers of model/blocks.py keep; ZeRO-2's shares (Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054) as
deepspeed 0.19.8 allocates them. Time is FLOPs over what share of the nominal peak was measured; MEASURED says on what, and
ERROR how far off.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from graft.core.errors import ConfigError
from graft.core.hub import model_folder
from graft.core.recipe import EmbeddedBase, Kept, Train
from graft.train.flops import PEAK_BF16_FLOPS, Flops
from graft.train.strategy import DEFAULT, Zero

GIB = 2**30
MEMORY_GIB = {"H200": 139.8, "H100": 79.2, "A100": 79.2, "L40S": 44.4, "RTX 4090": 23.5}  # that torch sees
CONTEXT_GIB = 0.6  # of it, what CUDA and its libraries take for themselves, about
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}  # a weight of a linear layer; nf4 with its scales
CHUNK = 4096  # rows of logits at once (model/loss.py)
# Share of the nominal bf16 peak that a step reaches on one H200, Llama-3.1-8B, LoRA, 16,384 tokens (benchmarks/RESULTS.md)
EFFICIENCY = {"bf16": 0.597, "fp8": 0.85, "nf4": 0.592}
AGAIN = {"bf16": 0.66, "fp8": 1.13, "nf4": 0.64}  # and what is computed again, matmuls most of all; nf4's is an assumption
FULL_TOKENS = 16_384  # a forward of more gains nothing
FIXED_TOKENS = 384  # what a forward costs whatever its size, in tokens: of one row, two forwards a step
PATCH = 14**2  # pixels; a tower computes a patch through all its weights, forwards alone where it is frozen
PATCH_BYTES = 2 * 6 * PATCH  # as it comes: twice three channels, in bf16
MEASURED = "measured on one H200: LoRA of 8B in bf16, fp8 and nf4, of 13B in fp8, 16,384 tokens a step, layers kept or computed again"
ERROR = {"peak_gib": 0.03, "step_time_s": 0.05}  # no difference on those is larger


# ---- what is trained, and on what --------------------------------------------------------------------------------------
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
    beside: int = 0  # weights of linear layers that are no decoder layer's: a vision tower's

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From a Hugging Face config.json, also one with a text_config; ConfigError where a number is missing, or there are experts."""
        c = config.get("text_config") or config
        if experts := [key for key in c if key.endswith("experts") and c[key]]:
            raise ConfigError(f"the base's config.json has {experts[0]!r}: the needs of such a model cannot be told")
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
                bool(config.get("tie_word_embeddings") or c.get("tie_word_embeddings")),
                _tower(config.get("vision_config") or {}),
            )
        except KeyError as e:
            raise ConfigError(f"the base's config.json has no {e}: its needs cannot be told") from None

    @classmethod
    def at(cls, base: str, revision: str | None) -> Shape:
        """Of a model's folder or hub name, by its config.json."""
        return cls.of(json.loads((model_folder(base, revision) / "config.json").read_text(encoding="utf-8")))

    @classmethod
    def embedded(cls, base: EmbeddedBase) -> Shape:
        return cls(
            base.vocab_size, base.hidden_size, base.intermediate_size, base.layers, base.heads, base.kv_heads, base.hidden_size // base.heads, True
        )

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv(self) -> int:
        return self.q + 2 * self.kv

    @property
    def layer_weights(self) -> int:
        """Of all decoder layers' matmuls."""
        return self.layers * self.hidden * (self.qkv + self.q + 3 * self.inter)

    @property
    def ends(self) -> int:
        """Weights of the embedding and the head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.hidden

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each that can have an adapter."""
        h, up = self.hidden, (self.hidden, self.inter)
        own = {"q_proj": (h, self.q), "k_proj": (h, self.kv), "v_proj": (h, self.kv), "o_proj": (self.q, h)}
        return own | {"gate_proj": up, "up_proj": up, "down_proj": (self.inter, h)}


def _tower(vision: dict[str, Any]) -> int:
    """Weights of a vision tower as Qwen2.5-VL's (https://arxiv.org/abs/2502.13923): blocks of attention and gated MLP, and the merger."""
    if not {"depth", "hidden_size", "intermediate_size", "out_hidden_size"} <= vision.keys():
        return 0
    h, merged = vision["hidden_size"], vision["hidden_size"] * vision.get("spatial_merge_size", 2) ** 2
    return int(vision["depth"] * h * (4 * h + 3 * vision["intermediate_size"]) + merged * (merged + vision["out_hidden_size"]))


class Gpu(NamedTuple):
    """One of them."""

    name: str
    memory_gib: float  # that torch sees
    room_gib: float  # of it, what torch can allocate
    peak_flops: float | None  # nominal, bf16; None: not known, and times are in no known unit
    fp8: bool

    @classmethod
    def named(cls, name: str) -> Gpu:
        """One that is not here, of MEMORY_GIB."""
        return cls(name, MEMORY_GIB[name], MEMORY_GIB[name] - CONTEXT_GIB, PEAK_BF16_FLOPS[name], name != "A100")


class Setting(NamedTuple):
    """How a step is made to fit; the keys of the recipe with numbers in place of "auto"."""

    micro_batch: int
    activation_checkpointing: Kept


@dataclass(frozen=True)
class Work:
    """What a step trains, on how many GPUs."""

    shape: Shape
    precision: str
    train: Train
    seq_len: int
    gpus: int = 1
    zero: Zero = DEFAULT
    mean_length: float | None = None  # tokens of a document, weighted by length; None: bins are whole documents
    image_pixels: int = 0  # of a row's image at most; 0: no row shows one
    row_tokens: float | None = None  # of a bin, without padding, on average; None: bins are full

    @property
    def width(self) -> float:
        """Bytes of an activation and of a trained weight."""
        return BYTES["fp32" if self.precision == "fp32" else "bf16"]

    @property
    def trained(self) -> int:
        """Weights."""
        if not self.train.lora:
            return self.shape.layer_weights + self.shape.ends + self.shape.norms + (self.shape.beside if self.train.train_vision else 0)
        sizes = (sum(self.shape.projections.get(t, ())) for t in self.train.lora.targets)
        return sum(sizes) * self.shape.layers * self.train.lora.r

    @property
    def frozen_bytes(self) -> float:
        """Of the weights that are not trained; embedding, head, norms and a tower stay as they are."""
        s = self.shape
        if not self.train.lora:
            return 0 if self.train.train_vision else s.beside * self.width
        rows = s.layers * (s.qkv + 2 * s.hidden + 2 * s.inter)
        scales = 4 * rows if self.precision == "fp8" else 0
        return s.layer_weights * BYTES[self.precision] + scales + (s.ends + s.norms + s.beside) * self.width

    @property
    def patches(self) -> float:
        """Of a row's image."""
        return self.image_pixels / PATCH


# ---- what it needs ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Need:
    """Of one GPU where it peaks, in GiB and seconds."""

    moment: str  # of the step: loss, backward or step
    weights_gib: float  # as they compute, frozen and trained; and a step's images
    optimizer_gib: float  # masters and moments of what is trained, and its gradients
    activations_gib: float  # that the backward waits for
    workspace_gib: float  # logits in the loss; in the backward what one layer needs, and what gradients pass through
    step_time_s: float
    tokens_per_s: float  # of all GPUs

    @property
    def peak_gib(self) -> float:
        return self.weights_gib + self.optimizer_gib + self.activations_gib + self.workspace_gib


def need(work: Work, setting: Setting, gpu: Gpu) -> Need:
    """setting.micro_batch divides the bins of a GPU."""
    train, width = work.train, work.width
    tokens = setting.micro_batch * work.seq_len
    forwards = train.global_batch // work.gpus // setting.micro_batch
    weights = work.frozen_bytes + work.trained * width + train.global_batch / work.gpus * work.patches * PATCH_BYTES  # a step's images come together
    own = work.trained / work.gpus  # weights of this GPU's partition
    held = own * 12  # master and two moments, fp32
    gradients = work.trained * width if forwards > 1 else 0.0  # of the forwards before: they wait whole for the one reduction
    kept, live = _activations(work, setting, tokens)
    passing, waiting = _passing(work)
    if waiting:
        backward = max(live + _layer_workspace(work, tokens), passing)
    else:  # the buffer comes with the first gradient, when a layer's activations are gone
        backward = live + _layer_workspace(work, tokens) + max(0.0, passing - kept / work.shape.layers)
    moments = {
        "loss": (held + gradients, kept, _head(work, tokens)),
        "backward": (held + gradients + waiting, kept, backward),
        "step": (held + own * 8, 0.0, 0.0),  # gradients as they came, flattened (2 and 2 bytes), and in fp32
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    optimizer, activations, workspace = moments[moment]
    used = work.row_tokens or work.seq_len
    step_time_s = _step_time_s(work, setting, gpu, setting.micro_batch * used, forwards)
    tokens_per_s = train.global_batch * used / step_time_s
    return Need(moment, weights / GIB, optimizer / GIB, activations / GIB, workspace / GIB, step_time_s, tokens_per_s)


def _activations(work: Work, setting: Setting, tokens: int) -> tuple[float, float]:
    """(bytes kept for the backward, bytes of the one layer that is computed again)."""
    s, train, lora, width = work.shape, work.train, work.train.lora, work.width
    products = (lora.r * len(lora.targets) if lora else 0) * width  # s x Aᵀ of each adapter
    # input and the sum after attention, and their norms where each is an operator; q, k and v as turned; attention's output
    narrow = ((2 if train.fused else 4) * s.hidden + s.qkv + s.q) * width + products + 4 * (s.heads + 2)
    wide = (2 if train.fused else 3) * s.inter * width  # gate and up; the activation too where no operator makes it again
    full = (2 * s.hidden * width + products, wide) if train.fused else (s.hidden * width, wide + narrow)
    kept, live = {"none": (wide + narrow, 0.0), "selective": (narrow, wide), "full": full}[
        setting.activation_checkpointing if train.fused or setting.activation_checkpointing == "full" else "none"
    ]
    return tokens * s.layers * kept, tokens * live


def _layer_workspace(work: Work, tokens: int) -> float:
    """Bytes of the gradients in the middle of an MLP's backward: at its activation, or at its input with what the matmul needs."""
    s, width = work.shape, work.width
    quantised = 2 * s.inter if work.precision == "fp8" else 0
    opened = {"fp8": 1, "nf4": 2}.get(work.precision, 0) * 2 * s.inter * s.hidden  # gate and up, transposed or in bf16
    return tokens * max((s.hidden + 3 * s.inter) * width, (2 * s.hidden + 2 * s.inter) * width + quantised) + opened


def _head(work: Work, tokens: int) -> float:
    """Bytes of the loss (model/loss.py) beside what the layers keep: logits by the chunk and hidden states, or, after that, gradients."""
    s, width = work.shape, work.width
    logits = min(tokens, CHUNK) * s.vocab * width  # their gradient takes their place
    hidden = tokens * s.hidden
    forward, backward = logits + hidden * (4 + 3 * width), hidden * (4 + width + 8)  # 4: the last norm's fp32 input
    if not work.train.lora:
        head = s.vocab * s.hidden  # its gradient is summed in fp32, and multiplied in fp32
        forward, backward = forward + head * (4 + width), backward + head * (8 + width)
    return max(forward, backward)


def _passing(work: Work) -> tuple[float, float]:
    """(bytes that gradients pass through in a backward, bytes of this GPU's own that wait there).

    Gradients gather in a bucket; one larger than it is reduced alone. Several GPUs reduce a flat copy. What is reduced goes to
    the partition, which is allocated whole with the first reduction: for adapters that fit the bucket, after the backward.
    """
    bucket, width = work.zero.bucket, work.width
    buffers = work.zero.buffers * bucket * width
    if work.trained <= bucket:
        return buffers, 0.0
    s = work.shape
    largest = 0 if work.train.lora else max(s.vocab * s.hidden, s.hidden * s.inter)
    alone = largest if largest > bucket else 0
    copied = max(bucket, largest) if work.gpus > 1 else 0
    return buffers + (alone + copied) * width, work.trained / work.gpus * width


def _step_time_s(work: Work, setting: Setting, gpu: Gpu, tokens: float, forwards: int) -> float:
    s, train = work.shape, work.train
    flops = Flops(s.layer_weights + s.vocab * s.hidden, work.trained if train.lora else 0, s.layers * s.q)
    share = s.layers * s.hidden / s.layer_weights  # of a layer's matmuls, an output column's; what ends a half is not made again
    full = (s.qkv + 2 * s.inter) * share if train.fused else 1.0
    again = {"none": 0.0, "selective": 2 * s.inter * share if train.fused else 0.0, "full": full}[setting.activation_checkpointing]
    precision, peak = "bf16" if work.precision == "fp32" else work.precision, gpu.peak_flops or 1e12
    once = flops.per_step(tokens, work.mean_length or work.row_tokens or work.seq_len) / EFFICIENCY[precision]
    lm = (once + 2 * again * s.layer_weights * tokens / AGAIN[precision]) * _filled(FULL_TOKENS) / _filled(tokens)
    seen = (6 if train.train_vision else 2) * s.beside * setting.micro_batch * work.patches / EFFICIENCY["bf16"]
    return forwards * (lm + seen) / peak


def _filled(tokens: float) -> float:
    """Share of a forward's time that grows with its tokens."""
    return min(tokens, FULL_TOKENS) / (min(tokens, FULL_TOKENS) + FIXED_TOKENS)
