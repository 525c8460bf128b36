"""The masks of adapters' dropout, and the products in which they stand."""

import itertools

import pytest
import torch

from graft.model.dropout import LEVELS, Drop, add_back_, down_product, dropped, grown, kept, of_a, philox, threshold_of


def seeds(n, of=0):
    return torch.randint(2**63 - 1, (n,), generator=torch.Generator().manual_seed(of))


def test_its_words_are_those_of_the_authors():
    """kat_vectors of Random123 (https://github.com/DEShawResearch/random123), philox4x32 7; other counters and keys: test_triton_kernels.py."""
    zero = torch.tensor(0)
    assert [int(word) for word in philox(zero, zero, zero)] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_so_many_are_dropped_in_every_row_and_column(rate):
    mask, share = kept(seeds(1)[0], threshold_of(rate), 1000, 1000), threshold_of(rate) / LEVELS
    assert share == pytest.approx(rate, abs=1e-5)
    for counts, n in (((~mask).sum(), 1e6), ((~mask).sum(0), 1e3), ((~mask).sum(1), 1e3)):
        z = (counts - n * share) / (n * share * (1 - share)) ** 0.5
        assert z.abs().max() < 5 and (counts.dim() == 0 or 0.85 < z.var() < 1.15)


def test_masks_of_adapters_steps_and_neighbours_have_nothing_in_common():
    rate = threshold_of(0.3)
    masks = [kept(seed, rate, 500, 1000) for seed in (*seeds(3), *seeds(2, of=1), torch.tensor(0), torch.tensor(1), torch.tensor(1 << 32))]
    pairs = [*itertools.combinations(masks, 2)]
    pairs += [(m[:, d:], m[:, :-d]) for m in masks[:2] for d in (1, 2, 4, 7, 8, 16, 500)] + [
        (m[d:], m[:-d]) for m in masks[:2] for d in (1, 2, 8, 250)
    ]
    for one, other in pairs:
        both = (one & other).double().mean().item()
        assert abs(both - 0.49) < 5 * (0.49 * 0.51 / one.numel()) ** 0.5


def test_a_mask_is_a_function_of_seed_and_place_alone():
    whole = kept(seeds(1)[0], threshold_of(0.2), 40, 100)
    assert torch.equal(whole[:17, :43], kept(seeds(1)[0], threshold_of(0.2), 17, 43))


def test_a_rate_is_never_all():
    assert threshold_of(0.0) == 0 and threshold_of(1 - 1e-9) == LEVELS - 1 and grown(2.0, Drop(seeds(1), LEVELS // 4)) == 2 / 0.75


def test_expectation_and_variance_are_those_of_dropout():
    """Of x / (1 - p) where it is kept: mean x, variance x² p / (1 - p)."""
    x, found = torch.linspace(-2, 2, 50).expand(400, 50), []
    for seed in seeds(20):
        drop = Drop(seed[None], threshold_of(0.25))
        found.append(dropped(x, drop, 0) * grown(1.0, drop))
    found = torch.cat(found)
    error = (0.25 / 0.75 * x[0] ** 2 / len(found)) ** 0.5
    assert ((found.mean(0) - x[0]).abs() < 4 * error).all() and torch.allclose(found.var(0), x[0] ** 2 / 3, rtol=0.1)


@pytest.mark.parametrize("adapters", [1, 3])
def test_products_are_those_of_autograd_with_the_same_masks(adapters):
    draw = torch.Generator().manual_seed(0)
    x, a, du = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in [(9, 20), (adapters * 4, 20), (9, adapters * 4)])
    x, a, drop = x.requires_grad_(), a.requires_grad_(), Drop(seeds(adapters), threshold_of(0.5))
    masks = [kept(seed, drop.threshold, 9, 20) for seed in drop.seeds]
    u = torch.cat([(x * mask) @ own.t() for mask, own in zip(masks, a.chunk(adapters), strict=True)], dim=1)
    wanted = u, *torch.autograd.grad(u, (x, a), du)
    with torch.no_grad():
        dx, da = torch.ones_like(x), torch.empty_like(a)
        add_back_(dx, du, a, drop)
        of_a(du, x, drop, da)
        found = down_product(x, a, drop), dx - 1, da
    assert all(torch.allclose(one, other) for one, other in zip(found, wanted, strict=True))
