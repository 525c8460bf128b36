"""The processes of a run: their group, and Accelerate over DeepSpeed with the recipe's strategy file."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed import distributed_c10d

from graft.core.errors import ConfigError, TrainError
from graft.core.recipe import Train
from graft.core.stages import Job
from graft.train.nodes.watch import SLOW, Watch
from graft.train.split import deepspeed_split, micro_batch_of
from graft.train.strategy import strategy_of

MARGIN_S = 600


def accelerator_of(job: Job, config: Train) -> Accelerator:
    """Accelerate over DeepSpeed with the recipe's strategy file; every number the recipe knows was "auto" there."""
    if config.deterministic:
        _be_deterministic()
    from deepspeed.ops import __compatible_ops__ as compatible_ops  # prints as it is imported

    strategy = strategy_of(job.plan)
    if (zero := strategy.get("zero_optimization", {}).get("stage")) not in (1, 2):
        raise ConfigError(f"deepspeed = {job.recipe.deepspeed!r} has zero_optimization.stage = {zero}: graft trains with 1 or 2")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    full_fp32 = job.recipe.model.precision == "fp32"
    # the memory plan, which the ranks have yet to agree on, sets the real split
    strategy |= deepspeed_split(config.global_batch, world, micro_batch_of(config.global_batch, world, 1))
    # what is not finite is guard.py's to find, by the norm: DeepSpeed would look into each gradient and leave the step out in silence
    strategy |= {"gradient_clipping": config.max_grad_norm, "bf16": {"enabled": not full_fp32, "check_grad_overflow": False}}
    _import_muon()
    compatible_ops["deepspeed_shm_comm"] = False  # an all-reduce for inference: each new installation would compile it for 40 s
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{_patience(config).total_seconds():.0f}")  # read as the group is made
    handlers = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(
        kwargs_handlers=handlers, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=strategy), mixed_precision="no" if full_fp32 else "bf16"
    )
    if accelerator.num_processes != dist.get_world_size():
        raise TrainError(
            f"Accelerate sees {accelerator.num_processes} processes, the process group {dist.get_world_size()}: start by launch/train.sh"
        )
    return accelerator


def _import_muon() -> None:
    """DeepSpeed asks of every optimizer whether it is its Muon, whose parts are compiled as they are imported: 1.2 s a rank to load Inductor, for nothing."""
    from deepspeed.runtime import compiler

    usual = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with suppress(ImportError):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = usual


def _be_deterministic() -> None:
    """The same bits in every run on the same GPUs; attention.py has its kernels follow. Before the first matmul, which reads the variable."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _patience(config: Train) -> timedelta:
    """Of a collective: longer than the watch's, which names who is late, where NCCL and gloo end a process with the name of a collective."""
    return timedelta(seconds=SLOW * config.hang_timeout_s + MARGIN_S)


def watch_of(job: Job, config: Train) -> Watch:
    """The watch over the ranks of the process group, which talks through a connection of its own to the group's store."""
    distributed_c10d._set_pg_timeout(_patience(config))
    # the groups that DeepSpeed has yet to make take no other
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = _patience(config)
    store = dist.PrefixStore("graft/watch", distributed_c10d._get_default_store()).clone()  # type: ignore[attr-defined]

    def collectives() -> int:
        begun = 0
        for group in list(distributed_c10d._world.pg_map):
            with suppress(RuntimeError):  # a backend that does not count
                begun += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        return begun

    return Watch(store, dist.get_rank(), dist.get_world_size(), job.stage.name, job.run_directory, config.hang_timeout_s, collectives)


def local_leader() -> bool:
    """One process a node reads all shards, to verify their hashes and that they fit the base."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
