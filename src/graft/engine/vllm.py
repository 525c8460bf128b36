"""vLLM behind the engine's protocol: its scheduler, kernels and process; graft's adapters, text and refusals.

For GPUs and bases in bf16 or fp32 (`pip install graft[serve,vllm]`). Start: a minute or two, most of it vLLM's compilation, kept for the next
time. vLLM runs in a process of its own, which ends with this one, whatever ended it. It takes token ids and gives token ids: texts and stops are
made here, as HFEngine makes them. A sampled row follows its seed whatever its batch mates, but draws other tokens than HFEngine does.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graft.core.errors import ArtifactError, ConfigError, DataError, ServeError
from graft.core.hub import model_folder
from graft.engine.batched import Batched
from graft.engine.cache import kv_bytes
from graft.engine.protocol import Chunk, Request, Scored, SlotsBusy, Told
from graft.engine.slots import fitted, linears
from graft.engine.text import Text
from graft.model.base import DTYPES
from graft.model.chat import end_of_turn_ids

PRECISIONS = ("bf16", "fp8", "fp32")  # fp8 is how a frozen base trains: it is served in bf16
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
GUARD = 'read _; kill -9 "$@" 2>/dev/null'  # its stdin ends with the process that started it


@dataclass(eq=False)
class _Adapter:
    """In vLLM's memory under `number`, which no other adapter ever had."""

    name: str
    number: int
    folder: Path
    users: int = 0
    retired: bool = False  # takes no more requests


@dataclass(eq=False)
class _Row:
    request: Request
    text: Text
    ends: frozenset[int]
    adapter: _Adapter | None
    at_once: bool  # all of it comes when it has ended
    scored: Any = None  # of a prompt that is only scored: vLLM's logprobs of it


