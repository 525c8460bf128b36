"""What a run says before its weights are loaded, and when a GPU's memory runs out nonetheless."""

from dataclasses import replace

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


def test_a_resumed_run_keeps_its_setting_where_it_fits_and_else_takes_what_does():
    """8B whole, from 8 GPUs to 4, each of which holds twice the optimizer's states."""
    work, room = Work(WORK.shape, "bf16", Train(lora=False, global_batch=16), 4096, gpus=8), of(78.0)
    fewer, before = replace(work, gpus=4), planned("sft", work, room).setting._asdict()
    again = planned("sft", work, room, before)
    assert again.setting._asdict() == before and "(auto)" not in again.line and "before" not in again.line
    less = {"micro_batch": 1, "activation_checkpointing": "full"}
    assert planned("sft", fewer, room, less, moved=True).setting._asdict() == less, "a run goes on as it began, also where another were faster"
    with pytest.raises(TrainError, match="does not fit"):
        planned("sft", replace(fewer, train=fewer.train.model_copy(update=before)), room)
    found, fresh = planned("sft", fewer, room, before, moved=True), planned("sft", fewer, room)
    assert found.setting == fresh.setting != Setting(**before) and found.predicted_gib < 78.0
    assert found.line == f"{fresh.line}; before it was micro_batch 2, activation_checkpointing none, which may not fit here"
    named = replace(fewer, train=fewer.train.model_copy(update={"activation_checkpointing": "none", "micro_batch": 2}))
    with pytest.raises(TrainError, match="does not fit"):
        planned("sft", named, room, {}, moved=True)


def test_a_setting_that_fits_within_the_error_is_kept_only_where_it_ran():
    work, before = Work(WORK.shape, "bf16", Train(lora=False, global_batch=16), 2048, gpus=4), {"micro_batch": 2, "activation_checkpointing": "none"}
    kept, other = planned("sft", work, of(78.0), before), planned("sft", work, of(78.0), before, moved=True)
    assert kept.setting == Setting(**before) and "within the prediction's error" in kept.line
    assert other.setting == Setting(1, "none") and "error" not in other.line and "before it was micro_batch 2" in other.line


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
