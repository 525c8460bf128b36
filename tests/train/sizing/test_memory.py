"""What a run says before its weights are loaded, and when a GPU's memory runs out nonetheless."""

import pytest
import torch

from graft.core.errors import TrainError
from graft.core.recipe import Train
from graft.model.shapes import SHAPES
from graft.train.sizing.choice import choose
from graft.train.sizing.memory import MemoryPlan, planned
from graft.train.sizing.needs import ERROR, Gpu, Setting, Shape, Work

WORK = Work(Shape.of(SHAPES["llama-3.1-8b"]), "bf16", Train(global_batch=4), 4096)


def of(room_gib):
    return Gpu("NVIDIA H100 80GB HBM3", 79.2, room_gib, 989e12, True)


def test_auto_says_what_it_chose_and_records_it():
    plan = planned("sft", WORK, of(58.6))
    assert plan.line == f"micro_batch 2 (auto), activation_checkpointing none (auto): predicted peak {plan.predicted_gib:.1f} of 58.6 GiB"
    assert plan.numbers == {"micro_batch": 2, "activation_checkpointing": "none", "predicted_mem_gib": plan.predicted_gib}


def test_too_little_memory_is_refused_with_numbers_and_the_mend():
    fixed = Work(WORK.shape, "bf16", Train(global_batch=4, micro_batch=4, activation_checkpointing="none"), 4096)
    with pytest.raises(TrainError) as e:
        planned("sft", fixed, of(58.6))
    assert "sft does not fit: it needs 6" in str(e.value) and "has 58.6 of 79.2 GiB free: set micro_batch = 2" in str(e.value)
    with pytest.raises(TrainError, match=r'model\.precision = "fp8"'):
        planned("sft", WORK, of(15))


def test_within_the_error_it_is_only_warned_of():
    fixed = Work(WORK.shape, "bf16", Train(global_batch=4, micro_batch=4, activation_checkpointing="none"), 4096)
    needed = planned("sft", fixed, of(139)).predicted_gib
    assert "error" not in planned("sft", fixed, of(139)).line
    tight = planned("sft", fixed, of(needed * (1 - ERROR["peak_gib"] / 2)))
    assert "if it runs out, set micro_batch = 2" in tight.line and tight.setting == Setting(4, "none")


def test_running_out_is_one_line_with_what_needs_less():
    plan = planned("sft", WORK, of(139))
    with pytest.raises(TrainError) as e, plan.explaining("sft"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB")
    said = str(e.value)
    assert said.startswith("sft: CUDA out of memory") and "2.00 GiB" in said and "\n" not in said
    assert f"predicted {plan.predicted_gib:.1f}, with micro_batch 4, activation_checkpointing none: set micro_batch = 2" in said
    update = {"micro_batch": 2, "activation_checkpointing": "none"}
    assert choose(Work(WORK.shape, "bf16", WORK.train.model_copy(update=update), 4096), of(plan.predicted_gib)).setting == Setting(2, "none")
    with pytest.raises(TrainError, match="lower micro_batch"), MemoryPlan(Setting(1, "none")).explaining("sft"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