class VLLMEngine(Batched):
    """tokenizer: the one whose template ends the turns. max_adapters: in memory at once, all of which a batch may mix; kv_tokens: of keys and
    values, by default what the GPU has room for. ConfigError where vLLM is not installed or does not take the base.
    """

    def __init__(
        self,
        base: str,
        revision: str | None,
        precision: str,
        tokenizer: Any,
        max_batch: int = 64,
        max_adapters: int = 8,
        max_rank: int = 64,
        kv_tokens: int | None = None,
    ):
        if precision not in PRECISIONS:
            raise ConfigError(
                f'model.precision = {precision!r} is not served by vLLM here: set serve.engine = "hf", or one of {", ".join(PRECISIONS)}'
            )
        folder = model_folder(base, revision, weights=True)
        config = AutoConfig.from_pretrained(folder)
        if len(tokenizer) > (known := config.get_text_config().vocab_size):
            raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens and the base {base!r} embeds {known}: they do not belong together")
        with torch.device("meta"):
            self._linears = linears(AutoModelForCausalLM.from_config(config))
        self.tokenizer, self.ends = tokenizer, frozenset(end_of_turn_ids(tokenizer))
        self.max_adapters, self.max_rank = max_adapters, max_rank
        others = set(multiprocessing.active_children())
        self._llm = _started(
            model=str(folder),
            dtype=str(DTYPES[precision]).removeprefix("torch."),
            skip_tokenizer_init=True,
            generation_config="vllm",  # the request alone says how it is sampled
            max_model_len=-1,  # what the memory holds, up to what the model does
            max_num_seqs=max_batch,
            **(_of_adapters(max_adapters, max_rank) if max_adapters else {}),
            **(_of_cache(kv_tokens * kv_bytes(config.get_text_config(), DTYPES[precision].itemsize)) if kv_tokens else {}),
            disable_log_stats=True,
        )
        cores = [child for child in multiprocessing.active_children() if child not in others]
        self._guard = _guarded([core.pid for core in cores if core.pid])
        self.max_length: int = self._llm.model_config.max_model_len
        self._adapters: dict[str, _Adapter] = {}  # the least recently used first
        self._retired: set[_Adapter] = set()
        self._rows: dict[int, _Row] = {}
        self._numbers, self._names = count(), count(1)
        self._kept: list[Chunk] = []  # that came while a prompt was scored
        self._came: queue.SimpleQueue[Any] = queue.SimpleQueue()  # what vLLM gave, None to wake, or the error that ended it
        threading.Thread(target=self._receive, name="vllm", daemon=True).start()
        threading.Thread(target=self._watch, args=(cores,), name="vllm's life", daemon=True).start()

    # ---- adapters -------------------------------------------------------------------------------------------------------
    @property
    def adapters(self) -> list[str]:
        return list(self._adapters)

    def load(self, name: str, folder: Path, again: bool = False) -> str | None:
        if name in self._adapters and not again:
            return None
        fitted(name, folder, self._linears, self.max_rank, "meta")  # vLLM would leave out what it does not know
        gone = self._room()
        adapter = _Adapter(name, next(self._names), folder)
        try:
            self._llm.add_lora(_lora(adapter))
        except Exception as e:  # noqa: BLE001 (vLLM passes on what its process raised as a plain one)
            if self._llm.engine_core.resources.engine_dead:
                raise ServeError(f"vLLM's process has ended ({type(e).__name__}): see the server's log") from None
            raise ArtifactError(f"adapter {name!r} ({folder}) is not taken by vLLM: {str(e).strip().splitlines()[-1]}") from None
        if gone:
            self.unload(gone)
        self.unload(name)
        self._adapters[name] = adapter
        return gone if gone != name else None

    def _room(self) -> str | None:
        """Nothing, or the idle adapter that has to go for another one; SlotsBusy."""
        if len(self._adapters) + len(self._retired) < self.max_adapters:
            return None
        for name, adapter in self._adapters.items():
            if not adapter.users:
                return name
        raise SlotsBusy(f"all {self.max_adapters} adapters in memory are in use: try again soon, or set serve.max_adapters higher")

    def unload(self, name: str) -> None:
        if adapter := self._adapters.pop(name, None):
            adapter.retired = True
            self._retired.add(adapter)
            self._let_go(adapter)

    def _let_go(self, adapter: _Adapter | None) -> None:
        if adapter and adapter.retired and not adapter.users:
            self._retired.discard(adapter)
            self._llm.remove_lora(adapter.number)

    def scores(self, asked: Sequence[Scored], adapter: str | None = None) -> list[list[float]]:
        """Log-probabilities (nats) of each ids[first:], first ≥ 1, each given all before it; rows under way go on meanwhile."""
        requests = [Request(own.ids, 1, adapter=adapter, ends=(), whole=True, images=own.images) for own in asked]
        for number, request in enumerate(requests):
            self.check(number, request)
        rows = [self._rows[self.add(request, scored=True)] for request in requests]
        while any(row.scored is None for row in rows):
            self._kept += self._next()
        return [[row.scored[at][own.ids[at]].logprob for at in range(own.first, len(own.ids))] for row, own in zip(rows, asked, strict=True)]

    # ---- rows -----------------------------------------------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        return bool(self._rows or self._kept)

    def add(self, request: Request, scored: bool = False) -> int:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        number = next(self._numbers)
        self.check(number, request)
        adapter = self._adapters.pop(request.adapter) if request.adapter else None
        if adapter:
            self._adapters[adapter.name] = adapter  # now the most recently used
            adapter.users += 1
        ends = self.ends if request.ends is None else frozenset(request.ends)
        at_once = request.whole and not request.stop  # else each token is looked at as it comes
        params = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed % 2**63 if request.temperature else None,
            max_tokens=request.max_new_tokens,
            stop_token_ids=list(ends),
            ignore_eos=True,  # the row's ends say it
            logprobs=request.logprobs,
            prompt_logprobs=0 if scored else None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY if at_once else RequestOutputKind.DELTA,
            skip_clone=True,
        )
        self._rows[number] = _Row(request, Text(self.tokenizer, request.stop), ends, adapter, at_once)
        try:
            self._llm.add_request(str(number), tokens_input(request.prompt_ids), params, lora_request=adapter and _lora(adapter))
        except ValueError as e:
            self._over(number)
            raise DataError(f"request {number} is not taken by vLLM: {e}") from None
        return number

    def drop(self, row: int) -> None:
        if row in self._rows:
            self._llm.abort_request([str(row)])
            self._over(row)

    def step(self) -> list[Chunk]:
        """Waits for vLLM while rows are under way, or until wake()."""
        found, self._kept = self._kept, []
        return found or ([] if not self._rows and self._came.empty() else self._next())

    def wake(self) -> None:
        self._came.put(None)

    def close(self) -> None:
        self._llm.engine_core.shutdown()
        self._guard.kill()
        self._guard.wait()

    # ---- inside ---------------------------------------------------------------------------------------------------------
    def _receive(self) -> None:
        try:
            while True:
                self._came.put(self._llm.engine_core.get_output())
        except Exception as e:  # noqa: BLE001 (told to whoever waits, whatever it is)
            self._came.put(e)

    def _watch(self, cores: list[Any]) -> None:
        """Once a process of vLLM's is gone: vLLM itself then leaves whoever waits for its output, or for a call's answer, waiting for ever."""
        multiprocessing.connection.wait([core.sentinel for core in cores])
        client = self._llm.engine_core
        client.resources.engine_dead = True  # from here on no call is begun
        for call in list(client.utility_results.values()):
            with suppress(InvalidStateError):
                call.set_exception(ChildProcessError())
        self._came.put(ChildProcessError())

    def _next(self) -> list[Chunk]:
        """Wait for what comes next; the chunks of all that has come."""
        found: list[Chunk] = []
        given = self._came.get()
        while True:
            if isinstance(given, Exception):
                self._came.put(given)  # for whoever asks next
                raise ServeError(f"vLLM's process has ended ({type(given).__name__}): see the server's log")
            if given is not None:
                for out in self._llm.output_processor.process_outputs(given.outputs).request_outputs:
                    found += self._chunks(int(out.request_id), out)
            if self._came.empty():
                return found
            given = self._came.get()

    def _chunks(self, number: int, out: Any) -> list[Chunk]:
        row = self._rows.get(number)
        if row is None:
            return []
        if out.prompt_logprobs is not None:
            row.scored = out.prompt_logprobs
            self._over(number)
            return []
        (given,) = out.outputs
        if given.finish_reason not in (None, "stop", "length"):
            raise ServeError(f"vLLM gave a row up: {given.finish_reason}")
        own = list(given.token_ids)
        ended, stopped = given.finish_reason == "stop" and own[-1] in row.ends, False
        told = tuple(_told(row.request, token, probs) for token, probs in zip(own, given.logprobs, strict=True)) if given.logprobs else ()
        own = own[:-1] if ended else own
        if row.at_once:
            text = row.text.end(*own)
        else:
            text = ""
            for used, token in enumerate(own, 1):
                shown, stopped = row.text.push(token, bool(given.finish_reason) and not ended and used == len(own))
                text += shown
                if stopped:
                    own = own[:used]
                    break
            if ended and not stopped:
                text += row.text.end()
        if stopped:
            self.drop(number)
        elif given.finish_reason:
            self._over(number)
        return [Chunk(number, text, tuple(own), "stop" if stopped else given.finish_reason, told[: len(own)])]

    def _over(self, number: int) -> None:
        row = self._rows.pop(number)
        if row.adapter:
            row.adapter.users -= 1
            self._let_go(row.adapter)


