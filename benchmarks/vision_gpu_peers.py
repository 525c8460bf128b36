"""What benchmarks/vision_gpu.py compares with: TRL's SFTTrainer, or transformers' Trainer, with PEFT, trains the same rows and writes the figures of each step.

    python vision_gpu_peers.py --peer trl --precision bf16 --base DIR --shards DIR --steps 20 --batch 16 --micro 1 … --out FILE.json

Tokens, targets and their order are those of graft's shards; images are read, decoded and resized by the peer's own image processor in the workers of its
data loader, pinned and ahead. It trains in bf16 (nf4: bitsandbytes' layers under it) with adapters in bf16, the loss on the answers' tokens. The GPU is
synchronised after each step, as graft's loop does.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from train_gpu import installed

from graft.core.recipe import Lora
from graft.core.shards import ShardSet
from graft.train.order import BinOrder

WORKERS = 12


class Rows:
    """Makes a micro-batch of rows {"input_ids", "labels", "files"}; in a data loader's worker."""

    def __init__(self, base: Path, images: Path, pixels: int, image_token: int, pad: int):
        self.processor, self.images, self.image_token, self.pad = processor_of(base), images, image_token, pad
        self.size = {"longest_edge": min(self.processor.size["longest_edge"], pixels), "shortest_edge": self.processor.size["shortest_edge"]}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        from PIL import Image

        longest = max(len(row["input_ids"]) for row in rows)

        def filled(name: str, value: int) -> Any:
            return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])

        ids = filled("input_ids", self.pad)
        used = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
        shown = [Image.open(self.images / file).convert("RGB") for row in rows for file in row["files"]]
        seen = dict(self.processor(images=shown, size=self.size, return_tensors="pt")) if shown else {}
        given = {"input_ids": ids, "attention_mask": used, "labels": filled("labels", -100), "mm_token_type_ids": (ids == self.image_token).int()}
        return given | seen


def processor_of(base: Path) -> Any:
    """The faster one, on torchvision, where that is installed."""
    try:
        from transformers import Qwen2VLImageProcessor

        return Qwen2VLImageProcessor.from_pretrained(base)
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil.from_pretrained(base)


def rows_of(shards: Path, batch: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """The rows of all steps in graft's order."""
    found, opened = [], ShardSet.open(shards / "train", verify=False)
    for i in BinOrder(len(opened), seed).take(0, batch * steps):
        b = opened.bin(int(i))
        used = int(b.doc_lens.sum())
        labels = [int(token) if supervised else -100 for token, supervised in zip(b.input_ids[:used], b.loss_mask[:used], strict=True)]
        found.append({"input_ids": b.input_ids[:used].tolist(), "labels": labels, "files": [image.file for image in b.images]})
    return found


def loaded(args: argparse.Namespace) -> Any:
    """The base under PEFT's adapters, on the language part alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": args.attention}
    if args.precision == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", r"(.*\.)?visual"],
        )
    if torch.cuda.is_available():
        options["device_map"] = {"": 0}
    model = AutoModelForImageTextToText.from_pretrained(args.base, **options)
    model.config.use_cache = False
    names = "|".join(Lora().targets)
    lora = LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=args.alpha, lora_dropout=0.0, target_modules=rf".*language_model\..*\.({names})")
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def trainer_of(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Any:
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    on_gpu = torch.cuda.is_available()
    tokenizer, model = AutoTokenizer.from_pretrained(args.base), loaded(args)
    common = {
        "output_dir": str(args.out.parent / "trainer"),
        "per_device_train_batch_size": args.micro,
        "gradient_accumulation_steps": args.batch // args.micro,
        "max_steps": args.steps,
        "learning_rate": args.lr,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
        "bf16": True,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": args.checkpointing == "full",
        "dataloader_num_workers": WORKERS if on_gpu else 0,
        "dataloader_prefetch_factor": 4 if on_gpu else None,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    given = {
        "model": model,
        "data_collator": Rows(args.base, args.shards / "images", args.pixels, model.config.image_token_id, tokenizer.pad_token_id),
    }
    if args.peer == "transformers":
        if args.checkpointing == "full":
            model.enable_input_require_grads()
        return Trainer(args=TrainingArguments(**common), train_dataset=rows, **given)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, use_liger_kernel=args.peer == "trl-liger")
    return SFTTrainer(args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **given)


def measured(trainer: Any, rows: list[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """Train; what each step took, and what it waited for its rows."""
    from transformers import TrainerCallback

    on_gpu = torch.cuda.is_available()
    ends_s, peaks_gib, waited_s, losses = [], [], [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends_s.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
                peaks_gib.append(torch.cuda.max_memory_allocated() / 2**30)
            ends_s.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.append(logs.get("loss"))

    fetch = trainer.get_batch_samples

    def timed(*given: Any) -> Any:
        began_s = time.perf_counter()
        found = fetch(*given)
        waited_s.append(time.perf_counter() - began_s)
        return found

    trainer.get_batch_samples = timed
    trainer.add_callback(Clock())
    trainer.train()
    steps = []
    for n, (before, after) in enumerate(pairwise(ends_s)):
        own = rows[n * batch : (n + 1) * batch]
        counts = {"tokens": sum(len(row["input_ids"]) for row in own), "images": sum(len(row["files"]) for row in own)}
        peak = peaks_gib[n] if on_gpu else None
        steps.append({**counts, "step_time_s": after - before, "data_s": waited_s[n], "peak_mem_gib": peak, "loss": losses[n]})
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=["trl", "trl-liger", "transformers"])
    parser.add_argument("--attention", default="sdpa", help="as transformers names it, of the language part and of the tower")
    parser.add_argument("--checkpointing", default="none", choices=["none", "full"])
    parser.add_argument("--precision", required=True, choices=["bf16", "nf4"])
    for name in ("base", "shards", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("steps", "batch", "micro", "rank", "pixels", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("alpha", "lr"):
        parser.add_argument(f"--{name}", type=float, required=True)
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    rows = rows_of(args.shards, args.batch, args.steps, args.seed)
    trainer = trainer_of(args, rows)
    args.out.write_text(json.dumps({"steps": measured(trainer, rows, args.batch), "versions": installed()}), encoding="utf-8")


if __name__ == "__main__":
    main()
