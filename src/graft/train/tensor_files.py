"""A model's safetensors files read and written one tensor at a time: host memory holds a tensor, whatever the model's size.

A file is mapped anew for each tensor, so that what was read stays no part of this process; a shard is written as its tensors
come, its header first, since names, shapes and dtypes are known before. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graft.core.errors import ConfigError
from graft.core.hub import weight_files

SHARD_BYTES = 2 * 10**9
INDEX = "model.safetensors.index.json"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class TensorFiles:
    """The tensors of a model folder, by name."""

    def __init__(self, folder: Path):
        """Read every header; ConfigError where a file is missing, no safetensors file, or lacks what the index names."""
        self.folder = folder
        self.specs: dict[str, Spec] = {}
        self._files: dict[str, str] = {}
        try:
            names = weight_files(folder)
        except (KeyError, AttributeError, json.JSONDecodeError) as e:
            raise ConfigError(f"{folder / INDEX} cannot be read ({e}): it needs a weight_map, of a file for each tensor") from None
        for name in names:
            self._read_header(name)
        if (folder / INDEX).exists():
            named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            for tensor, file in named.items():
                if self._files.get(tensor) != file:
                    raise ConfigError(f"{folder / file} lacks the tensor {tensor}, which {INDEX} says is there: fetch the model again")

    def _read_header(self, name: str) -> None:
        if not (self.folder / name).is_file():
            raise ConfigError(f"{self.folder} holds no {name}{self._instead()}")
        try:
            with safe_open(self.folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118  it is no dict
                    view = file.get_slice(key)
                    if (code := view.get_dtype()) not in DTYPES:
                        raise ConfigError(f"{self.folder / name}: {key} is of dtype {code}: name a base that is not quantised")
                    self.specs[key], self._files[key] = Spec(DTYPES[code], tuple(view.get_shape())), name
        except (OSError, SafetensorError) as e:
            raise ConfigError(f"{self.folder / name} cannot be read ({e}): fetch the model again") from None

    def _instead(self) -> str:
        if list(self.folder.glob("*.bin")) or list(self.folder.glob("*.pth")):
            return ", its weights are pickled: only safetensors are read, save it with transformers' save_pretrained"
        if list(self.folder.glob("*.safetensors")):
            return f" and no {INDEX} that says where its tensors lie: fetch the model again"
        return " nor other safetensors: name a Hugging Face model folder or hub id"

    def get(self, name: str) -> Tensor:
        """On the CPU; its memory is the file's, mapped until the tensor is gone."""
        with safe_open(self.folder / self._files[name], "pt") as file:
            return file.get_tensor(name)


def write_tensors(folder: Path, specs: dict[str, Spec], make: Callable[[str], Tensor], shard_bytes: int = SHARD_BYTES) -> int:
    """Write make(name), of each spec's dtype and shape, in their order, into shards of at most `shard_bytes` (or one tensor) and an index.

    One shard is model.safetensors, without an index, as transformers has it. Returns the number of shards.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.bytes
    if len(shards) == 1:
        _write_shard(folder / "model.safetensors", specs, make)
        return 1
    where: dict[str, str] = {}
    for n, names in enumerate(shards):
        file = f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, {name: specs[name] for name in names}, make)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(spec.bytes for spec in specs.values())}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return len(shards)


def _write_shard(path: Path, specs: dict[str, Spec], make: Callable[[str], Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        header[name] = {"dtype": _CODES[spec.dtype], "shape": spec.shape, "data_offsets": [end, end + spec.bytes]}
        end += spec.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            tensor = make(name).cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == spec, f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not {spec}"
            f.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
