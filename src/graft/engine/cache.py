"""The keys and values of the rows under way, each row in a lane of its own, so that rows join and leave between steps.

A layer's lanes are one tensor [lanes, kv_heads, tokens, head_dim]; the rows in use are always the first ones, so a step over them
reads a view and gathers nothing. Lanes are made anew, and copied, when a row needs more of them or longer ones: the rectangle of rows times
the longest of them is what the engine's budget is held against.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

ROUND = 64  # tokens that a lane grows by


def kv_bytes(config: Any, bytes_each: int) -> int:
    """Bytes that a token's keys and values take in all layers of a text model."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads: int = config.num_key_value_heads or config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * heads * width * bytes_each


class Lanes(CacheLayerMixin):
    """One layer. What update() does is said by `step`, which all layers of a cache share."""

    is_sliding: Any = False
    keys: Any  # Tensor [lanes, kv_heads, tokens, head_dim], None before the first step
    values: Any

    def __init__(self, step: Step):
        super().__init__()
        self.step = step
        self.keys = self.values = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.resize(0)
        self.is_initialized = True

    def resize(self, rows: int, like: tuple[Tensor, Tensor] | None = None) -> None:
        """Lanes of the step's size with the first `rows` kept."""
        for name, given in zip(("keys", "values"), like or (self.keys, self.values), strict=True):
            old = getattr(self, name)
            new = given.new_zeros(self.step.lanes, given.shape[1], self.step.tokens, given.shape[3])
            if old is not None and rows:
                kept = min(old.shape[2], self.step.tokens)
                new[:rows, :, :kept] = old[:rows, :, :kept]
            setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [rows, kv_heads, new, head_dim]; returns what the step's rows attend to."""
        step = self.step
        if self.keys is None:
            self.resize(0, (key_states, value_states))
        rows, new = key_states.shape[0], key_states.shape[2]
        if step.at is None:  # whole prompts, of rows behind those there are
            self.keys[step.first : step.first + rows, :, :new] = key_states
            self.values[step.first : step.first + rows, :, :new] = value_states
            return key_states, value_states
        self.keys[step.rows, :, step.at] = key_states[:, :, 0]
        self.values[step.rows, :, step.at] = value_states[:, :, 0]
        return self.keys[:rows, :, : step.longest], self.values[:rows, :, : step.longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.step.at is None else self.step.longest), 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.step.tokens


class Step:
    """What the next forward does to the lanes, and how large they are."""

    def __init__(self) -> None:
        self.lanes = self.tokens = 0
        self.first = 0  # lane of the first new row
        self.at: Tensor | None = None  # [rows] long: where each row's next token goes; None: prompts
        self.rows: Tensor | None = None  # [rows] long: 0, 1, …
        self.longest = 0  # tokens, the next one counted


class RowCache(Cache):
    """For models whose every layer keeps keys and values; rows are numbered from 0 without gaps."""

    def __init__(self, layers: int):
        self.step = Step()
        self.lanes = [Lanes(self.step) for _ in range(layers)]
        super().__init__(layers=list(self.lanes))

    def prompts(self, rows: int, new: int, tokens: int, budget: int) -> None:
        """The next forward brings the prompts of `new` rows behind `rows` that are there.

        tokens: what the longest of all these rows will take in the end; budget: the most that lanes times tokens may come to.
        """
        step, lanes = self.step, rows + new
        if lanes > step.lanes or tokens > step.tokens:
            spare, rounded = 1 << (lanes - 1).bit_length(), -(-tokens // ROUND) * ROUND
            step.tokens = rounded if lanes * rounded <= budget else tokens
            step.lanes = spare if spare * step.tokens <= budget else lanes
            for layer in self.lanes:
                if layer.keys is not None:
                    layer.resize(rows)
        step.first, step.at = rows, None

    def next_tokens(self, lengths: list[int], device: torch.device) -> Tensor:
        """The next forward brings one token of every row, behind `lengths` that each has; returns these, [rows] long."""
        step = self.step
        step.at, step.rows = torch.tensor(lengths, device=device), torch.arange(len(lengths), device=device)
        step.longest = max(lengths) + 1
        return step.at

    def move(self, source: int, target: int, length: int) -> None:
        """Row `source`, of `length` tokens, takes the place of `target`."""
        for layer in self.lanes:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]
