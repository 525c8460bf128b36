"""How far apart two models are whose weights stay on disk: KL divergence and greatest logit difference on a few texts, and a picture where they see.

A forward pass brings in one weight at a time, in slices, so it takes the memory of a weight and of the logits. It computes in fp32:
what is measured is the weights' difference, not the rounding of bf16 activations, which no two engines share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from graft.core.errors import ConfigError
from graft.model.base import sees_images
from graft.model.frozen import quantize_rows
from graft.model.images import ImageProcessor
from graft.train.merge_weights import Adapter, MergeBase

TEXTS = (  # the first article of the Universal Declaration of Human Rights in four scripts and languages, and the recipes' own words
    "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。",
    "人人生來自由，佇尊嚴佮權利上一律平等。𪜶有理性佮良心，閣應該以兄弟關係的精神來相對待。",
    "Lâng-lâng seng-lâi chū-iû, tī chun-giâm kap koân-lī siōng it-lu̍t pêng-téng.",
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience.",
    "阿明請小美畫一隻在海邊散步的柴犬，小美交出了一張圖。The quick brown fox jumps over the lazy dog.",
)
TOKENS = 64  # of a text, at most
_SLICE = 1 << 25  # weights in fp32 at once: 128 MiB


class Difference(NamedTuple):
    kl_nats: float  # KL(p ‖ q), the mean over positions
    logit_difference_max: float
    logit_std: float  # of p's logits


def tokens_of(tokenizer: Any, base: MergeBase) -> list[Tensor]:
    """The ids [length] of each text; ConfigError where the model has no embedding for one."""
    text = base.config.get_text_config()
    most = min(TOKENS, getattr(text, "max_position_embeddings", None) or TOKENS)
    ids = [torch.tensor(tokenizer(t)["input_ids"][:most]) for t in TEXTS]
    if (highest := max(int(i.max()) for i in ids)) >= text.vocab_size:
        raise ConfigError(f"the tokenizer of {base.name!r} gives the id {highest}, its model has {text.vocab_size} embeddings")
    return ids


@torch.no_grad()
def logits_of(
    base: MergeBase, weight: Callable[[str], Tensor], adapter: Adapter | None, texts: list[Tensor], rounds_inputs: bool = False
) -> list[Tensor]:
    """Logits [length, vocabulary] fp32 on the CPU of each text, and of a picture where the model sees, its tensors weight(name)'s and an adapter beside them.

    rounds_inputs: what goes into a quantised layer is FP8 too, as where fp8 trains.
    """
    lm = base.lm
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(base.device)  # causal: what stands behind a text changes nothing in it
    with _weights_from(base, weight, adapter, rounds_inputs):
        logits = lm(input_ids=ids, use_cache=False).logits
        found = [own[: len(text)].float().cpu() for own, text in zip(logits, texts, strict=True)]
        if sees_images(base.config):
            shown = {name: tensor.to(base.device) for name, tensor in _picture(base, texts[0]).items()}
            found.append(lm(**shown, use_cache=False).logits[0].float().cpu())
    return found


def _picture(base: MergeBase, text: Tensor) -> dict[str, Tensor]:
    """What a model that sees takes of a picture of four colours, and a text behind it."""
    processor, config = ImageProcessor(base.name, base.revision), base.config
    corners = Image.fromarray(np.array([[[200, 40, 40], [40, 160, 60]], [[40, 80, 200], [240, 240, 240]]], np.uint8))
    seen = processor.seen(corners.resize((4 * processor.factor, 3 * processor.factor)))
    ids = torch.tensor([config.vision_start_token_id, *[config.image_token_id] * processor.tokens(seen.grid), config.vision_end_token_id])
    ids = torch.cat([ids, text])[None]
    kinds = (ids == config.image_token_id).int()
    return {"input_ids": ids, "mm_token_type_ids": kinds, "pixel_values": torch.from_numpy(seen.patches), "image_grid_thw": torch.tensor([seen.grid])}


def difference(p: list[Tensor], q: list[Tensor]) -> Difference:
    """Of the logits of two models over the same texts."""
    nats = torch.cat([_kl(a, b) for a, b in zip(p, q, strict=True)])
    largest = max((a - b).abs().max().item() for a, b in zip(p, q, strict=True))
    if not all(bool((a - b).isfinite().all()) for a, b in zip(p, q, strict=True)):
        largest = float("nan")  # max() passes over it
    return Difference(nats.mean().item(), largest, torch.cat([a.flatten() for a in p]).std().item())


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """[length] nats of logits [length, vocabulary]; in fp64, since fp32's rounding is 1e-7 a position."""
    of_p, of_q = F.log_softmax(p.double(), -1), F.log_softmax(q.double(), -1)
    return F.kl_div(of_q, of_p, reduction="none", log_target=True).sum(-1)


@contextmanager
def _weights_from(base: MergeBase, weight: Callable[[str], Tensor], adapter: Adapter | None, rounds_inputs: bool) -> Iterator[None]:
    """Give each module of the empty model its tensors as it is called, and take them back."""
    handles: list[Any] = []
    for name, module in base.lm.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                full = f"{name}.{leaf}".lstrip(".")
                module._buffers[leaf] = (weight(full) if full in base.specs else buffer).to(base.device)
        if name in base.linears:
            pair = adapter.pairs.get(name) if adapter else None
            forward = partial(_linear, base, name, module.bias is not None, weight, pair, adapter.scale if adapter else 0.0)
            module.forward = partial(forward, rounds_inputs and f"{name}.weight" in base.quantised)
        elif any(p is not None for p in module._parameters.values()):
            handles.append(module.register_forward_pre_hook(partial(_bring, base, name, weight)))
            handles.append(module.register_forward_hook(partial(_take, dict(module._parameters))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in base.linears.values():
            del module.forward


def _bring(base: MergeBase, name: str, weight: Callable[[str], Tensor], module: nn.Module, inputs: Any) -> None:
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            found = weight(f"{name}.{leaf}".lstrip("."))
            # an embedding's rows are looked up, not multiplied: in fp32 a large one would be gigabytes
            module._parameters[leaf] = nn.Parameter(found if isinstance(module, nn.Embedding) else found.float(), requires_grad=False)


def _take(empty: dict[str, nn.Parameter | None], module: nn.Module, inputs: Any, output: Any) -> Any:
    module._parameters.update(empty)
    return output.float() if isinstance(module, nn.Embedding) else output


def _linear(
    base: MergeBase, name: str, bias: bool, weight: Callable[[str], Tensor], pair: tuple[Tensor, Tensor] | None, scale: float, rounds: bool, x: Tensor
) -> Tensor:
    """x Wᵀ + bias + scale x Aᵀ Bᵀ, W a few rows at a time."""
    w, into = weight(f"{name}.weight"), x
    if rounds:
        rows, scales = quantize_rows(x.reshape(-1, x.shape[-1]))
        into = (rows.float() * scales).view(x.shape)
    y = torch.cat([F.linear(into, part.float()) for part in w.split(max(1, _SLICE // w.shape[1]))], -1)
    if bias:
        y += weight(f"{name}.bias").float()
    if pair:
        a, b = (m.to(base.device, torch.float32) for m in pair)
        y += F.linear(F.linear(x, a) * scale, b)
    return y
