"""The training loop, for CPT and SFT, LoRA and full, one process to many: read it from top to bottom.

One step: the bins of the global position, shared out by attention cost; the loss is the sum over targets divided by the
targets of the whole global batch, so that splitting the batch differently gives the same gradients. Randomness is keyed
by (seed, step, rank) and the learning rate by the global step, so resume needs no more than the cursor.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator

from graft.core.artifact import Artifact
from graft.core.errors import Preempted, TrainError
from graft.core.recipe import Train
from graft.core.shards import ShardSet
from graft.core.stages import Job
from graft.core.store import AdapterStore
from graft.model.chat import load_tokenizer, save_tokenizer
from graft.model.images import copy_config
from graft.model.lora import save_adapter
from graft.model.packed import PackedLM
from graft.train import checkpoint, fence, parity
from graft.train.best import Best
from graft.train.build import build, compilations
from graft.train.feed import feed_of
from graft.train.fit import refuse_misfits
from graft.train.flops import Flops
from graft.train.guard import Guard
from graft.train.nodes.inspection import inspected
from graft.train.nodes.watch import Watch
from graft.train.order import learning_rate
from graft.train.preempt import Asked
from graft.train.profile import Profiler
from graft.train.ranks import accelerator_of, local_leader, watch_of
from graft.train.report import Reporter
from graft.train.resume import Start, start_of
from graft.train.sizing.memory import MemoryPlan, agreed
from graft.train.split import deepspeed_split, total_steps
from graft.train.tune import tune


def run(job: Job, profile: bool = False, allow_data_change: bool = False) -> None:
    """Train one stage and publish its artifact; resumes from the newest verified checkpoint of the same fingerprint.

    profile: rank 0 also writes where some steps' time goes (profile.py). allow_data_change: go on from an unfinished run over other data.
    """
    asked = Asked()
    recipe, stage = job.recipe, job.stage.name
    config = recipe.train_stage(stage)
    with inspected(job.run_directory) as together:
        with redirect_stdout(sys.stderr):  # stdout is for people; libraries that print go to the log
            accelerator = accelerator_of(job, config)
        ceiling_tflop_per_s = together(accelerator.device)
    folder = job.parents[f"shard-{stage}"].path
    shards = ShardSet.open(folder / "train", verify=local_leader())
    held_out = ShardSet.open(folder / "validation", verify=False) if (folder / "validation").is_dir() else None
    if local_leader():
        splits = {"train": shards, "validation": held_out}
        refuse_misfits([(folder / name, split) for name, split in splits.items() if split], job.plan, stage)
    watch = watch_of(job, config)
    held = watch.hold()
    total = total_steps(len(shards), config.epochs, config.global_batch, config.max_steps)
    begin = start_of(job, allow_data_change, total)
    if begin is None:
        if accelerator.process_index == 0:
            print(f"train {stage}: complete at {job.directory}", flush=True)
        watch.close()
        dist.destroy_process_group()
        return
    plan = agreed(job, accelerator.device, checkpoint.cursor_of(begin.checkpoint) if begin.checkpoint else {})
    accelerator.state.deepspeed_plugin.deepspeed_config.update(
        deepspeed_split(config.global_batch, accelerator.num_processes, plan.setting.micro_batch)
    )
    if plan.line and accelerator.process_index == 0:
        print(f"train {stage}: {plan.line}", flush=True)
    with plan.explaining(stage):
        _train(job, accelerator, shards, held_out, total, plan, begin, asked, watch, profile, ceiling_tflop_per_s)
    if held:
        held.close()


def _train(
    job: Job,
    accelerator: Accelerator,
    shards: ShardSet,
    held_out: ShardSet | None,
    total: int,
    plan: MemoryPlan,
    begin: Start,
    asked: Asked,
    watch: Watch,
    profile: bool,
    ceiling_tflop_per_s: float | None,
) -> None:
    watch.at("loading", slow=True)
    recipe, stage, micro = job.recipe, job.stage.name, plan.setting.micro_batch
    config = recipe.train_stage(stage).model_copy(update=plan.setting._asdict())
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    base, revision = job.plan.base_model(stage)
    model = build(base, revision, recipe.train_precision(stage), config, recipe.seed, device)
    lm, flops = model.lm, Flops.of(model.lm)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.95),
        fused=True,  # whose step can be left out on the device (guard.py)
    )
    engine, _ = accelerator.prepare(model, optimizer)
    engine.set_gradient_accumulation_boundary(True)  # the loop holds a step's micro-batches together, DeepSpeed need not count them

    run_dir = job.run_directory
    cursor = checkpoint.load(engine, begin.checkpoint, begin.expected) if begin.checkpoint else None
    first = cursor["step"] if cursor else 0
    tokens_seen, device_s = (cursor["tokens"], cursor["device_s"]) if cursor else (0, 0.0)  # of all ranks
    if not shards.of_images:  # whose micro-batches differ in length
        left_flop = flops.per_step(config.global_batch * shards.seq_len, shards.seq_len / 2) * (total - first) / world
        if (line := tune(lm, config, micro * shards.seq_len, left_flop)) and rank == 0:
            print(f"train {stage}: {line}", flush=True)
    best = Best(config, run_dir, cursor.get("best") if cursor else None)
    save = partial(_save_weights, lm, config, base, job) if rank == 0 else None
    feed = feed_of(job, lm, total, shards, recipe.seed, config.global_batch, micro, world, rank, device)
    validation = [held_out.bin(i) for i in range(rank, len(held_out), world)] if held_out else None  # this rank's share, maybe nothing
    report = Reporter(job, run_dir, total, first, world, flops, plan, ceiling_tflop_per_s) if rank == 0 else None
    profiler = Profiler(run_dir) if profile and rank == 0 else None
    writer = checkpoint.Writer(engine, run_dir, config.keep_checkpoints)
    guard = Guard(config, engine, cursor["guard"] if cursor else None)

    for step in range(first, total):
        if best.stop:
            break
        watch.at(f"step {step}", slow=step == first)  # kernels are compiled in the first
        started = time.perf_counter()
        torch.manual_seed(_seed(recipe.seed, step, rank))
        batch = feed.take(step)

        lr = learning_rate(step, total, config.lr, config.warmup, config.schedule)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        # without, ZeRO-2 reduces after each micro-batch
        with engine.coalesce_grad_reduction() if len(batch.micro_batches) > 1 else nullcontext():
            for micro_batch in batch.micro_batches:
                token_loss = engine(micro_batch)
                loss += token_loss.detach()
                engine.backward(token_loss * (world / batch.targets), scale_wrt_gas=False)  # ZeRO averages over ranks
        waited_s = feed.waited_s
        if step + 1 < total:
            feed.look_ahead(step + 1)
        here = torch.tensor([0.0, writer.written, bool(writer.failure), bool(asked.by)], pin_memory=device.type == "cuda")
        sums = here.to(device, non_blocking=True)
        sums[0] = loss
        dist.all_reduce(sums)
        guard.judge(sums, batch.targets)
        engine.step()
        skipped = guard.verdict()  # waits for the GPU, which has the optimizer's step left
        written, failed, leave = guard.sums
        tokens_seen += batch.tokens
        _report_unsaved(writer.border(int(written), int(failed)), config, stage, run_dir)

        done = step + 1
        ends = done == total
        metrics = {
            "step": step,
            "loss": guard.loss,
            "lr": lr,
            "grad_norm": guard.norm,
            **({"skipped": skipped, "bins": batch.indices.tolist()} if skipped else {}),
            "tokens": batch.tokens,
            "targets": batch.targets,
            "mean_document_tokens": batch.mean_document_tokens,
            **({"images": batch.images} if shards.of_images else {}),
            "data_s": waited_s,
            "compilations": compilations(),
            "step_time_s": time.perf_counter() - started,
        }
        if validation is not None and (ends or (config.validate_every and done % config.validate_every == 0)):
            metrics["validation_loss"] = _validate(engine, validation, micro, device, watch, feed.collate)
            _report_unsaved(best.validated(metrics["validation_loss"], done, save), config, stage, run_dir)
            metrics["validation_s"] = time.perf_counter() - started - metrics["step_time_s"]
            ends = ends or best.stop
        device_s += (time.perf_counter() - started) * world
        if report:
            _report_unsaved(report.step(metrics), config, stage, run_dir)
        if profiler:
            profiler.step(done - first)
        if guard.state["in_a_row"] >= config.max_skipped:
            writer.finish()
            raise TrainError(
                f"{stage}: {config.max_skipped} steps in a row were left out, the last of them {step}: {skipped}, bins {batch.indices.tolist()[:8]}; "
                f"look at those bins by `graft inspect`, lower {stage}.lr and start anew, or set {stage}.spike_deviations = false, which takes what is "
                f"finite, and go on; {_kept(run_dir)}"
            )
        if done % config.save_every == 0 or ends or leave:
            watch.at(f"saving step {done}", slow=True)
            position = {"step": done, "position": done * config.global_batch, "tokens": tokens_seen, "best": best.state}
            position |= {"setting": plan.setting._asdict(), "guard": guard.state, "device_s": device_s, "data_changes": begin.changes}
            _report_unsaved(writer.save(position | begin.same), config, stage, run_dir)
        if leave and not ends:
            _report_unsaved(writer.finish(), config, stage, run_dir)
            told: list[str | None] = [None] * world
            dist.all_gather_object(told, asked.by)
            by = ", ".join(f"{name} to rank {n}" for n, name in enumerate(told) if name)
            raise Preempted(f"{stage}: asked to leave ({by}), saved after {done} of {total} steps: the same command goes on")

    watch.at("publishing", slow=True)
    _report_unsaved(writer.finish(), config, stage, run_dir)
    if report and save:
        counts = {**report.finish(), "steps": report.steps, "tokens": tokens_seen, "bins": len(shards), "processes": world}
        counts |= {"skipped_steps": guard.state["skipped"], "device_hours": device_s / 3600}
        counts |= {"data_changes": begin.changes} if begin.changes else {}
        _publish(job, best, save, run_dir, counts, model)
        report.published(job.artifact)
    dist.barrier()
    watch.close()
    dist.destroy_process_group()


def _report_unsaved(why: str | None, config: Train, stage: str, run_dir: Path) -> None:
    """Stop with the line on what could not be written, or print it where the recipe says to go on. Of a checkpoint all ranks are told, else rank 0."""
    if why is None:
        return
    line = f"{stage}: {why}; {_kept(run_dir)}"
    if config.on_save_failure == "stop":
        raise TrainError(f"{line}: make room and start again, or set {stage}.on_save_failure = 'continue'")
    if dist.get_rank() == 0:
        print(line, flush=True)


def _kept(run_dir: Path) -> str:
    kept = checkpoint.steps(run_dir)
    return f"the newest checkpoint in {run_dir} is {kept[-1].name}" if kept else f"{run_dir} holds no checkpoint yet"


def _validate(engine: Any, bins: list[Any], micro: int, device: torch.device, watch: Watch, collate: Callable[..., Any]) -> float:
    """Mean loss (nats a target) over the held-out bins of all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad(), engine.module.without_dropout():
        for at in range(0, len(bins), micro):
            watch.at("validation", slow=True)
            batch = collate(bins[at : at + micro]).to(device)
            sums += torch.tensor([engine.module(batch).item(), batch.targets.numel()], device=device)
    dist.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).item()


