"""The chunked loss, its gradients included, against PyTorch's over whole logits in fp64."""

import pytest
import torch
from torch.nn import functional as F

from graft.model import loss as room


@pytest.mark.parametrize("rows", [1, 7, 8, 21])
@pytest.mark.parametrize("head_is_trained", [False, True])
def test_chunks_of_any_size_give_the_loss_and_gradients_of_the_whole(monkeypatch, rows, head_is_trained):
    monkeypatch.setattr(room, "CHUNK", 8)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=draw).requires_grad_()
    weight = torch.randn(50, 16, generator=draw).requires_grad_(head_is_trained)
    targets = torch.randint(0, 50, (rows,), generator=draw)
    loss = room._Chunked.apply(hidden, weight, targets)
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wanted = F.cross_entropy(wide[0] @ wide[1].t(), targets, reduction="sum")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    (loss * 0.3).backward()
    (wanted * 0.3).backward()
    torch.testing.assert_close(hidden.grad.double(), wide[0].grad, rtol=1e-5, atol=1e-6)
    if head_is_trained:
        torch.testing.assert_close(weight.grad.double(), wide[1].grad, rtol=1e-5, atol=1e-6)
    else:
        assert weight.grad is None


def test_without_gradients_it_makes_none():
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    with torch.no_grad():
        assert room._Chunked.apply(hidden, weight, torch.arange(5)) > 0
