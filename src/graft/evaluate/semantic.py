"""How near an answer is in meaning: the cosine of two texts' embeddings, each the mean of an encoder's last hidden states over its tokens, of length one
(Reimers & Gurevych 2019, https://aclanthology.org/D19-1410: sentence-BERT with its default pooling). Texts are taken as they
are, without an instruction before them; one longer than the encoder takes is cut there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.core.errors import ConfigError
from graft.core.hub import model_folder

UNLIMITED = 10**6  # tokenizers that know no limit say 10^30


class Encoder:
    """An encoder of texts, in bf16 on a GPU, else in fp32; ConfigError where it cannot be loaded as one."""

    def __init__(self, base: str, revision: str | None, batch_size: int, device: str | torch.device | None = None):
        from transformers import AutoModel, AutoTokenizer

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = batch_size
        folder = model_folder(base, revision, weights=True, key="evaluate.semantic")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model: Any = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
        except (OSError, ValueError) as e:
            raise ConfigError(f"evaluate.semantic = {base!r} cannot be loaded: {str(e).strip().splitlines()[0][:200]}") from None
        if model.config.is_encoder_decoder or (self.tokenizer.pad_token is None and self.tokenizer.eos_token is None):
            raise ConfigError(f"evaluate.semantic = {base!r} is no encoder of texts that pads: name one such as 'intfloat/multilingual-e5-small'")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.model = model.to(self.device).eval()
        places = int(getattr(model.config, "max_position_embeddings", None) or 512) - 2  # RoBERTa's begin behind the padding's
        self.longest = int(limit) if (limit := self.tokenizer.model_max_length) < UNLIMITED else places

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """[texts, hidden], fp32 on the CPU, each of length one; texts of like length share a batch."""
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for at in range(0, len(order), self.batch_size):
            places = order[at : at + self.batch_size]
            batch = self.tokenizer(
                [texts[n] for n in places], padding=True, truncation=True, max_length=self.longest, return_attention_mask=True, return_tensors="pt"
            ).to(self.device)
            hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            for n, own in zip(places, F.normalize(mean, dim=-1).cpu(), strict=True):
                found[n] = own
        return torch.stack(found)

    def similarity(self, answers: Sequence[str], wanted: Sequence[str]) -> list[float]:
        """The cosine of each answer and what was wanted, -1 to 1; 0 where only one of them says anything."""
        texts = list(dict.fromkeys([*answers, *wanted]))
        embedded = dict(zip(texts, self.embed(texts).double(), strict=True))
        return [
            float(bool(a.strip()) == bool(b.strip())) if not (a.strip() and b.strip()) else float(embedded[a] @ embedded[b])
            for a, b in zip(answers, wanted, strict=True)
        ]
