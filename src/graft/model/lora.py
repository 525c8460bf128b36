"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = W x + (alpha / r) B A dropout(x), W frozen.

`LoraLinear` trains one adapter; `SlotLoraLinear` serves many at once, a row of the batch each. Adapters are saved as
ordinary PEFT safetensors: `PeftModel.from_pretrained` gives the same logits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graft.core.errors import ArtifactError, ConfigError, Unreadable
from graft.core.recipe import Lora

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOWER = "visual"  # the module of a Qwen2.5-VL that sees
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STAGED_BYTES, PART_BYTES, READERS = 256 << 20, 4 << 20, 8  # of an adapter on its way to a GPU
NOT_PLAIN = ("use_dora", "use_rslora", "modules_to_save", "alpha_pattern", "rank_pattern")  # each changes y = W x + (alpha / r) B A x


def new_pair(lora: Lora, ins: int, outs: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(A [r, ins], drawn as PEFT and the authors' code do, B [outs, r] of zeros)."""
    a = torch.empty(lora.r, ins, dtype=torch.float32, device=device)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a.to(dtype), torch.zeros(outs, lora.r, dtype=dtype, device=device)


class LoraLinear(nn.Module):
    """A frozen linear layer (plain or 4-bit) and one trainable adapter in `dtype`."""

    def __init__(self, base: Any, lora: Lora, dtype: torch.dtype):
        super().__init__()
        self.base, self.scale = base, lora.alpha / lora.r
        self.dropout = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
        pair = new_pair(lora, base.in_features, base.out_features, dtype, next(base.parameters()).device)
        self.A, self.B = map(nn.Parameter, pair)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(self.dropout(x), self.A) * self.scale, self.B)


class Rows:
    """Which slot each row of the current batch uses; one object shared by all layers of a model."""

    only: int | None = 0  # the slot of all rows, None where they differ
    slots: Tensor  # [batch] long
    used: Tensor  # [u] long: the slots that some row uses
    of: Tensor  # [u * m] long: the rows of each of these, at most m, filled up with any
    back: Tensor  # [batch] long: where in `of` each row stands

    def use(self, slots: list[int], device: torch.device | str) -> None:
        used = sorted(set(slots))
        self.only = used[0] if len(used) == 1 else None
        if self.only is None:
            rows = [[n for n, s in enumerate(slots) if s == slot] for slot in used]
            most = max(map(len, rows))
            places = {n: i * most + k for i, own in enumerate(rows) for k, n in enumerate(own)}
            filled = [n for own in rows for n in own + own[:1] * (most - len(own))]
            self.slots, self.used, self.of = (torch.tensor(v, device=device) for v in (slots, used, filled))
            self.back = torch.tensor([places[n] for n in range(len(slots))], device=device)


class SlotLoraLinear(nn.Module):
    """A frozen linear layer and `n` adapters of rank `r` at most, stacked in slots; slot 0 is the base itself (all zeros)."""

    A: Tensor  # [n + 1, r, in]
    B: Tensor  # [n + 1, r, out], scaled

    def __init__(self, base: Any, n: int, r: int, rows: Rows, dtype: torch.dtype):
        super().__init__()
        self.base, self.rows = base, rows
        device = next(base.parameters()).device
        self.register_buffer("A", torch.zeros(n + 1, r, base.in_features, dtype=dtype, device=device))
        self.register_buffer("B", torch.zeros(n + 1, r, base.out_features, dtype=dtype, device=device))

    def room(self, slot: int, r: int) -> tuple[Tensor, Tensor]:
        """Where an adapter of rank r goes, A [r, in] and B [r, out]: the slot's other rows, where it has more, are zero; where it has fewer, all slots grow."""
        if (more := r - self.A.shape[1]) > 0:
            self.A, self.B = F.pad(self.A, (0, 0, 0, more)), F.pad(self.B, (0, 0, 0, more))
        if r < self.A.shape[1]:
            self.clear(slot)
        return self.A[slot, :r], self.B[slot, :r]

    def clear(self, slot: int) -> None:
        self.A[slot], self.B[slot] = 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, in]; returns [batch, length, out]. The adapters' part is added to what the base gave, in place."""
        y, rows = self.base(x).contiguous(), self.rows
        if rows.only == 0:
            return y
        flat = y.view(-1, y.shape[-1])
        if rows.only is not None:
            flat.addmm_(F.linear(x.reshape(-1, x.shape[-1]), self.A[rows.only]), self.B[rows.only])
        elif x.shape[1] > 1:
            y.baddbmm_(torch.bmm(x, self.A[rows.slots].transpose(1, 2)), self.B[rows.slots])
        else:  # a token a row: by slot, so that an adapter is read once, however many rows use it
            grouped = x.reshape(-1, x.shape[-1])[rows.of].view(len(rows.used), -1, x.shape[-1])
            z = torch.bmm(torch.bmm(grouped, self.A[rows.used].transpose(1, 2)), self.B[rows.used])
            flat += z.view(-1, z.shape[-1])[rows.back]
        return y