def _save_weights(lm: Any, config: Train, base: str, job: Job, folder: Path) -> None:
    if config.lora:
        save_adapter(lm, config.lora, folder, os.path.relpath(base, job.plan.root) if Path(base).is_dir() else base)
    else:
        lm.save_pretrained(folder)


def _publish(job: Job, best: Best, save: Callable[[Path], None], run_dir: Path, counts: dict[str, Any], model: PackedLM) -> None:
    """The stage's artifact: an adapter, or a whole model, with the tokenizer, the metrics and what serving verifies.

    An sft adapter is also put where servers find it, as a version of its recipe's name.
    """
    with job.writing() as draft:
        counts |= best.place(draft.path, save)
        folder, revision = job.plan.base_model(job.stage.name)
        tokenizer = load_tokenizer(folder, revision, job.plan.chat_template)
        save_tokenizer(tokenizer, draft.path)
        copy_config(folder, revision, draft.path)
        if job.stage.name == "sft" and job.recipe.train_stage("sft").lora:
            parity.record(job, model, tokenizer, draft.path)
        shutil.copyfile(run_dir / "metrics.jsonl", draft.path / "metrics.jsonl")
        draft.counts.update(counts, checkpoints=os.path.relpath(run_dir, job.plan.root))
        fence.check(run_dir)
    if (job.directory / parity.FILE).exists():
        AdapterStore(job.plan.served).publish(job.recipe.name, Artifact.open(job.directory))


def _seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
