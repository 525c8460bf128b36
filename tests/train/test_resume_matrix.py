"""A run that was lost and resumed is the run that was not, to the last bit; with other numbers of processes it has the same steps.

Ranks are forked (forked.py), lost by SIGKILL one step after a whole checkpoint. A subset of the matrix in which every pair of its
values meets runs always, all of it with --campaign.
"""

import itertools
from collections import Counter

import pytest

from graft.core.artifact import sha256_file
from graft.train.checkpoint import cursor_of, newest
from graft.train.order import BinOrder

from .forked import Host
from .small import BINS, curve, small_plan

CAMPAIGN = pytest.mark.campaign
ADAPTERS = {
    "lora": ("sft.lora={r=4,alpha=8}",),
    "dropout": ("sft.lora={r=4,alpha=8,dropout=0.1}",),
    "full": ("sft.lora=false", "sft.lr=1e-3"),
}
PRECISIONS = ("fp32", "bf16", "nf4")
RANKS = (1, 2)
LOST = {"in epoch 1": (2,), "at the border": (3,), "in epoch 2": (5,), "three times": (2, 3, 5)}  # after so many steps
STEPS, BATCH = 7, 4  # two epochs; step 3 has bins of both


def valid(adapter, precision, *_):
    return not (adapter == "full" and precision == "nf4")


CASES = [case for case in itertools.product(ADAPTERS, PRECISIONS, RANKS, LOST) if valid(*case)]


def pairs(case):
    """Any two of its values, by their places."""
    return set(itertools.combinations(enumerate(case), 2))


def pairwise(cases):
    """Some of the cases, in which each pair of values is that is in any: always the one with the most new pairs."""
    left, chosen = set().union(*map(pairs, cases)), []
    while left:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & left)))
        left -= pairs(chosen[-1])
    return chosen


ALWAYS = pairwise(CASES)


@pytest.fixture(scope="module")
def host():
    host = Host()
    yield host
    host.close()


class Undisturbed:
    """A run that nothing befell."""

    def __init__(self, host, root, adapter, precision, ranks):
        plan = planned(root, adapter, precision)
        self.bins = host.train(plan, ranks)
        self.steps, self.weights = outcome(plan)


def planned(root, adapter, precision, *overrides):
    root.mkdir(parents=True)
    return small_plan(root, "sft.save_every=1", f"model.precision={precision}", *ADAPTERS[adapter], *overrides)


def outcome(plan):
    """(figures of the steps, SHA-256 of the weights) of a run that has ended."""
    artifact = plan.resolve("sft").artifact
    (weights,) = artifact.path.glob("*model.safetensors")
    return curve(artifact.path), sha256_file(weights)


@pytest.fixture(scope="module")
def undisturbed(host, tmp_path_factory):
    """One run for all cases that are lost on its way."""
    made = {}

    def of(*way):
        if way not in made:
            made[way] = Undisturbed(host, tmp_path_factory.mktemp("undisturbed") / "run", *way)
        return made[way]

    return of


def test_the_subset_has_every_pair():
    met = set().union(*map(pairs, ALWAYS))
    print(f"{len(ALWAYS)} of {len(CASES)} cases have all {len(met)} pairs of values")
    assert met == set().union(*map(pairs, CASES)) and len(ALWAYS) < len(CASES) / 3


def lived(starts, lost):
    """[(step, bins)] of what counts in the end. starts: of each, what it trained; lost: the steps whose checkpoints were gone on from."""
    found = []
    for first, last, trained in zip((0, *lost), (*lost, None), starts, strict=True):
        steps = [step for step, _ in trained]
        assert steps == list(range(first, STEPS if last is None else last + 1)), "from the checkpoint to one step after the next"
        found += trained if last is None else trained[: last - first]
    return found


