"""The embedded endpoint: a small local server of the chat completions API that rewrites by grammar.

It is no language model: it finds the seed in the request, recognises its family in `grammar.toml` and answers with other
sentences of that family; a sentence of no family gets other wrappings. The answer is a function of the request alone.
It listens in a thread of the calling process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graft.core.calls import parse_answer
from graft.data import grammar
from graft.data.cluster import reachable_address

_WRAPPINGS = ("請問一下，{}", "不好意思，{}", "{}，謝謝", "想麻煩你，{}", "對了，{}", "你好，{}")


def rewrite(messages: list[dict[str, str]], sample: int) -> dict[str, Any]:
    """Rewrites of the seed that the last message ends with: {"rewrites": [{"user", "assistant"}, ...]}.

    Raises ValueError where the last line of the last message is no seed in JSON.
    """
    text = messages[-1]["content"].strip()
    seed = json.loads(text.splitlines()[-1])
    wanted = re.search(r"(\d+)\s*則", text)
    count = int(wanted[1]) if wanted else 4
    rng = random.Random(hashlib.sha256(f"{sample}\n{text}".encode()).digest())
    label = "call" if parse_answer(seed["assistant"], "generate_image", "prompt").kind == "call" else "text"
    family = grammar.recognise(seed["user"], label)
    if family is None:
        wrappings = rng.sample(_WRAPPINGS, min(count, len(_WRAPPINGS)))
        return {"rewrites": [{"user": w.format(seed["user"]), "assistant": seed["assistant"]} for w in wrappings]}
    return {"rewrites": [grammar.row(family, rng) for _ in range(count)]}


def complete(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(HTTP status, response) of one chat completion request; usage counts characters, the grammar has no tokens."""
    try:
        content = json.dumps(rewrite(body["messages"], body.get("seed") or 0), ensure_ascii=False)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as e:  # image parts too: a grammar sees nothing
        return 400, {
            "error": {
                "message": f"the embedded endpoint rewrites a seed given as JSON on the last line: {e!r}",
                "type": "invalid_request_error",
                "code": None,
            }
        }
    prompt = sum(len(m["content"]) for m in body["messages"])
    return 200, {
        "id": "chatcmpl-" + hashlib.sha256(content.encode()).hexdigest()[:24],
        "object": "chat.completion",
        "created": 0,
        "model": "graft-embedded-grammar",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": len(content), "total_tokens": prompt + len(content)},
    }


@contextmanager
def embedded_endpoint() -> Iterator[str]:
    """Serve on a free port of the loopback, or of this machine's address where callers may run on others; yields the base URL and stops on exit."""
    from aiohttp import web

    async def completions(request: web.Request) -> web.Response:
        status, answer = complete(await request.json())
        return web.json_response(answer, status=status)

    host, ready = reachable_address(), threading.Event()
    where: dict[str, Any] = {}

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", completions)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, host, 0).start()
        where.update(port=runner.addresses[0][1], loop=asyncio.get_running_loop(), stop=asyncio.Event())
        ready.set()
        await where["stop"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="embedded-endpoint", daemon=True)
    thread.start()
    ready.wait()
    try:
        yield f"http://{host}:{where['port']}/v1"
    finally:
        where["loop"].call_soon_threadsafe(where["stop"].set)
        thread.join(timeout=10)
