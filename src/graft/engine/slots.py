"""Adapters of one base, stacked in slots so that the rows of a batch mix them; loaded and evicted while others are in use."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import ArtifactError
from graft.engine.protocol import SlotsBusy
from graft.model.lora import Rows, SlotLoraLinear, inject_slots, put, read_adapter

Pairs = dict[str, tuple[Tensor, Tensor]]
Linears = dict[str, tuple[int, int]]  # name -> (in, out)


def linears(model: nn.Module) -> Linears:
    return {name: (m.in_features, m.out_features) for name, m in model.named_modules() if hasattr(m, "in_features")}


def fitted(name: str, folder: Path, known: Linears, max_rank: int, device: torch.device | str = "cpu") -> tuple[dict[str, Any], Pairs]:
    """(config, A and B by layer, on "meta" their shapes alone) of a saved adapter; ArtifactError where it does not fit a base of these linear layers, tensor by tensor."""
    config, pairs = read_adapter(folder, device)
    r = config["r"]
    if r > max_rank:
        raise ArtifactError(f"adapter {name!r} ({folder}) has rank {r}: this server takes {max_rank} at most (serve.max_rank)")
    for module, (a, b) in pairs.items():
        if module not in known:
            raise ArtifactError(f"adapter {name!r} ({folder}) adapts {module}, which is no linear layer of this base: it belongs to another")
        ins, outs = known[module]
        if (found := (tuple(a.shape), tuple(b.shape))) != ((r, ins), (outs, r)):
            raise ArtifactError(f"adapter {name!r} ({folder}): A and B of {module} are {found}, this base needs {((r, ins), (outs, r))}")
    return config, pairs


class Slots:
    """Of `n` adapters beside the base, which is slot 0. A layer gets its slots with the first adapter that adapts it."""

    def __init__(self, model: nn.Module, n: int, max_rank: int, dtype: torch.dtype):
        for p in model.parameters():
            p.requires_grad_(False)
        self.rows, self.max_rank = Rows(), max_rank
        self._model, self._n, self._dtype = model, n, dtype
        self._linears, self._device = linears(model), next(model.parameters()).device
        self._layers: dict[str, SlotLoraLinear] = {}
        self._slot: dict[str | None, int] = {None: 0}  # the least recently used first
        self._retired: dict[int, str] = {}  # slots whose adapter takes no more requests, but has some
        self._users: Counter[int] = Counter()

    @property
    def names(self) -> list[str]:
        return [name for name in self._slot if name is not None]

    def load(self, name: str, folder: Path, again: bool = False) -> str | None:
        """Put an adapter into a free slot, or in place of the idle one that was used least recently; returns the name of that.

        again: also where it is there; requests under way end with what they began with. Raises ArtifactError where it does not fit, and
        SlotsBusy, with all slots as they were.
        """
        if name in self._slot and not again:
            return None
        config, pairs = fitted(name, folder, self._linears, self.max_rank, self._device)
        slot, evicted = self._room()
        with torch.inference_mode(False), torch.no_grad():
            for module in pairs.keys() - self._layers.keys():
                self._layers |= inject_slots(self._model, [module], self._n, config["r"], self._dtype, self.rows)
            put(self._layers, slot, pairs, config["lora_alpha"] / config["r"])
            if evicted:
                for module in self._layers.keys() - pairs.keys():
                    self._layers[module].clear(slot)
        if evicted:
            del self._slot[evicted]
        self.unload(name)
        self._slot[name] = slot
        return evicted if evicted != name else None

    def _room(self) -> tuple[int, str | None]:
        taken = {*self._slot.values(), *self._retired}
        if free := [slot for slot in range(1, self._n + 1) if slot not in taken]:
            return free[0], None
        for name, slot in self._slot.items():
            if name is not None and not self._users[slot]:
                return slot, name
        raise SlotsBusy(f"all {self._n} slots for adapters are in use: try again soon, or set serve.max_adapters higher")

    def unload(self, name: str) -> None:
        """Take no more requests for an adapter; its slot is free when those under way have ended. No error where it is not there."""
        slot = self._slot.pop(name, None)
        if slot is None:
            return
        if self._users[slot]:
            self._retired[slot] = name
        else:
            self._clear(slot)

    def take(self, name: str | None) -> int:
        """The slot of an adapter, for one more request; give it back by release()."""
        slot = self._slot.pop(name)
        self._slot[name] = slot  # now the most recently used
        self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        self._users[slot] -= 1
        if not self._users[slot] and slot in self._retired:
            del self._retired[slot]
            self._clear(slot)

    def _clear(self, slot: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for layer in self._layers.values():
                layer.clear(slot)

    def __contains__(self, name: str | None) -> bool:
        return name in self._slot
