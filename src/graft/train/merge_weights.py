"""The weights of a merge, one at a time: a base's stored, as an adapter was trained on them, and with the adapter.

What training multiplies by is not what is stored: fp8 and nf4 hold the linear layers but the head quantised, and all else in bf16.
An adapter belongs to those weights, so they are what it is merged into, layers without an adapter included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import ArtifactError, ConfigError
from graft.core.hub import model_folder
from graft.model.base import DTYPES, auto_class, read_config
from graft.model.frozen import NF4_BLOCK, quantize_rows
from graft.model.images import copy_config
from graft.model.lora import in_tower, merged, read_adapter
from graft.model.stream import named, stored_as
from graft.train.tensor_files import SHARD_BYTES, Spec, TensorFiles, write_tensors

Pair = tuple[Tensor, Tensor]


class Adapter:
    """A saved LoRA adapter: `pairs` (A [r, in], B [out, r]) by module name, `scale` alpha / r."""

    def __init__(self, folder: Path):
        """ArtifactError where the folder holds none, or one whose tensors are not of its rank."""
        config, self.pairs = read_adapter(folder)
        self.folder, self.scale = folder, config["lora_alpha"] / config["r"]
        for name, (a, b) in self.pairs.items():
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != config["r"] or b.shape[1] != config["r"]:
                raise ArtifactError(f"{folder}: the adapter of {name} is A {list(a.shape)}, B {list(b.shape)}, its config says rank {config['r']}")


class MergeBase:
    """A base model whose weights stay on disk: `lm` is it on the meta device, `files` the stored tensors.

    Device: where weights are quantised and multiplied. On a GPU they are quantised by the kernels that training uses.
    """

    def __init__(self, base: str, revision: str | None, precision: str, device: torch.device):
        """ConfigError where `base` is no model of safetensors that are not quantised, or its tensors are not those of its config."""
        folder = model_folder(base, revision, weights=True)
        self.name, self.revision, self.precision, self.dtype, self.device = base, revision, precision, DTYPES[precision], device
        self.config = read_config(base, revision)
        if getattr(self.config, "quantization_config", None):
            raise ConfigError(f"model.base = {base!r} is quantised already: name the model that it was made from")
        self.folder, self.files = folder, TensorFiles(folder)
        self.lm = _empty(self.config, base)
        self.tied: dict[str, str] = dict(getattr(self.lm, "all_tied_weights_keys", None) or {})  # name -> whose weight it is
        self._sources = self._found()
        head = self.lm.get_output_embeddings()
        self.linears = {name: module for name, module in self.lm.named_modules() if isinstance(module, nn.Linear)}
        quantised = precision in ("fp8", "nf4")  # the layers that load_fused() and load_base() quantise
        self.quantised = {f"{name}.weight" for name, module in self.linears.items() if quantised and module is not head and not in_tower(name)}
        self.parameters = {name for name, _ in self.lm.named_parameters(remove_duplicate=False)}  # the others of its tensors are buffers
        self.specs = {  # of the merged model
            name: Spec(self.dtype if name in self.parameters else self.files.specs[source].dtype, self.files.specs[source].shape)
            for name, source in self._sources.items()
        }

    def _found(self) -> dict[str, str]:
        """The stored tensor of each of the model's own, a tied one left out."""
        own = {named(stored, self.config): stored for stored in self.files.specs}
        stored, wanted = {name: self.files.specs[source] for name, source in own.items()}, self.lm.state_dict()
        sources = {name: name for name in wanted if name not in self.tied}
        for name, other in self.tied.items():
            if name not in stored:
                continue
            if other not in stored:
                sources[other] = name
            elif not torch.equal(self.files.get(own[name]), self.files.get(own[other])):
                raise ConfigError(
                    f"model.base = {self.name!r} holds {name} and {other}, which differ, and its config ties them: set tie_word_embeddings to false there"
                )
        if missing := sorted(name for name, source in sources.items() if source not in stored):
            raise ConfigError(
                f"model.base = {self.name!r} lacks {len(missing)} tensors that a {self.config.model_type} model needs, such as {missing[0]}"
            )
        for name, source in sources.items():
            if stored[source].shape != tuple(wanted[name].shape):
                raise ConfigError(
                    f"model.base = {self.name!r}: {source} is {list(stored[source].shape)}, its config asks for {list(wanted[name].shape)}"
                )
        return {name: own[source] for name, source in sources.items()}

    @property
    def left_out(self) -> list[str]:
        """Stored tensors that the model has no place for, such as inverse frequencies of rotary embeddings or heads of other tasks."""
        return sorted(set(self.files.specs) - set(self._sources.values()) - set(self.tied))

    def check(self, adapter: Adapter) -> None:
        """ArtifactError, in one line, where the adapter is of another base by its names or shapes."""
        for name, (a, b) in adapter.pairs.items():
            wanted = [b.shape[0], a.shape[1]]
            if name not in self.linears:
                raise ArtifactError(f"{adapter.folder} is the adapter of another base: it adapts {name}, which is no linear layer of {self.name}")
            if f"{name}.weight" in self.tied:
                raise ArtifactError(f"{adapter.folder} adapts {name}, whose weight {self.name} shares with its embedding: they cannot be merged")
            if (own := list(self.specs[f"{name}.weight"].shape)) != wanted:
                raise ArtifactError(f"{adapter.folder} is the adapter of another base: its {name} is {wanted}, that of {self.name} is {own}")

    # ---- the weights, on `device` -----------------------------------------------------------------------------------
    def stored(self, name: str) -> Tensor:
        """As the files have it."""
        return self.files.get(self._sources[self.tied.get(name, name)]).to(self.device)

    def trained(self, name: str) -> Tensor:
        """What training multiplies by: in the precision's dtype, but a weight of fp8, which is in fp32, where its scales leave no rounding."""
        stored = self.stored(name)
        if name not in self.quantised:
            return stored.to(self.dtype) if name in self.parameters else stored
        return _fp8(stored) if self.precision == "fp8" else _nf4(stored.to(self.dtype))

    def merged(self, name: str, adapter: Adapter) -> Tensor:
        """trained() + scale · B A, rounded once; a tensor without an adapter is trained(), in its spec's dtype."""
        weight, dtype = self.trained(name), self.specs[name].dtype
        if pair := adapter.pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None:
            return merged(weight, *pair, adapter.scale, dtype)
        return weight.to(dtype)

    def write(self, adapter: Adapter, folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
        """The merged model's weights in shards, and its config; returns the number of shards. At any time a few tensors are in memory."""
        of = {stored_as(name, self.config): name for name in self.specs}
        shards = write_tensors(
            folder, {file: self.specs[name] for file, name in of.items()}, lambda file: self.merged(of[file], adapter), shard_bytes
        )
        self.lm.config.dtype = self.dtype
        self.lm.config.architectures = [type(self.lm).__name__]
        self.lm.config.save_pretrained(folder)
        if (generation := self.folder / "generation_config.json").is_file():
            (folder / generation.name).write_bytes(generation.read_bytes())
        copy_config(self.name, self.revision, folder)
        return shards


def _empty(config: Any, base: str) -> Any:
    """The model of a config in fp32 and eval mode; parameters on the meta device, buffers, which its classes compute, on the CPU."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            lm: Any = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except ValueError as e:
        raise ConfigError(f"model.base = {base!r} is no causal language model: {str(e).strip().splitlines()[0][:200]}") from None
    return lm.eval()


def _fp8(weight: Tensor) -> Tensor:
    """e4m3 with a scale a row (model/frozen.py), in fp32."""
    rows, scales = quantize_rows(weight)
    return rows.float() * scales


def _nf4(weight: Tensor) -> Tensor:
    """NormalFloat4 with double quantisation (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), opened into the weight's dtype."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"))
