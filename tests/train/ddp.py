"""The sft stage trained by torch's DistributedDataParallel alone and document by document: what graft's training is held against.

    torchrun --nproc_per_node 2 ddp.py OUT RECIPE WORKSPACE [KEY=VALUE …]

Nothing is packed, masked, shared out by cost or partitioned; only the weights, the bins and the learning rate are graft's.
Rank 0 writes [[loss, gradient norm], …] of the steps.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from graft.core.shards import ShardSet
from graft.core.stages import Plan
from graft.train.build import build
from graft.train.order import BinOrder, learning_rate
from graft.train.split import total_steps


class ByDocument(nn.Module):
    """The summed loss of a bin, its documents one after another."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids, mask, lens):
        loss, start = torch.zeros(()), 0
        for end in torch.as_tensor(lens).cumsum(0).tolist():
            supervised = mask[start + 1 : end].bool()
            logits = self.lm(ids[None, start:end]).logits[0, :-1]
            loss = loss + F.cross_entropy(logits[supervised], ids[start + 1 : end][supervised], reduction="sum")
            start = end
        return loss


def main(out, recipe, workspace, *overrides):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    plan = Plan(recipe, overrides, workspace)
    config, seed = plan.recipe.train_stage("sft"), plan.recipe.seed
    shards = ShardSet.open(plan.artifact("shard-sft").path / "train")
    packed = build(*plan.base_model("sft"), plan.recipe.model.precision, config, seed, torch.device("cpu"))
    model = DistributedDataParallel(ByDocument(packed.lm))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=config.weight_decay, betas=(0.9, 0.95))
    order, found = BinOrder(len(shards), seed), []
    total = total_steps(len(shards), config.epochs, config.global_batch, config.max_steps)
    for step in range(total):
        bins = [shards.bin(i) for i in order.take(step * config.global_batch, config.global_batch)]
        targets = sum(b.targets for b in bins)
        mine, loss = bins[rank::world], torch.zeros(())
        for n, b in enumerate(mine):
            with model.no_sync() if n < len(mine) - 1 else nullcontext():
                own = model(torch.tensor(b.input_ids, dtype=torch.long), torch.tensor(b.loss_mask), b.doc_lens)
                (own * world / targets).backward()
            loss += own.detach()
        dist.all_reduce(loss)
        norm = nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, config.lr, config.warmup, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item() / targets, norm.item()))
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
