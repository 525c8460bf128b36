"""A two-layer Llama with random weights, a byte-level BPE tokenizer and two random adapters: 0.5 s, no network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graft.core.recipe import EmbeddedBase, Lora, Train
from graft.model.base import load_base, random_llama
from graft.model.chat import TEMPLATES, load_tokenizer, render
from graft.model.lora import LoraLinear, inject, read_adapter, save_adapter
from graft.model.packed import PackedLM
from graft.train.batches import collate
from graft.train.parity import effects, packed, parity

TEXT = ["Draw me a shiba walking by the sea.", "What is the weather like today?", "幫我畫一隻柴犬", "今天天氣如何"] * 8
LORAS = {
    "one": Lora(r=4, alpha=8, targets=("q_proj", "v_proj")),
    "two": Lora(r=8, alpha=8, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
}
MAX_LENGTH = 256


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        TEXT[:2], trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", additional_special_tokens=special[:1], chat_template=TEMPLATES["chatml"]
    )


SHAPE = {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 4, "kv_heads": 2}


def build(folder: Path, **other: int) -> tuple[Path, dict[str, Path]]:
    """Save the base (with its tokenizer; other: than SHAPE's numbers) and the adapters; returns (base folder, {name: adapter folder})."""
    tokenizer = tiny_tokenizer()
    shape = EmbeddedBase(**{**SHAPE, **other}, train=Train(lora=None))
    model = random_llama(shape, len(tokenizer), MAX_LENGTH, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4.0)  # larger than a fresh model's, so that the context decides what comes next
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 2  # so that some answers end before their length
    base = folder / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    return base, {name: random_adapter(base, lora, folder / name, seed) for seed, (name, lora) in enumerate(LORAS.items())}


def random_adapter(base: Path, lora: Lora, folder: Path, seed: int) -> Path:
    model = load_base(str(base), None, "fp32", "cpu")
    inject(model, lora, torch.float32, seed)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.B, std=0.2)
    folder.mkdir()
    save_adapter(model, lora, folder, str(base))
    tiny_tokenizer().save_pretrained(folder)
    return folder


PROBES = [
    [{"role": "user", "content": "Draw"}, {"role": "assistant", "content": "a shiba by the sea"}],
    [{"role": "user", "content": "今天天氣如何"}, {"role": "assistant", "content": "今天 good"}],
]


def recorded(base: Path, folder: Path, identity: str, precision: str = "fp32") -> None:
    """Write beside an adapter what training records of it."""
    tokenizer = load_tokenizer(str(folder))
    done = [render(tokenizer, messages) for messages in PROBES]
    probes = [{"messages": m, "ids": r.ids, "loss_mask": r.loss_mask} for m, r in zip(PROBES, done, strict=True)]
    (folder / "probes.json").write_text(json.dumps(probes, ensure_ascii=False))
    config, _ = read_adapter(folder)
    model = load_base(str(base), None, precision, "cpu")
    inject(model, Lora(r=config["r"], alpha=config["lora_alpha"], targets=tuple(config["target_modules"])), torch.float32, 0)
    canaries = packed([(r.ids, r.loss_mask) for r in done], MAX_LENGTH)
    (folder / "parity.json").write_text(
        json.dumps(parity(tokenizer, identity, precision, effects(PackedLM(model), [(canaries, collate([canaries]))], folder)))
    )
