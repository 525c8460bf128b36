"""Model FLOPs a token, for MFU: 4N + 6n + 3A with adapters, 6N + 3A for full training.

N: frozen (or, in full training, all) matmul weights without the input embedding; n: adapter weights; A: causal
attention over packed documents, 4 L H d sum(l (l + 1) / 2) / sum(l). A frozen weight needs no weight gradient, hence 4N.
What a vision tower computes is left out.
After Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361), appendix B, with the attention counted exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense, NVIDIA data sheets


@dataclass(frozen=True)
class Flops:
    matmul: int  # N
    adapter: int  # n, 0 in full training
    attention_width: int  # L * H * d

    @classmethod
    def of(cls, lm: Any) -> Flops:
        """Count a model after LoRA was injected; 4-bit weights count by their shape."""
        from graft.model.lora import adapters, in_tower

        n, big = sum(a.numel() + b.numel() for name, a, b in adapters(lm) if not in_tower(name)), 0
        for name, module in lm.named_modules():
            if hasattr(module, "in_features") and not in_tower(name):
                big += module.in_features * module.out_features
        c = lm.config.get_text_config()
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return cls(big, n, c.num_hidden_layers * c.num_attention_heads * head)

    def per_step(self, tokens: float, mean_length: float) -> float:
        """FLOPs of a step over `tokens` in documents of `mean_length` tokens (length-weighted mean)."""
        attention = 4 * self.attention_width * (mean_length + 1) / 2
        return tokens * ((4 * self.matmul + 6 * self.adapter if self.adapter else 6 * self.matmul) + 3 * attention)


def peak_flops() -> float | None:
    """Nominal dense bf16 FLOP/s of this process's GPU, None where it is not known."""
    import torch

    if not torch.cuda.is_available():
        return None
    return PEAK_BF16_FLOPS.get(known(torch.cuda.get_device_name()) or "")


def known(device: str) -> str | None:
    """The key of PEAK_BF16_FLOPS in a device's name, such as "NVIDIA H100 80GB HBM3"."""
    return next((key for key in PEAK_BF16_FLOPS if key in device), None)
