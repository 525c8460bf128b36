"""What benchmarks/checkpoint.py compares with: one rank of a peer that trains the same shape and saves through its own public entry.

    accelerate launch --use_deepspeed checkpoint_peers.py --peer save_state --base DIR --deepspeed FILE.json --log LOG.jsonl …

save_state and save_state-trained are a plain Accelerate loop, the second saves with exclude_frozen_parameters; trainer is
transformers' Trainer with save_strategy = "steps". All under DeepSpeed ZeRO-2. Rank 0 logs when each step ended, the GPU
synchronised, and when each save began and ended. None of them asks the kernel for the disk (fsync).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from train_gpu_peers import loaded

PEERS = ("save_state", "save_state-trained", "trainer")


class Log:
    """Lines of one rank's run, flushed: the benchmark reads them while it lasts."""

    def __init__(self, path: Path, rank: int):
        self.file = path.open("a", encoding="utf-8") if rank == 0 else None
        self.began_unix_s = 0.0

    def _write(self, **line: Any) -> None:
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def step(self) -> None:
        """A step has ended, and a save may begin."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.began_unix_s = time.time()
        self._write(ended_unix_s=self.began_unix_s)

    def saved(self, step: int, folder: Path) -> None:
        """step: how many were done."""
        self._write(saved=step, folder=str(folder), began_unix_s=self.began_unix_s, whole_unix_s=time.time())


def dataset(args: argparse.Namespace, processes: int) -> list[dict[str, Any]]:
    import torch

    vocabulary = json.loads((args.base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, (args.bins * processes * args.steps, args.seq_len), dtype=np.int64)
    return [{"input_ids": row, "labels": row} for row in torch.from_numpy(ids)]


def of_model(args: argparse.Namespace) -> Any:
    model = loaded(args)
    if args.full:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def with_accelerate(args: argparse.Namespace) -> None:
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    strategy = json.loads(args.deepspeed.read_text(encoding="utf-8"))
    strategy |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": args.bins, "gradient_clipping": 1.0}
    strategy |= {"train_batch_size": args.bins * int(os.environ["WORLD_SIZE"]), "bf16": {"enabled": True}}
    on_gpu = torch.cuda.is_available()
    handlers = [] if on_gpu else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(kwargs_handlers=handlers, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=strategy), mixed_precision="bf16")
    model = of_model(args)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=on_gpu)
    loader = torch.utils.data.DataLoader(dataset(args, accelerator.num_processes), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    log = Log(args.log, accelerator.process_index)
    options = {"exclude_frozen_parameters": True} if args.peer == "save_state-trained" else {}
    step = 0
    for n, batch in enumerate(loader, 1):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if n % args.bins:
            continue
        step += 1
        log.step()
        if step % args.every == 0 and step < args.steps:
            folder = args.log.parent / f"checkpoint-{step}"
            accelerator.save_state(str(folder), **options)
            accelerator.wait_for_everyone()
            log.saved(step, folder)
    accelerator.end_training()


def with_trainer(args: argparse.Namespace) -> None:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    class Clock(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> Any:
            log.step()
            control.should_save = control.should_save and state.global_step < args.steps  # the Trainer saves at the end too
            return control

        def on_save(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            log.saved(state.global_step, args.log.parent / f"checkpoint-{state.global_step}")

    on_gpu = torch.cuda.is_available()
    config = TrainingArguments(
        output_dir=str(args.log.parent),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=args.bins,
        max_steps=args.steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=True,
        use_cpu=not on_gpu,
        ddp_backend=None if on_gpu else "gloo",
        logging_steps=args.steps,
        save_strategy="steps",
        save_steps=args.every,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        deepspeed=str(args.deepspeed),
    )
    log = Log(args.log, config.process_index)
    model, rows = of_model(args), dataset(args, config.world_size)
    trainer = Trainer(model=model, args=config, train_dataset=rows, data_collator=default_data_collator, callbacks=[Clock()])
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "nf4"])
    parser.add_argument("--full", action="store_true", help="train all weights, no LoRA; with activation checkpointing")
    parser.add_argument("--attention", default="sdpa", help="as transformers names it")
    parser.add_argument("--bins", type=int, required=True, help="rows of a step and process, one a forward")
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True, help="steps between saves")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--deepspeed", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True, help="checkpoints are written beside it")
    args = parser.parse_args()
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    compatible_ops["deepspeed_shm_comm"] = False  # as in graft's trainer: an all-reduce for inference that would be compiled for 40 s
    (with_trainer if args.peer == "trainer" else with_accelerate)(args)


if __name__ == "__main__":
    main()
