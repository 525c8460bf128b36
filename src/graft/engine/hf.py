"""The engine on plain transformers: one frozen base, all adapters stacked in slots, rows of one batch mix them freely.

Start: the time to load the base. A step: one forward of the rows that are still unfinished. Memory beyond the base:
the adapters, and per row 2 * layers * kv_heads * head_dim * (prompt + answer) values of KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from graft.core.errors import ArtifactError, ConfigError, DataError
from graft.engine.protocol import Chunk, Completion, Finish, Request
from graft.model.base import DTYPES, load_base
from graft.model.chat import end_of_turn_ids
from graft.model.lora import Rows, inject_slots, read_adapter

HALF = "\ufffd"  # what decoding gives for a character whose bytes are not all there


class HFEngine:
    """adapters: {name: folder of a saved LoRA adapter}; tokenizer: the one whose template ends the turns.

    Raises ConfigError where `base` is no model or has fewer tokens than the tokenizer, and ArtifactError where an adapter does not fit it, tensor by tensor.
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
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = load_base(base, revision, precision, self.device)
        self.tokenizer, self.max_batch, self.adapters = tokenizer, max_batch, list(adapters)
        self.max_length: int = self.model.config.get_text_config().max_position_embeddings
        if len(tokenizer) > (known := self.model.get_input_embeddings().weight.shape[0]):
            raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens and the base {base!r} embeds {known}: they do not belong together")
        self.ends = frozenset(end_of_turn_ids(tokenizer))
        self.slot_of: dict[str | None, int] = {None: 0, **{name: i for i, name in enumerate(adapters, 1)}}
        self.rows = _bind(self.model, adapters, DTYPES[precision])

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions, in the order of the requests. DataError names a request that cannot be run."""
        text = [""] * len(requests)
        tokens: list[list[int]] = [[] for _ in requests]
        reason: dict[int, Finish] = {}
        for chunks in self.stream(requests):
            for chunk in chunks:
                text[chunk.row] += chunk.text
                if chunk.token is not None:
                    tokens[chunk.row].append(chunk.token)
                if chunk.finish_reason:
                    reason[chunk.row] = chunk.finish_reason
        return [Completion(text[i], tokens[i], reason[i], len(r.prompt_ids)) for i, r in enumerate(requests)]

    def stream(self, requests: Sequence[Request], dropped: Callable[[int], bool] = lambda row: False) -> Iterator[list[Chunk]]:
        """Yield a list of chunks a step. Rows of about one length share a batch, so little is padded."""
        for row, request in enumerate(requests):
            self._check(row, request)
        order = sorted(range(len(requests)), key=lambda row: len(requests[row].prompt_ids))
        for start in range(0, len(order), self.max_batch):
            yield from self._batch([_Row(row, requests[row], self) for row in order[start : start + self.max_batch]], dropped)

    def _check(self, row: int, request: Request) -> None:
        if request.adapter not in self.slot_of:
            raise DataError(f"request {row} asks for adapter {request.adapter!r}: the engine has {self.adapters or 'the base alone'}")
        if not request.prompt_ids or request.max_new_tokens < 1:
            raise DataError(
                f"request {row} has {len(request.prompt_ids)} prompt tokens and asks for {request.max_new_tokens}: both must be at least 1"
            )
        if (total := len(request.prompt_ids) + request.max_new_tokens) > self.max_length:
            raise DataError(
                f"request {row} has {len(request.prompt_ids)} prompt tokens and asks for {request.max_new_tokens}, together {total}: "
                f"the model holds {self.max_length}; shorten either"
            )

    def _batch(self, rows: list[_Row], dropped: Callable[[int], bool]) -> Iterator[list[Chunk]]:
        ids, mask = _left_pad([row.request.prompt_ids for row in rows], self.device)
        cache = DynamicCache(config=self.model.config)
        while rows:
            picked = self._step(ids, mask, cache, rows)
            yield [row.push(token) for row, token in zip(rows, picked, strict=True)]
            keep = [i for i, row in enumerate(rows) if not row.finished and not dropped(row.number)]
            if len(keep) < len(rows):
                kept = torch.tensor(keep, dtype=torch.long, device=self.device)
                cache.batch_select_indices(kept)
                mask = mask[kept]
                rows = [rows[i] for i in keep]
            ids = torch.tensor([[picked[i]] for i in keep], dtype=torch.long, device=self.device)
            mask = torch.cat([mask, mask.new_ones(len(keep), 1)], dim=1)

    @torch.inference_mode()
    def _step(self, ids: Tensor, mask: Tensor, cache: DynamicCache, rows: list[_Row]) -> list[int]:
        """Run `ids` [b, new] behind the cache under `mask` [b, all]; the next token of every row."""
        self.rows.slots = torch.tensor([self.slot_of[row.request.adapter] for row in rows], device=self.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return _pick(out.logits[:, -1].float(), rows)


class _Row:
    """One request under way: its tokens, its random stream, and the text that is safe to show."""

    def __init__(self, number: int, request: Request, engine: HFEngine):
        self.number, self.request, self.engine = number, request, engine
        self.generator = torch.Generator().manual_seed(request.seed)  # on the CPU: the same draws on every device
        self.tokens: list[int] = []
        self.shown = self.before = 0  # tokens whose text was given out, and where the last given piece starts
        self.held = ""  # may be the beginning of a stop text
        self.finished = False

    def push(self, token: int) -> Chunk:
        if token in self.engine.ends:
            text, _ = self._until_stop(self._decode(True))
            return self._chunk(text + self.held, None, "stop")
        self.tokens.append(token)
        last = len(self.tokens) == self.request.max_new_tokens
        text, stopped = self._until_stop(self._decode(last))
        if stopped:
            return self._chunk(text, token, "stop")
        return self._chunk(text + self.held, token, "length") if last else self._chunk(text, token, None)

    def _chunk(self, text: str, token: int | None, reason: Finish | None) -> Chunk:
        self.finished = reason is not None
        return Chunk(self.number, text, token, reason)

    def _text(self, start: int, end: int | None = None) -> str:
        return self.engine.tokenizer.decode(self.tokens[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode(self, last: bool) -> str:
        """Text of the tokens not yet shown, read together with the piece before them (a tokenizer may join or strip at its
        start); "" while the last character is not whole, which at the end is left out."""
        text = self._text(self.before)
        if text.endswith(HALF) and not last:
            return ""
        new = text[len(self._text(self.before, self.shown)) :]
        self.before, self.shown = self.shown, len(self.tokens)
        return new.rstrip(HALF) if last else new

    def _until_stop(self, new: str) -> tuple[str, bool]:
        """(text to show, whether a stop text was met); what may be the beginning of a stop text waits in `held`."""
        stops, text = self.request.stop, self.held + new
        met = [at for stop in stops if (at := text.find(stop)) >= 0]
        if met:
            self.held = ""
            return text[: min(met)], True
        wait = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - wait :]
        return text[: len(text) - wait], False


def _bind(model: nn.Module, adapters: dict[str, Path], dtype: torch.dtype) -> Rows:
    """Stack the adapters into slots 1..n of every layer that any of them adapts; alpha / r goes into B."""
    read = {name: read_adapter(Path(folder)) for name, folder in adapters.items()}
    modules = dict(model.named_modules())
    for name, (config, pairs) in read.items():
        for module, (a, b) in pairs.items():
            linear: Any = modules.get(module)
            r = config["r"]
            if not hasattr(linear, "in_features"):
                raise ArtifactError(
                    f"adapter {name!r} ({adapters[name]}) adapts {module}, which is no linear layer of this base: it belongs to another"
                )
            expected = ((r, linear.in_features), (linear.out_features, r))
            if (found := (tuple(a.shape), tuple(b.shape))) != expected:
                raise ArtifactError(f"adapter {name!r} ({adapters[name]}): A and B of {module} are {found}, this base needs {expected}")
    if not read:
        return Rows()
    targets = tuple(sorted({module.rsplit(".", 1)[-1] for _, pairs in read.values() for module in pairs}))
    rows, layers = inject_slots(model, targets, len(read), max(config["r"] for config, _ in read.values()), dtype)
    for slot, (config, pairs) in enumerate(read.values(), 1):
        for module, (a, b) in pairs.items():
            r = config["r"]  # a smaller rank is padded with zeros
            layers[module].A[slot, :r] = a.to(dtype)
            layers[module].B[slot, :, :r] = (b.float() * (config["lora_alpha"] / r)).to(dtype)
    return rows


def _left_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [b, longest] long; the pad id is never attended to, so any id will do."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], dtype=torch.long, device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], dtype=torch.long, device=device)
    return ids, mask


def _pick(logits: Tensor, rows: list[_Row]) -> list[int]:
    """The next token of every row from logits [b, vocabulary]: the largest, or drawn from the nucleus (https://arxiv.org/abs/1904.09751).

    A row's draw is one number of its own generator put through the inverse of its own distribution, so its batch mates
    cannot change it. The distribution runs in the order of the vocabulary: sorted by probability, the last bit of two
    nearly equal ones would decide which of them the number meets.
    """
    picked = logits.argmax(dim=-1)
    sampled = [i for i, row in enumerate(rows) if row.request.temperature > 0]
    if sampled:
        column = [
            (rows[i].request.temperature, rows[i].request.top_p, torch.rand((), generator=rows[i].generator, dtype=torch.float64).item())
            for i in sampled
        ]
        temperature, top_p, draw = torch.tensor(column, dtype=torch.float64, device=logits.device).T.unsqueeze(-1)
        p = (logits[sampled].double() / temperature).softmax(dim=-1)
        likeliest, ids = p.sort(dim=-1, descending=True)
        outside = likeliest.cumsum(dim=-1) - likeliest >= top_p  # the likelier tokens suffice; never true of the first
        upto = p.masked_fill(torch.zeros_like(outside).scatter(-1, ids, outside), 0.0).cumsum(dim=-1)
        at = torch.searchsorted(upto, draw * upto[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
        picked[sampled] = at.squeeze(-1)
    return picked.tolist()
