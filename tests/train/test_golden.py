"""The tiny model's losses and gradient norms are those that were written down; golden.py says how exactly, and writes them anew."""

import copy
import json
import math

import pytest
import torch

from . import golden

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: golden.py compares there")


def held(device):
    path = golden.path_of(device)
    if device == "gpu" and not path.is_file():
        pytest.skip(f"no {path.name} yet: python tests/train/golden.py --write on this machine makes it")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("device", "case"),
    [("cpu", case) for case in golden.CASES["cpu"]] + [pytest.param("gpu", case, marks=NO_GPU) for case in golden.CASES["gpu"]],
)
def test_training_has_its_golden_figures(device, case):
    wanted, found = held(device), golden.run(case, device)
    print(f"{case}: {golden.spread(found, wanted['cases'][case]):.1e} apart at most")
    assert (said := golden.difference(case, found, wanted, golden.machine(device))) is None, said


def test_the_last_bit_counts_on_the_same_machine_and_a_stated_share_elsewhere():
    wanted, here = held("cpu"), {"torch": "0", "cpu": "another"}
    tolerance = golden.TOLERANCE["fp32"]
    for key in golden.FIGURES:
        for factor, fails_here, fails_elsewhere in (
            (1.0, False, False),
            (1 + 2**-52, True, False),
            (1 + 0.9 * tolerance, True, False),
            (1 + 1.1 * tolerance, True, True),
            (math.nan, True, True),
        ):
            found = copy.deepcopy(wanted["cases"]["full-fp32"])
            found[key][7] *= factor
            for machine, fails, words in (
                (wanted["machine"], fails_here, "0 (the same machine"),
                (here, fails_elsewhere, f"{tolerance:g} (written on"),
            ):
                said = golden.difference("full-fp32", found, wanted, machine)
                assert bool(said) == fails and (not fails or (f"{key} of step 7" in said and f"tolerance {words}" in said)), said


def test_figures_that_two_runs_do_not_share_have_a_tolerance_of_their_own():
    wanted = held("cpu")
    wanted["cases"]["lora-fp32"]["spread"] = 1e-9
    found = copy.deepcopy(wanted["cases"]["lora-fp32"])
    found["loss"][0] *= 1 + 5e-9
    assert golden.difference("lora-fp32", found, wanted, wanted["machine"]) is None
    found["loss"][0] *= 1 + 6e-9
    assert "tolerance 1e-08 (the same machine" in golden.difference("lora-fp32", found, wanted, wanted["machine"])
