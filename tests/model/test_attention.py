"""Packed attention: every backend that is here against the reference, forward and gradients, and how documents are handed over."""

from itertools import pairwise

import pytest
import torch

from graft.model import attention
from graft.model.attention import BACKENDS, Documents
from graft.model.gemm import roomy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, WIDTH, TOKENS = 8, 2, 64, 512
ENDS = {"of one length": [0, 128, 256, 384, 512], "of several": [0, 1, 130, 400, 512], "one": [0, 512]}


def documents_of(ends):
    return Documents(torch.tensor(ends, dtype=torch.int32, device=DEVICE), torch.tensor(ends).diff().max().to(torch.int32))


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("room", [0, 64])
def test_a_backend_agrees_with_each_document_by_itself(backend, ends, room):
    if backend != "reference" and (DEVICE == "cpu" or not attention._installed(BACKENDS[backend])):
        pytest.skip(f"{backend} is not here")
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    draw = torch.Generator().manual_seed(0)
    y, dout = (torch.randn(TOKENS, h, WIDTH, generator=draw).to(DEVICE, dtype) for h in (HEADS + 2 * KV_HEADS, HEADS))
    dy, of = torch.empty_like(y), [HEADS, KV_HEADS, KV_HEADS]
    (q, k, v), grads = y.split(of, dim=1), dy.split(of, dim=1)  # whose rows lie apart, as in training
    documents, scale = documents_of(ends), WIDTH**-0.5
    out, lse = attention.forward(q, k, v, *documents, scale, backend, room=room)
    assert out.stride() == (HEADS * WIDTH + (room if backend in ("fa4", "reference") else 0), WIDTH, 1)
    dout = roomy(dout, HEADS * WIDTH, room).unflatten(1, (HEADS, WIDTH)).copy_(dout)
    attention.backward(grads, dout, q, k, v, out, lse, *documents, scale, backend)

    for begin, end in pairwise(ends):
        own = [x[begin:end].double().requires_grad_() for x in (q, k, v)]
        k_, v_ = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in own[1:])
        scores = torch.einsum("ihd,jhd->hij", own[0], k_) * scale
        future = torch.ones(end - begin, end - begin, dtype=torch.bool, device=DEVICE).triu(1)
        alone = torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), v_)
        wanted = alone, *torch.autograd.grad(alone, own, dout[begin:end].double())
        for found, one in zip((out, *grads), wanted, strict=True):
            assert (found[begin:end] - one).norm() <= 1e-2 * one.norm() + 1e-2


def test_documents_of_one_length_are_a_batch_to_the_backward_of_flash_attention_4():
    q, cu = torch.arange(24.0).view(6, 4)[:, :2].unsqueeze(1), torch.tensor([0, 3, 6], dtype=torch.int32)
    lse = torch.arange(12.0).view(2, 6)
    (by_document, batch), given = attention._batched(cu, 3, 0.5, lse, q)
    assert given == {"softmax_scale": 0.5, "causal": True} and batch.shape == (2, 3, 1, 2) and torch.equal(batch.flatten(0, 1), q)
    assert batch.data_ptr() == q.data_ptr(), "a view"
    assert by_document.is_contiguous() and torch.equal(by_document, torch.stack([lse[:, :3], lse[:, 3:]]))
    (same, rows), given = attention._batched(torch.tensor([0, 2, 6], dtype=torch.int32), 4, 0.5, lse, q)
    assert rows is q and same is lse and given["max_seqlen_q"] == given["max_seqlen_k"] == 4 and given["cu_seqlens_q"] is given["cu_seqlens_k"]


@pytest.mark.parametrize("wrong", ["nothing", "forward", "gradient", "documents of several lengths"])
def test_a_backend_that_is_wrong_is_not_timed(monkeypatch, wrong):
    def given(q, k, v, documents, scale, backend):
        several = len(set(documents.cu.diff().tolist())) > 1
        spoilt = backend != "reference" and (several if wrong.startswith("documents") else wrong != "nothing")
        if spoilt and wrong == "gradient":
            return q + k + 1.1 * v - 0.1 * v.detach()
        return q + k + v * (1.1 if spoilt else 1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(attention, "attention", given)
    time_s = attention._time_s("flash", 2, 2, 8, torch.device("cpu"))
    assert time_s > 0 if wrong == "nothing" else time_s is None