def _of_adapters(most: int, max_rank: int) -> dict[str, Any]:
    """max_cpu_loras: one is read before another has to go."""
    return {"enable_lora": True, "max_loras": most, "max_cpu_loras": most + 1, "max_lora_rank": next(r for r in RANKS if r >= max_rank)}


def _of_cache(size: int) -> dict[str, Any]:
    """So many bytes and no share of the GPU, which others may use too; the share is looked at all the same before anything else."""
    return {"kv_cache_memory_bytes": size, "gpu_memory_utilization": 0.01}


def _lora(adapter: _Adapter) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"{adapter.name}#{adapter.number}", adapter.number, str(adapter.folder))


def _started(**settings: Any) -> Any:
    """An LLMEngine whose core is a process of its own, with the defaults of vLLM's own server."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork of a process that has threads may hang
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as e:
        raise ConfigError(
            f'serve.engine = "vllm", but vLLM cannot be imported ({e}): pip install \'graft[serve,vllm]\', or set serve.engine = "hf"'
        ) from None
    try:
        return LLMEngine.from_engine_args(EngineArgs(**settings), UsageContext.OPENAI_API_SERVER, enable_multiprocessing=True)
    except Exception as e:
        raise ConfigError(
            f"vLLM does not start with {settings['model']!r}: {str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__}"
        ) from e


def _guarded(pids: list[int]) -> subprocess.Popen[bytes]:
    """A shell that kills these processes once this one is gone: vLLM's would live on and hold the GPU."""
    return subprocess.Popen(["/bin/sh", "-c", GUARD, "guard", *map(str, pids)], stdin=subprocess.PIPE, start_new_session=True)


def _told(request: Request, token: int, probs: Any) -> Told:
    """Of vLLM's {token: Logprob}."""
    top = sorted(((t, p.logprob) for t, p in probs.items() if p.rank is not None and p.rank <= (request.logprobs or 0)), key=lambda pair: -pair[1])
    return Told(probs[token].logprob, tuple(top[: request.logprobs or 0]))
