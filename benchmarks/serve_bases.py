"""What benchmarks/serve.py serves: a random base of a real shape that speaks text, random adapters of it, and a store of them.

A random base prefers any of its tokens, most of which a small tokenizer does not have. Here only tokens that are plain text on their own have
a row in the output layer, all others' are zero: each greedy token is text, and no answer ends by itself.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RANK, ALPHA = 16, 32
SPREAD = 0.05  # standard deviation of B's numbers: large enough for the gate to see an effect
IDENTITY = "hub:random/base@0"
CANARIES, CANARY_TOKENS = 8, 48
CPU = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
TINY = {"vocab_size": 3000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Served:
    """base: a model folder with its tokenizer; adapters: {name: folder}; store: root of an AdapterStore of the same."""

    base: Path
    adapters: dict[str, Path]
    store: Path
    words: list[int]  # tokens that are text on their own

    def tokenizer(self) -> Any:
        from graft.model.chat import load_tokenizer

        return load_tokenizer(str(self.base))

    def prompts(self, tokens: list[int], rng: np.random.Generator) -> list[list[int]]:
        """Ids of random words, of these lengths."""
        return [rng.choice(self.words, n).tolist() for n in tokens]


def made(args: argparse.Namespace) -> Served:
    """Written where they are not there yet: 10 s for the CPU's shape, some two minutes for 8B."""
    from graft.data.like import write_like
    from graft.model.chat import load_tokenizer
    from graft.model.shapes import SHAPES

    SHAPES.update({"cpu-124m": {**CPU, "bos_token_id": None}, "tiny": {**TINY, "bos_token_id": None}})
    home = args.folder / "bases" / (f"{args.like}-{args.layers}-layers" if args.layers else args.like)
    base, mark = home / "base", home / "words.json"
    if not mark.exists():
        write_like(args.like, base, args.layers)
        words = spoken(load_tokenizer(str(base)))
        silence(base, words)
        mark.write_text(json.dumps(words), encoding="utf-8")
    words = json.loads(mark.read_text(encoding="utf-8"))
    adapters = {f"a{n}": home / args.precision / f"a{n}" for n in range(args.adapters)}
    for seed, folder in enumerate(adapters.values()):
        if not (folder / "adapter_config.json").exists():
            write_adapter(base, folder, seed, args.precision)
    return Served(base, adapters, home / args.precision / f"store-{args.adapters}", words)


def spoken(tokenizer: Any) -> list[int]:
    special = set(tokenizer.all_special_ids)
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in special}
    return [i for i, text in texts.items() if text.strip() and text.isascii() and text.isprintable()]


def silence(base: Path, words: list[int]) -> None:
    """Zero the output layer's rows of all other tokens, in its file."""
    import torch
    from safetensors.torch import load_file, save_file

    where = json.loads((base / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    name = "lm_head.weight" if "lm_head.weight" in where else "model.embed_tokens.weight"
    tensors = load_file(base / where[name])
    kept = torch.tensor(words)
    rows = tensors[name]
    tensors[name] = torch.zeros_like(rows).index_copy_(0, kept, rows[kept])
    save_file(tensors, base / where[name], metadata={"format": "pt"})


def write_adapter(base: Path, folder: Path, seed: int, precision: str) -> None:
    """As training saves it, all seven projections, in the dtype that it would have trained in."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from graft.core.recipe import Lora
    from graft.model.base import DTYPES
    from graft.model.lora import CONFIG, PREFIX, WEIGHTS, targets

    names = Lora().targets
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, Any] = {}
    for name, _, _, linear in targets(model, names):
        ins, outs = linear.in_features, linear.out_features
        a = (torch.rand(RANK, ins, generator=draw) * 2 - 1) / math.sqrt(ins)  # PEFT's bounds
        b = torch.randn(outs, RANK, generator=draw) * SPREAD
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a.to(DTYPES[precision]), f"{PREFIX}{name}.lora_B.weight": b.to(DTYPES[precision])}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    told |= {"target_modules": sorted(names), "bias": "none", "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(told), encoding="utf-8")  # last: it marks the folder as whole


def publish(served: Served, precision: str) -> None:
    """The adapters into the store, with what training would have recorded of them: probes, and parity with an engine's own figures."""
    from graft.core.store import AdapterStore
    from graft.engine.hf import HFEngine
    from graft.model.chat import render, save_tokenizer
    from graft.train.parity import FILE, PROBES, parity

    store = AdapterStore(served.store)
    if store.root.exists() and set(served.adapters) <= set(store.names()):
        return
    tokenizer = served.tokenizer()
    engine = HFEngine(str(served.base), None, precision, {}, tokenizer, max_adapters=1)
    rng = np.random.default_rng(1)
    probes = []
    for _ in range(CANARIES):
        question, reply = (text_of(served, tokenizer, CANARY_TOKENS, rng) for _ in range(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        done = render(tokenizer, messages)
        probes.append({"messages": messages, "ids": done.ids, "loss_mask": done.loss_mask})
    for name, folder in served.adapters.items():
        engine.load(name, folder)
        canaries = []
        for probe in probes:
            at = [i for i, supervised in enumerate(probe["loss_mask"]) if supervised]
            said = {of: engine.score(probe["ids"], at[0], name if of == "adapter" else None) for of in ("base", "adapter")}
            canaries.append({"ids": probe["ids"], "at": at, **{of: [own[i - at[0]] for i in at] for of, own in said.items()}})
        save_tokenizer(tokenizer, folder)
        (folder / PROBES).write_text(json.dumps(probes), encoding="utf-8")
        (folder / FILE).write_text(json.dumps(parity(tokenizer, IDENTITY, precision, canaries)), encoding="utf-8")
        store.add(name, folder, {})


def text_of(served: Served, tokenizer: Any, tokens: int, rng: np.random.Generator) -> str:
    """Text of about so many tokens."""
    found: str = tokenizer.decode(rng.choice(served.words, tokens).tolist())
    return found.strip()


def lengths(bounds: list[int], n: int, rng: np.random.Generator) -> list[int]:
    return rng.integers(bounds[0], bounds[-1] + 1, n).tolist()
