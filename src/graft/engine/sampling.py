"""The next token of each row of a batch, and its probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from graft.engine.protocol import Request, Told


class Picked(NamedTuple):
    token: int
    told: Told | None = None  # before temperature; None unless asked for


def pick(logits: Tensor, requests: Sequence[Request], generators: Sequence[torch.Generator]) -> list[Picked]:
    """The next token of every row from fp32 logits [b, vocabulary]: the largest, or drawn from the k likeliest and the nucleus of these
    (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).

    A row's draw is one number of its own generator put through the inverse of its own distribution, so its batch mates
    cannot change it. The distribution runs in the order of the vocabulary: sorted by probability, the last bit of two
    nearly equal ones would decide which of them the number meets.
    """
    picked = logits.argmax(dim=-1)
    sampled = [i for i, request in enumerate(requests) if request.temperature > 0]
    if sampled:
        picked[sampled] = _drawn(logits[sampled], [requests[i] for i in sampled], [generators[i] for i in sampled])
    tokens = picked.tolist()
    found = [Picked(token) for token in tokens]
    for i, request in enumerate(requests):
        if request.logprobs is not None:
            logprobs = logits[i].log_softmax(dim=-1)
            values, ids = logprobs.topk(request.logprobs) if request.logprobs else (logits.new_zeros(0), picked[:0])
            found[i] = Picked(tokens[i], Told(float(logprobs[tokens[i]]), tuple(zip(ids.tolist(), values.tolist(), strict=True))))
    return found


def _drawn(logits: Tensor, requests: list[Request], generators: list[torch.Generator]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    draw = column([torch.rand((), generator=g, dtype=torch.float64).item() for g in generators])
    p = (logits.double() / column([r.temperature for r in requests])).softmax(dim=-1)
    if any(r.top_p < 1 or r.top_k for r in requests):
        likeliest, ids = p.sort(dim=-1, descending=True)
        rank = torch.arange(p.shape[-1], device=p.device)
        beyond = rank >= column([r.top_k or p.shape[-1] for r in requests])
        kept = likeliest.masked_fill(beyond, 0.0)
        before = kept.cumsum(dim=-1) - kept
        beyond |= before >= column([r.top_p for r in requests]) * kept.sum(dim=-1, keepdim=True)  # the likelier suffice; never true of the first
        p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, ids, beyond), 0.0)
    upto = p.cumsum(dim=-1)
    return torch.searchsorted(upto, draw * upto[:, -1:], right=True).clamp(max=p.shape[-1] - 1).squeeze(-1)
