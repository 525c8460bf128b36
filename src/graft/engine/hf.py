"""The engine on plain transformers: one frozen base, adapters stacked in slots, rows that join and leave between any two steps.

Start: the time to load the base. A step: the prompts of rows that join, or one token of every row under way, in turn. Memory beyond the base:
the adapters, and the rows' keys and values (cache.py), 2 * layers * kv_heads * head_dim values a token, under a budget.
It is for CPUs, small GPUs and bases in nf4, and no second vLLM: lanes are as long as the longest row, and no prefix is shared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.core.errors import ConfigError
from graft.engine.batched import Batched
from graft.engine.cache import RowCache, kv_bytes
from graft.engine.protocol import Chunk, Finish, Request, Scored
from graft.engine.sampling import Picked, pick
from graft.engine.sight import Prompt, Sight
from graft.engine.slots import Slots
from graft.engine.text import Text
from graft.model.base import DTYPES, load_base, sees_images
from graft.model.chat import end_of_turn_ids
from graft.model.images import ImageProcessor, Seen

PROMPT_TOKENS = 8192  # padding counted, of rows that join in one step, where it is more than one
SCORED_TOKENS = 2048  # whose logits one forward makes, where it is more than one row's
FEW_TOKENS, PADDING = 256, 0.1
CPU_CACHE_GIB = 2.0
GPU_CACHE_SHARE = 0.7  # of the memory that is free once the base is there


class HFEngine(Batched):
    """adapters: {name: folder of a saved LoRA adapter}, loaded at once; tokenizer: the one whose template ends the turns.

    max_adapters: slots, by default as many as are given; kv_tokens: how many tokens of keys and values are held at most, by default what
    the memory allows; image_pixels: of an image at most, for a base that sees some (shard.image_pixels). Raises ConfigError where `base` is no model that it can run or has fewer tokens than the tokenizer, and ArtifactError
    where an adapter does not fit it.
    """

    def __init__(
        self,
        base: str,
        revision: str | None,
        precision: str,
        adapters: dict[str, Path],
        tokenizer: Any,
        device: str | torch.device | None = None,
        max_batch: int = 64,
        max_adapters: int | None = None,
        max_rank: int = 512,
        kv_tokens: int | None = None,
        image_pixels: int | None = None,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = load_base(base, revision, precision, self.device)
        self.tokenizer, self.max_batch = tokenizer, max_batch
        config = self.model.config.get_text_config()
        if len(tokenizer) > (known := self.model.get_input_embeddings().weight.shape[0]):
            raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens and the base {base!r} embeds {known}: they do not belong together")
        self.ends = frozenset(end_of_turn_ids(tokenizer))
        if sees_images(self.model.config):
            self.processor = ImageProcessor(base, revision, image_pixels)
        self._sight = Sight(self.model, self.processor) if self.processor else None
        self.slots = Slots(self.model, len(adapters) if max_adapters is None else max_adapters, max_rank, DTYPES[precision])
        for name, folder in adapters.items():
            self.slots.load(name, Path(folder))
        self.kv_tokens = kv_tokens or _affordable(config, DTYPES[precision].itemsize, self.device)
        self.max_length: int = min(config.max_position_embeddings, self.kv_tokens)
        self._windows = _windows(config, base)
        self._cache = RowCache(config.num_hidden_layers)
        self._wanted: tuple[Tensor, Tensor] | None = None  # row and place, [wanted] each, of the tokens whose logits are
        self.model.get_output_embeddings().register_forward_pre_hook(self._pick_wanted)
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # under way, by lane
        self._numbers, self._joined = count(), False

    # ---- adapters -------------------------------------------------------------------------------------------------------
    @property
    def adapters(self) -> list[str]:
        return self.slots.names

    def load(self, name: str, folder: Path, again: bool = False) -> str | None:
        return self.slots.load(name, folder, again)

    def unload(self, name: str) -> None:
        self.slots.unload(name)

    @torch.inference_mode()
    def scores(self, asked: Sequence[Scored], adapter: str | None = None) -> list[list[float]]:
        """Log-probabilities (nats) of each ids[first:], first ≥ 1, each given all before it. Those of about one length pass together, padded behind
        their ends, which no token before them sees; in fp32 a row's are those that it has alone to 1e-5."""
        for number, (ids, _, images) in enumerate(asked):
            self.check(number, Request(ids[:-1], 1, adapter=adapter, images=images))
        order = sorted(range(len(asked)), key=lambda number: len(asked[number][0]))
        found: list[list[float]] = [[]] * len(asked)
        slot = self.slots.take(adapter)
        try:
            for start, end in _affordable_scores([asked[number] for number in order]):
                own = [asked[number] for number in order[start:end]]
                for number, scores in zip(order[start:end], self._scores(own, slot), strict=True):
                    found[number] = scores
        finally:
            self.slots.release(slot)
        return found

    # ---- rows -----------------------------------------------------------------------------------------------------------
    def add(self, request: Request) -> int:
        """Queue a row; its number. DataError names what cannot be run."""
        number = next(self._numbers)
        self.check(number, request)
        self._waiting.append(_Row(number, request, self))
        return number

    def check(self, row: int, request: Request) -> None:
        super().check(row, request)
        if self._sight:
            self._sight.check(row, request.prompt_ids, request.images)

    def drop(self, row: int) -> None:
        for found in (*self._waiting, *self._rows):
            if found.number == row:
                found.over = True

    @torch.inference_mode()
    def step(self) -> list[Chunk]:
        """The first tokens of rows that join, or the next one of all under way: in turn, so that neither waits for long."""
        self._leave()
        joining = [] if self._joined and self._rows else self._joining()
        self._joined = bool(joining)
        rows = joining or self._rows
        if not rows:
            return []
        picked = self._prompts(joining) if joining else self._next_tokens()
        if joining:
            self._rows += joining
        found = [row.push(token) for row, token in zip(rows, picked, strict=True)]
        self._leave()
        return found

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows)

    def wake(self) -> None:
        """A step computes here, and never only waits."""

    def close(self) -> None:
        """All that is held is this process's own."""

    # ---- inside ---------------------------------------------------------------------------------------------------------
    def _joining(self) -> list[_Row]:
        """Rows that wait and fit now, in their order."""
        found: list[_Row] = []
        longest, prompt = max((row.most for row in self._rows), default=0), 0
        while self._waiting and len(self._rows) + len(found) < self.max_batch:
            row = self._waiting[0]
            longest, prompt = max(longest, row.most), max(prompt, len(row.request.prompt_ids))
            too_much = (len(self._rows) + len(found) + 1) * longest > self.kv_tokens
            if too_much or (found and (len(found) + 1) * prompt > PROMPT_TOKENS):
                break
            found.append(self._waiting.popleft())
        return found

    def _leave(self) -> None:
        """Rows that are over give up their lanes; the last one moves into the gap."""
        for row in [row for row in self._waiting if row.over]:
            self._waiting.remove(row)
            row.leave()
        for lane in reversed([lane for lane, row in enumerate(self._rows) if row.over]):
            self._rows[lane].leave()
            last = self._rows.pop()
            if lane < len(self._rows):
                self._cache.move(len(self._rows), lane, last.length)
                self._rows[lane] = last

    def _prompts(self, joining: list[_Row]) -> list[Picked]:
        """The first token of each row; those of about one length at once."""
        found: list[Picked] = []
        for start, end in _alike([len(row.request.prompt_ids) for row in joining]):
            found += self._padded(joining[start:end], joining[:start])
        return found

    def _padded(self, rows: list[_Row], before: list[_Row]) -> list[Picked]:
        """Prompts are padded behind their ends, which no token before them sees. before: rows that have just joined."""
        there = (*self._rows, *before)
        self._cache.prompts(len(there), len(rows), max(row.most for row in (*there, *rows)), self.kv_tokens)
        places = [[row.length - 1] for row in rows]
        logits = self._whole([row.prompt for row in rows], places, [row.slot for row in rows], self._cache)
        return self._pick(logits, rows)

    def _scores(self, asked: list[Scored], slot: int) -> list[list[float]]:
        """Those of one forward."""
        places = [list(range(first - 1, len(ids) - 1)) for ids, first, _ in asked]
        logits = self._whole([self.prompt(ids, images) for ids, _, images in asked], places, [slot] * len(asked))
        tokens = torch.tensor([token for ids, first, _ in asked for token in ids[first:]], device=self.device)
        scores = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        return [own.tolist() for own in scores.split([len(own) for own in places])]

    def _whole(self, rows: list[Prompt], places: list[list[int]], slots: list[int], cache: RowCache | None = None) -> Tensor:
        """fp32 logits [wanted, vocabulary] at these places of whole rows, one row after another."""
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=self.device)
        at = torch.arange(longest, device=self.device)
        given: dict[str, Tensor] = {"input_ids": ids, "position_ids": at[None]}
        if self._sight and any(row.images for row in rows):
            embedded = self._sight.embedded(rows, ids, lambda n: self.slots.rows.use([slots[n]], self.device))
            given = {"inputs_embeds": embedded, "position_ids": self._sight.positions(rows, at)}
        wanted = [(row, place) for row, own in enumerate(places) for place in own]
        self._wanted = tuple(torch.tensor(wanted, device=self.device).T)  # type: ignore[assignment]
        try:
            return self._forward(given, at[None], slots, 0, cache)[0]
        finally:
            self._wanted = None

    def prompt(self, ids: list[int], images: tuple[Seen, ...]) -> Prompt:
        return self._sight.prompt(ids, images) if self._sight else Prompt(ids)

    def _pick_wanted(self, _: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the head sees of hidden states [rows, length, width]: [1, wanted, width]; logits of other tokens are never made."""
        return given if self._wanted is None else (given[0][self._wanted][None],)

    def _next_tokens(self) -> list[Picked]:
        at = self._cache.next_tokens([row.length for row in self._rows], self.device)
        ids = torch.tensor([[row.text.tokens[-1]] for row in self._rows], device=self.device)
        where = at + torch.tensor([row.prompt.shift for row in self._rows], device=self.device) if self._sight else at
        given = {"input_ids": ids, "position_ids": where[:, None]}
        logits = self._forward(given, at[:, None], [row.slot for row in self._rows], 1, self._cache)
        for row in self._rows:
            row.length += 1
        return self._pick(logits[:, -1], self._rows)

    def _forward(self, given: dict[str, Tensor], at: Tensor, slots: list[int], keep: int | Tensor, cache: RowCache | None = None) -> Tensor:
        """fp32 logits [b, kept, vocabulary] of what is given, ids [b, new] or embeddings and positions, which are tokens number `at` [b or 1, new]."""
        self.slots.rows.use(slots, self.device)
        keys = cache.step.longest if cache and cache.step.at is not None else at.shape[1]
        out = self.model(**given, attention_mask=self._mask(at, keys), past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep)
        logits: Tensor = out.logits.float()
        return logits

    def _mask(self, at: Tensor, keys: int) -> Any:
        """What tokens at positions `at` [b or 1, new] attend to of so many keys, by kind of layer; None where the kernels' causal one says it."""
        if self._windows == {"full_attention": None} and at.shape[0] == 1:
            return None
        key = torch.arange(keys, device=self.device)
        seen = key <= at[:, None, :, None]
        masks = {kind: seen if window is None else seen & (key > at[:, None, :, None] - window) for kind, window in self._windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _pick(self, logits: Tensor, rows: list[_Row]) -> list[Picked]:
        return pick(logits, [row.request for row in rows], [row.generator for row in rows])


class _Row:
    """One request: its random stream, its text, and how much of it the cache holds."""

    def __init__(self, number: int, request: Request, engine: HFEngine):
        self.number, self.request, self.engine = number, request, engine
        self.generator = torch.Generator().manual_seed(request.seed)  # on the CPU: the same draws on every device
        self.text = Text(engine.tokenizer, request.stop)
        self.ends = engine.ends if request.ends is None else request.ends
        self.slot = engine.slots.take(request.adapter)
        self.prompt = engine.prompt(request.prompt_ids, request.images)
        self.length = len(request.prompt_ids)  # tokens in the cache, once it has joined
        self.most = self.length + request.max_new_tokens
        self.over = False

    def leave(self) -> None:
        self.engine.slots.release(self.slot)

    def push(self, picked: Picked) -> Chunk:
        if picked.token in self.ends:
            self.over = True
            return Chunk(self.number, self.text.end(), (), "stop")
        last = len(self.text.tokens) + 1 == self.request.max_new_tokens
        shown, stopped = self.text.push(picked.token, last)
        self.over = last or stopped
        reason: Finish | None = "stop" if stopped else "length" if last else None
        return Chunk(self.number, shown, (picked.token,), reason, (picked.told,) if picked.told else ())


def _affordable_scores(asked: list[Scored]) -> list[tuple[int, int]]:
    """Stretches of neighbours, of ascending lengths, that are scored in one forward: so many tokens with their padding, so many logits."""
    found: list[tuple[int, int]] = []
    logits = 0
    for end, (ids, first, _) in enumerate(asked, 1):
        logits += len(ids) - first
        start = found[-1][0] if found else 0
        if found and (end - start) * len(ids) <= PROMPT_TOKENS and logits <= SCORED_TOKENS:
            found[-1] = (start, end)
        else:
            found.append((end - 1, end))
            logits = len(ids) - first
    return found


def _alike(lengths: list[int]) -> list[tuple[int, int]]:
    """Stretches (start, end) of neighbours of which at most a tenth would be padding; few tokens go together however they differ."""
    found: list[tuple[int, int]] = []
    for end in range(1, len(lengths) + 1):
        own = lengths[found[-1][0] : end] if found else []
        if own and (sum(own) < FEW_TOKENS or max(own) * len(own) <= (1 + PADDING) * sum(own)):
            found[-1] = (found[-1][0], end)
        else:
            found.append((end - 1, end))
    return found


def _windows(config: Any, base: str) -> dict[str, int | None]:
    """The kinds of attention layers, with how many tokens back each looks; ConfigError where a layer is of another kind."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise ConfigError(f"model.base = {base!r} has layers of {other[0]!r}, which keep more than keys and values: this engine does not run them")
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def _affordable(config: Any, bytes_each: int, device: torch.device) -> int:
    """Tokens of keys and values that the memory has room for."""
    each = kv_bytes(config, bytes_each)
    free = GPU_CACHE_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else CPU_CACHE_GIB * 2**30
    return int(free / each)