def put(layers: dict[str, SlotLoraLinear], slot: int, pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> None:
    """An adapter, A [r, in] and B [out, r] of each of these layers on their device, into their slot, by few operations on all of them."""
    rooms = [layers[name].room(slot, a.shape[0]) for name, (a, _) in pairs.items()]
    bs = [b if b.dtype == into.dtype else b.float() for (_, b), (_, into) in zip(pairs.values(), rooms, strict=True)]
    torch._foreach_copy_([into for into, _ in rooms], [a for a, _ in pairs.values()])
    torch._foreach_copy_([into for _, into in rooms], [b.T for b in torch._foreach_mul(bs, scale)])


def targets(model: nn.Module, names: tuple[str, ...] | list[str], vision: bool = False) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(full name, parent module, attribute, linear) of every linear layer whose last name is in `names`; vision: and of all of a vision tower's."""
    found: set[str] = set()
    for name, module in list(model.named_modules()):
        sees = in_tower(name)
        for attribute, child in list(module.named_children()):
            if hasattr(child, "in_features") and (vision if sees else attribute in names):
                found.add(attribute)
                yield f"{name}.{attribute}" if name else attribute, module, attribute, child
    if missing := sorted(set(names) - found):
        raise ConfigError(f"lora.targets names {missing[0]!r}, which is no linear layer of this model")


def in_tower(name: str) -> bool:
    """Whether a module of that full name belongs to a vision tower."""
    return TOWER in name.split(".")


def inject(model: nn.Module, lora: Lora, dtype: torch.dtype, seed: int, vision: bool = False) -> None:
    """Freeze the model and replace its target layers by LoraLinear, the adapters drawn from `seed`; vision: a vision tower's layers too."""
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _, parent, attribute, linear in targets(model, lora.targets, vision):
            setattr(parent, attribute, LoraLinear(linear, lora, dtype))


def inject_slots(model: nn.Module, names: Iterable[str], n: int, r: int, dtype: torch.dtype, rows: Rows) -> dict[str, SlotLoraLinear]:
    """Replace the linear layers of these full names by SlotLoraLinear; returns them by name."""
    layers = {}
    for name in names:
        layers[name] = SlotLoraLinear(model.get_submodule(name), n, r, rows, dtype)
        model.set_submodule(name, layers[name])
    return layers


def adapters(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(full name, A [r, in], B [out, r]) of every layer that has an adapter."""
    for name, module in model.named_modules():
        if (pair := getattr(module, "pair", None)) and (found := pair()):
            yield name, *found


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, on the CPU."""
    found = {}
    for name, a, b in adapters(model):
        found[f"{PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        found[f"{PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    return found


def save_adapter(model: nn.Module, lora: Lora, folder: Path, base: str) -> int:
    """Write adapter_model.safetensors and adapter_config.json as PEFT does; returns the number of weights."""
    tensors = adapter_tensors(model)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    sees = any(map(in_tower, dict(model.named_modules())))  # then names of layers are not enough: a tower has some of them too
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(name for name, *_ in adapters(model)) if sees else sorted(lora.targets),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    return sum(t.numel() for t in tensors.values())


def read_adapter(folder: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """(config, {module name: (A [r, in], B [out, r])}) of a saved adapter; ArtifactError where it is none, Unreadable where it cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = read_tensors(folder / WEIGHTS, torch.device(device))
    except (OSError, ValueError, SafetensorError) as e:
        there = not isinstance(e, OSError) or (isinstance(e, FileNotFoundError) and folder.is_dir())  # else another look may find it
        raise (ArtifactError if there else Unreadable)(f"{folder} holds no readable adapter ({e}): expected {CONFIG} and {WEIGHTS}") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(key), int | float) and config[key] > 0 for key in ("r", "lora_alpha")):
        raise ArtifactError(f"{folder / CONFIG} is no adapter's: it gives no r and lora_alpha above 0")
    if config.get("peft_type") != "LORA" or any(config.get(k) for k in NOT_PLAIN) or config.get("bias", "none") != "none":
        raise ArtifactError(f"{folder} is no plain LoRA adapter: {CONFIG} may set none of {', '.join(NOT_PLAIN)} and no bias")
    names = sorted({k.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for k in tensors})
    try:
        pairs = {n: (tensors.pop(f"{PREFIX}{n}.lora_A.weight"), tensors.pop(f"{PREFIX}{n}.lora_B.weight")) for n in names}
    except KeyError as e:
        raise ArtifactError(f"{folder / WEIGHTS} lacks the tensor {e}") from None
    if tensors:
        raise ArtifactError(f"{folder / WEIGHTS} has a tensor of an unknown name: {sorted(tensors)[0]}")
    return config, pairs


def read_tensors(file: Path, device: torch.device) -> dict[str, Tensor]:
    """A safetensors file (https://github.com/huggingface/safetensors#format), checked by its library; on the device "meta" its names, dtypes and shapes
    alone. To a GPU its bytes go at once: an adapter's hundreds of small copies take several times as long. SafetensorError, FileNotFoundError."""
    if device.type == "cpu":
        return load_file(file)
    with safe_open(file, framework="pt") as checked:
        names = list(checked.keys())
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    if other := next((name for name in names if header[name]["dtype"] not in STORED), None):
        raise ArtifactError(f"{file}: {other} is of dtype {header[other]['dtype']}, adapters are of {', '.join(STORED)}")
    if device.type == "meta":
        return {name: torch.empty(header[name]["shape"], dtype=STORED[header[name]["dtype"]], device=device) for name in names}
    there, found = _bytes_on(device, file, 8 + size), {}
    for name in names:
        begin, end = header[name]["data_offsets"]
        found[name] = there[begin:end].view(STORED[header[name]["dtype"]]).view(header[name]["shape"])
    return found


def _bytes_on(device: torch.device, file: Path, first: int) -> Tensor:
    """[bytes] uint8: a file's from `first` on, read by several threads into pinned memory, which torch keeps for the next adapter, and sent from there."""
    there = torch.empty(file.stat().st_size - first, dtype=torch.uint8, device=device)
    staged = torch.empty(min(len(there), STAGED_BYTES), dtype=torch.uint8, pin_memory=device.type == "cuda")
    held = staged.numpy().data
    with file.open("rb", buffering=0) as f, ThreadPoolExecutor(READERS) as readers:
        for at in range(0, len(there), len(staged)):
            size = min(len(staged), len(there) - at)

            def send(start: int, at: int = at, size: int = size) -> None:
                end = min(start + PART_BYTES, size)
                got = start
                while got < end:
                    if not (more := os.preadv(f.fileno(), [held[got:end]], first + at + got)):
                        raise ArtifactError(f"{file} became shorter while it was read")
                    got += more
                there[at + start : at + end].copy_(staged[start:end], non_blocking=True)

            list(readers.map(send, range(0, size, PART_BYTES)))
            if device.type == "cuda" and at + size < len(there):
                torch.cuda.current_stream(device).synchronize()  # before what was sent is written over
    return there


def merge_into(weight_of: Callable[[str], Tensor], config: dict[str, Any], pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """merged() of every adapted module, in W's dtype."""
    scale = config["lora_alpha"] / config["r"]
    return {name: merged(w := weight_of(name), a, b, scale, w.dtype) for name, (a, b) in pairs.items()}


def merged(w: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W + (alpha / r) B A of W [out, in], A [r, in], B [out, r], computed in fp32 on W's device and rounded once, to `dtype`."""
    product = torch.mm(b.to(w.device, torch.float32), a.to(w.device, torch.float32)).mul_(scale)
    return product.add_(w).to(dtype)