@pytest.mark.parametrize("case", [pytest.param(case, id=" ".join(map(str, case)), marks=() if case in ALWAYS else CAMPAIGN) for case in CASES])
def test_a_lost_run_ends_as_the_undisturbed_one(host, undisturbed, tmp_path, case):
    *way, where = case
    wanted, plan, ranks, starts = undisturbed(*way), planned(tmp_path / "run", *way[:2]), way[2], []
    for steps in LOST[where]:
        starts.append(host.train(plan, ranks, lose_after=steps))
        kept, passed = newest(plan.resolve("sft").run_directory)
        assert cursor_of(kept)["step"] == steps and not passed
    starts.append(host.train(plan, ranks))
    found, weights = outcome(plan)
    assert found == wanted.steps and len(found) == STEPS, "loss, gradient norm, learning rate, targets, validation loss"
    assert weights == wanted.weights
    bins = lived(starts, LOST[where])
    assert bins == wanted.bins
    assert Counter(i for _, own in bins for i in own) == dict.fromkeys(range(BINS), 2), "each once an epoch, none skipped"


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=" ".join(map(str, way)), marks=() if way == ("dropout", "bf16", 2) else CAMPAIGN)
        for way in sorted({case[:3] for case in CASES})
    ],
)
def test_two_undisturbed_runs_are_one(host, undisturbed, tmp_path, way):
    one, other = undisturbed(*way), Undisturbed(host, tmp_path / "other", *way)
    assert (one.steps, one.weights, one.bins) == (other.steps, other.weights, other.bins)
    order = BinOrder(BINS, 3)
    assert one.bins == [(step, sorted(order.take(step * BATCH, BATCH).tolist())) for step in range(STEPS)], "a function of the seed alone"


LONG = 100  # steps


@pytest.mark.parametrize(
    ("adapter", "worlds", "chain"),
    [
        ("lora", (1, 2, 4), (4, 2, 1, 2, 4)),
        pytest.param("dropout", (1, 2, 4), (4, 2, 1, 2, 4), marks=CAMPAIGN),
        pytest.param("full", (1, 2, 4), (4, 2, 1, 2, 4), marks=CAMPAIGN),
        pytest.param("lora", (1, 2, 4, 8), (8, 4, 2, 1, 8), marks=CAMPAIGN),
        pytest.param("full", (1, 2, 4, 8), (1, 8, 2, 4, 1), marks=CAMPAIGN),
    ],
)
def test_any_number_of_processes_takes_the_same_steps(host, tmp_path, adapter, worlds, chain):
    """Every divisor of the global batch alone, and a chain of them, each but the last lost after a fifth of the run."""
    batch, every = worlds[-1], LONG // len(chain)
    assert worlds == tuple(n for n in range(1, batch + 1) if batch % n == 0)
    settings = (f"sft.max_steps={LONG}", "sft.epochs=99", "sft.lr=1e-3", "sft.validate_every=50", "sft.micro_batch=1")

    def plan_in(name):
        return planned(tmp_path / name, adapter, "fp32", *settings, f"sft.global_batch={batch}", f"sft.save_every={every}")

    found, bins = {}, {}
    for world in worlds:
        plan = plan_in(f"{world}")
        bins[world] = host.train(plan, world)
        found[world] = outcome(plan)[0]
    plan = plan_in("chain")
    starts = [host.train(plan, world, lose_after=every * n if n < len(chain) else None) for n, world in enumerate(chain, 1)]
    found[chain] = outcome(plan)[0]
    bins[chain] = [(step, own) for n, trained in enumerate(starts) for step, own in trained if n * every <= step < (n + 1) * every]
    assert plan.resolve("sft").artifact.counts["processes"] == chain[-1]
    for name, steps in found.items():
        assert bins[name] == bins[1] and len(steps) == LONG
        assert [(s[0], s[3], s[4]) for s in steps] == [(s[0], s[3], s[4]) for s in found[1]], "step, learning rate, targets"
        apart = max(abs(a[1] - b[1]) / b[1] for a, b in zip(steps, found[1], strict=True))
        print(f"{adapter}, {batch} bins a step, {name} processes: losses of {LONG} steps {apart:.1e} from one process's at most")
        assert adapter == "dropout" or apart <= 1e-6
