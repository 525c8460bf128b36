"""From an engine's chunks to the bodies and events of OpenAI's chat completions and completions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from graft.core.errors import ServeError
from graft.engine.protocol import Chunk
from graft.serve.pieces import Places, key, token_bytes
from graft.serve.requests import ApiError
from graft.serve.runner import Ticket

BURST_S = 0.025  # streamed tokens of this long go out together


@dataclass(frozen=True)
class Reply:
    """What a request is answered with: its choices' tickets, and how they are written."""

    head: dict[str, Any]  # id, created, model, system_fingerprint
    tickets: Sequence[Ticket]
    chat: bool
    logprobs: bool
    tokenizer: Any

    async def whole(self) -> dict[str, Any]:
        chunks = await asyncio.gather(*map(_all, self.tickets))
        choices = []
        for index, own in enumerate(chunks):
            text = "".join(c.text for c in own)
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": self._logprobs(own, Places()), "finish_reason": own[-1].finish_reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self._usage(sum(len(c.tokens) for own in chunks for c in own))}

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events: the role, the text as it comes, the finish reason, the usage if asked for, [DONE]."""

        def event(choice: dict[str, Any] | None, usage: dict[str, int] | None = None) -> str:
            data = {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion", "choices": [choice] if choice else []}
            return f"data: {json.dumps(data | ({'usage': usage} if include_usage else {}), ensure_ascii=False)}\n\n"

        def choice(index: int, delta: dict[str, str], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            said: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
            return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

        tokens = 0
        if self.chat:
            for index in range(len(self.tickets)):
                yield event(choice(index, {"role": "assistant", "content": ""}))
        places = [Places() for _ in self.tickets]
        try:
            async with aclosing(_merged(self.tickets)) as bursts:
                async for index, burst in bursts:
                    tokens += sum(len(c.tokens) for c in burst)
                    text, reason = "".join(c.text for c in burst), burst[-1].finish_reason
                    logprobs = self._logprobs(burst, places[index])
                    if text or (logprobs and logprobs["content" if self.chat else "tokens"]):
                        yield event(choice(index, {"content": text}, None, logprobs))
                    if reason:
                        yield event(choice(index, {}, reason))
        except ServeError as e:  # the status went out long ago: the error goes into the stream, where clients look for it
            yield f"data: {json.dumps(ApiError(500, str(e)).body)}\n\n"
            return
        if include_usage:
            yield event(None, self._usage(tokens))
        yield "data: [DONE]\n\n"

    def _usage(self, completion: int) -> dict[str, int]:
        prompt = len(self.tickets[0].request.prompt_ids)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _logprobs(self, chunks: list[Chunk], places: Places) -> Any:
        if not self.logprobs:
            return None
        told = [pair for c in chunks for pair in zip(c.tokens, c.told, strict=True)]
        if self.chat:
            content = [{**self._token(token, of.logprob), "top_logprobs": [self._token(t, p) for t, p in of.top]} for token, of in told]
            return {"content": content, "refusal": None}
        pieces = [token_bytes(self.tokenizer, token) for token, _ in told]
        tops = [{key(token_bytes(self.tokenizer, t)): p for t, p in reversed(of.top)} for _, of in told]  # of equal texts the likeliest stays
        starts = [places.next(piece) for piece in pieces]
        return {"tokens": [*map(key, pieces)], "token_logprobs": [of.logprob for _, of in told], "top_logprobs": tops, "text_offset": starts}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        piece = token_bytes(self.tokenizer, token)
        return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}


async def _all(ticket: Ticket) -> list[Chunk]:
    async with aclosing(ticket.bursts()) as bursts:
        return [chunk async for burst in bursts for chunk in burst]


async def _merged(tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[int, list[Chunk]], None]:
    """(index, burst) of all tickets as they come."""
    if len(tickets) == 1:
        async with aclosing(tickets[0].bursts(BURST_S)) as bursts:
            async for burst in bursts:
                yield 0, burst
        return
    queue: asyncio.Queue[tuple[int, list[Chunk] | ServeError]] = asyncio.Queue()

    async def read(index: int, ticket: Ticket) -> None:
        try:
            async with aclosing(ticket.bursts(BURST_S)) as bursts:
                async for burst in bursts:
                    queue.put_nowait((index, burst))
        except ServeError as e:
            queue.put_nowait((index, e))

    readers = [asyncio.create_task(read(i, t)) for i, t in enumerate(tickets)]
    try:
        left = len(tickets)
        while left:
            index, found = await queue.get()
            if isinstance(found, ServeError):
                raise found
            yield index, found
            left -= found[-1].finish_reason is not None
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
