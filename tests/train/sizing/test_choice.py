"""The fastest setting that is predicted to fit, over many GPUs and shapes, and what is said where none does."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from graft.core.errors import ConfigError
from graft.core.recipe import Lora, Train
from graft.model.shapes import SHAPES
from graft.train.sizing.choice import choose, mend, settings, smallest
from graft.train.sizing.needs import ERROR, Gpu, Setting, Shape, Work, need
from graft.train.strategy import Zero

LLAMA_8B, LLAMA_13B = (Shape.of(SHAPES[name]) for name in ("llama-3.1-8b", "taigi-llama-2-13b"))
BUCKET = Zero(50_000_000)
AUTO, FIXED = Train(global_batch=4), Train(global_batch=4, micro_batch=4, activation_checkpointing="none")


def work(precision="bf16", train=AUTO, shape=LLAMA_8B, seq_len=4096, gpus=1):
    return Work(shape, precision, train, seq_len, gpus, BUCKET)


def of(gib, fp8=True):
    return Gpu("", gib, gib, 989e12, fp8)


works = st.builds(
    work,
    st.sampled_from(["bf16", "fp8", "nf4"]),
    st.builds(Train, global_batch=st.sampled_from([1, 6, 8, 12, 64]), lora=st.builds(Lora, r=st.sampled_from([8, 64, 65]))),
    st.sampled_from([Shape.of(s) for s in SHAPES.values()]),
    st.sampled_from([256, 1536, 4096, 32768]),
)


@given(works, st.floats(4, 200), st.floats(1, 2), st.sampled_from([1, 2]))
@hypothesis_settings(max_examples=200, deadline=None)
def test_it_takes_the_fastest_that_fits_and_more_memory_never_hurts(work, room_gib, more, gpus):
    work = replace(work, gpus=gpus if work.train.global_batch % gpus == 0 else 1)
    gpu = of(room_gib)
    needs = {s: need(work, s, gpu) for s in settings(work)}
    assert all(work.train.global_batch % (work.gpus * s.micro_batch) == 0 for s in needs)
    fits = {s: n for s, n in needs.items() if n.peak_gib * (1 + ERROR["peak_gib"]) <= room_gib}
    found, larger = choose(work, gpu), choose(work, of(room_gib * more))
    if fits:
        assert found.setting in fits and not found.tight
        assert found.need.step_time_s == min(n.step_time_s for n in fits.values())
    elif found:
        assert found.tight and found.need.peak_gib == min(n.peak_gib for n in needs.values()) <= room_gib / (1 - ERROR["peak_gib"])
    else:
        assert min(n.peak_gib for n in needs.values()) * (1 - ERROR["peak_gib"]) > room_gib
    if found:
        assert larger and (larger.need.step_time_s <= found.need.step_time_s)


@given(works, st.floats(3, 120))
@hypothesis_settings(max_examples=100, deadline=None)
def test_what_is_named_fits(work, room_gib):
    """Whatever a refusal tells to set, a recipe with that set is not refused."""
    fixed = replace(work, train=work.train.model_copy(update={"micro_batch": work.train.global_batch, "activation_checkpointing": "none"}))
    gpu = of(room_gib)
    if choose(fixed, gpu) is None:
        told = mend(fixed, gpu)
        changes = dict(re.findall(r"(\w+) = \"?(\w+)\"?", told)) if told.startswith("set ") else {}
        if changes:
            precision = changes.pop("precision", work.precision)
            update = {key: int(value) if value.isdigit() else value for key, value in changes.items()}
            after = choose(replace(fixed, precision=precision, train=fixed.train.model_copy(update=update)), gpu)
            assert after and not after.tight
        else:
            assert told.startswith(("no setting fits", "take "))


def test_a_larger_forward_is_taken_as_far_as_it_helps():
    short = Train(global_batch=64)
    assert choose(work("fp8", short, seq_len=1024), of(139)).setting == Setting(16, "none"), "16k tokens"
    assert choose(work("fp8", short, seq_len=1024), of(40)).setting.activation_checkpointing == "none", (
        "smaller forwards cost less than computing again"
    )
    assert choose(work("fp8", short, seq_len=32768), of(100)).setting.activation_checkpointing == "selective", "a bin is as small as it gets"
    assert choose(work("fp8", short, seq_len=32768), of(50)).setting == Setting(1, "full")


def test_a_setting_of_the_recipe_is_kept():
    assert choose(work(train=FIXED), of(139)).setting == Setting(4, "none")
    assert choose(work(train=FIXED), of(60)) is None
    half = AUTO.model_copy(update={"micro_batch": 4})
    assert choose(work(train=half), of(60)).setting == Setting(4, "selective")
    full = AUTO.model_copy(update={"activation_checkpointing": "full"})
    assert choose(work(train=full), of(60)).setting == Setting(4, "full")
    with pytest.raises(ConfigError, match="4 bins cannot be split over 3"):
        choose(work(gpus=3), of(70))


def test_the_change_that_fits_is_named():
    assert mend(work(train=FIXED), of(60)) == "set micro_batch = 2"
    assert mend(work(train=FIXED), of(23)) == 'set micro_batch = 2, activation_checkpointing = "full"'
    assert mend(work(train=FIXED), of(16)) == 'set model.precision = "fp8", micro_batch = 2, activation_checkpointing = "full"'
    assert mend(work(train=FIXED), of(16, fp8=False)) == 'set model.precision = "nf4", micro_batch = 2, activation_checkpointing = "full"'
    assert mend(work(), of(16)) == 'set model.precision = "fp8"', "the rest is auto"
    assert mend(work("nf4", shape=LLAMA_13B), of(6)).startswith("no setting fits")
    whole = AUTO.model_copy(update={"lora": None, "global_batch": 16})
    assert mend(work(train=whole), of(70)) == 'take 4 of these GPUs, with activation_checkpointing and micro_batch = "auto"'
    assert "micro_batch" not in mend(work("fp32"), of(23))


def test_within_the_error_it_may_fit():
    exact = need(work(train=FIXED), Setting(4, "none"), of(1)).peak_gib
    for share, told in ((1 + 1.01 * ERROR["peak_gib"], False), (1.0, True), (1 - 0.95 * ERROR["peak_gib"], True)):
        assert choose(work(train=FIXED), of(exact * share)).tight == told
    assert choose(work(train=FIXED), of(exact * (1 - 1.05 * ERROR["peak_gib"]))) is None
    assert smallest(work(train=FIXED), of(1)).need.peak_gib == exact
