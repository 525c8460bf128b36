"""What benchmarks/train_gpu.py compares with: one peer trains the same shape through its own public entry and writes its figures.

    python train_gpu_peers.py --peer unsloth --precision bf16 --workload whole --base DIR --steps 15 --out FILE.json

Rows are token ids already, full, every token a target; nothing is fetched. Figures are per step, the GPU synchronised
after each as graft's loop does. Where processes are several (torchrun), `--deepspeed` shards as graft's strategy does.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from train_gpu import BINS, SEQ_LEN, SETTLE, installed, lengths_of

SHORT = 1024  # tokens of a peer's row on the short workload
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def dataset(workload: str, packed: bool, vocabulary: int, bins: int) -> Any:
    """Random rows of `bins` bins: input_ids and labels, and seq_lengths where each row holds several documents."""
    from datasets import Dataset

    ids = np.random.default_rng(0).integers(0, vocabulary, (bins, SEQ_LEN), dtype=np.int64)
    columns: dict[str, Any] = {"seq_lengths": lengths_of(workload, bins, np.random.default_rng(0))} if packed else {}
    if workload == "short" and not packed:
        ids = ids.reshape(-1, SHORT)
    rows = list(ids)
    return Dataset.from_dict({"input_ids": rows, "labels": rows, **columns}).with_format("numpy")  # lists cost 15 ms a step


def training(args: argparse.Namespace, seq_len: int, on_gpu: bool) -> dict[str, Any]:
    """What every peer's TrainingArguments say."""
    rows = args.micro * SEQ_LEN // seq_len  # a forward
    return {
        "output_dir": str(args.out.parent / "trainer"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": BINS // args.micro,  # Unsloth's own default is 2
        "max_steps": args.steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "bf16": True,
        "use_cpu": not on_gpu,
        "logging_steps": args.steps,
        "logging_nan_inf_filter": False,  # it waits for the GPU in every step
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "deepspeed": args.deepspeed,
    }


def packing(args: argparse.Namespace, seq_len: int) -> dict[str, Any]:
    """What TRL's SFTConfig says besides."""
    return {"max_length": seq_len, "packing": args.packed, "dataset_kwargs": {"skip_prepare_dataset": True}}


def with_unsloth(args: argparse.Namespace, rows: Any, seq_len: int) -> Any:
    import torch
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    kept = "unsloth" if args.checkpointing == "full" else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(args.base),
        max_seq_length=seq_len,
        dtype=torch.bfloat16,
        load_in_4bit=args.precision == "nf4",
        full_finetuning=args.full,
        use_gradient_checkpointing=kept,
    )
    if not args.full:
        model = FastLanguageModel.get_peft_model(model, bias="none", use_gradient_checkpointing=kept, random_state=0, **LORA)
    config = SFTConfig(**training(args, seq_len, torch.cuda.is_available()), **packing(args, seq_len), gradient_checkpointing=bool(kept))
    return SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)


def loaded(args: argparse.Namespace) -> Any:
    """The base as transformers and PEFT hold it, adapters in bf16 (PEFT's default, fp32, is slower)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": args.attention}
    if args.precision == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    if torch.cuda.is_available():
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    model = AutoModelForCausalLM.from_pretrained(args.base, **options)
    model.config.use_cache = False
    if args.full:
        return model
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA), autocast_adapter_dtype=False)


def with_trl(args: argparse.Namespace, rows: Any, seq_len: int) -> Any:
    import torch
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        **training(args, seq_len, torch.cuda.is_available()),
        **packing(args, seq_len),
        gradient_checkpointing=args.checkpointing == "full",
        use_liger_kernel=args.peer == "trl-liger",
    )
    return SFTTrainer(model=loaded(args), args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(args.base))


def with_transformers(args: argparse.Namespace, rows: Any, seq_len: int) -> Any:
    import torch
    from transformers import Trainer, TrainingArguments, default_data_collator

    common = training(args, seq_len, torch.cuda.is_available())
    config = TrainingArguments(**common, gradient_checkpointing=args.checkpointing == "full", remove_unused_columns=False)
    model = loaded(args)
    if args.checkpointing == "full" and not args.full:
        model.enable_input_require_grads()
    return Trainer(model=model, args=config, train_dataset=rows, data_collator=default_data_collator)


PEERS = {"unsloth": with_unsloth, "trl-liger": with_trl, "trl": with_trl, "transformers": with_transformers}


def measured(trainer: Any) -> dict[str, Any]:
    """Train; seconds of each step and the largest memory, GiB."""
    import torch
    from transformers import TrainerCallback

    on_gpu = torch.cuda.is_available()
    ends: list[Any] = []

    def mark() -> None:
        """On a GPU in its own time, for to wait for it would hold the peer up."""
        if on_gpu:
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
        else:
            ends.append(time.perf_counter())

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            mark()

    trainer.add_callback(Clock())
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    mark()
    loss = trainer.train().training_loss
    if on_gpu:
        torch.cuda.synchronize()
    steps_s = [before.elapsed_time(after) / 1e3 if on_gpu else after - before for before, after in pairwise(ends)]
    return {
        "step_time_s": median(steps_s[SETTLE:]),
        "first_step_s": steps_s[0],
        "steps_s": sum(steps_s),
        "peak_mem_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0,
        "loss": loss,  # the mean over all steps
    }


def main() -> None:
    began_s = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "nf4"])
    parser.add_argument("--workload", default="whole", choices=["whole", "short"])
    parser.add_argument("--checkpointing", default="none", choices=["none", "full"], help="full: Unsloth's own where the peer is Unsloth")
    parser.add_argument("--full", action="store_true", help="train all weights, no LoRA")
    parser.add_argument("--packed", action="store_true", help="short: packed documents of graft's lengths instead of rows of 1,024; TRL and Unsloth")
    parser.add_argument("--attention", default="sdpa", help="as transformers names it; Unsloth takes its own")
    parser.add_argument("--micro", type=int, default=BINS, help="bins a forward")
    parser.add_argument("--deepspeed", help="a strategy file, for several processes")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.steps <= SETTLE or BINS % args.micro:
        parser.error(f"--steps is more than {SETTLE}, and --micro divides {BINS}")
    if args.packed and (args.peer == "transformers" or args.workload != "short"):
        parser.error("--packed is for --workload short of TRL and Unsloth")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1"}
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(args.out.parent / "unsloth_compiled"))
    if args.peer == "unsloth":
        import unsloth  # noqa: F401 - it patches trl, transformers and peft, so it goes before them
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    vocabulary = json.loads((args.base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    rows = dataset(args.workload, args.packed, vocabulary, BINS * processes * args.steps)
    seq_len = rows[0]["input_ids"].size
    trainer = PEERS[args.peer](args, rows, seq_len)
    load_s = time.perf_counter() - began_s
    found = measured(trainer)
    found |= {"tokens_per_s": BINS * SEQ_LEN * processes / found["step_time_s"], "load_s": load_s, "versions": installed()}
    if trainer.is_world_process_zero():
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
