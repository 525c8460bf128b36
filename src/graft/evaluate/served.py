"""`graft evaluate RECIPE --server URL`: the evaluation again, asked of a running server as any client asks it, beside the one that was made offline."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from graft.core.calls import parse_answer
from graft.core.errors import ConfigError, ServeError
from graft.core.rows import read_jsonl
from graft.core.stages import Plan
from graft.core.store import AdapterStore
from graft.evaluate.classify import score

AT_ONCE = 16  # requests


def compare(plan: Plan, url: str) -> tuple[list[str], bool]:
    """(lines to print, whether every answer is the offline one). ServeError where the server does not answer."""
    recipe = plan.recipe
    if not recipe.learns_calls:
        raise ConfigError(f"--server compares calls and texts, and {recipe.name!r} makes no rows of them: leave it out")
    made = plan.artifact("evaluate")
    offline = list(read_jsonl(made.path / "predictions.jsonl"))
    rows = list(read_jsonl(plan.artifact("prepare").path / "rows" / "test.jsonl"))
    # by its version: the name may stand for another run's
    own = AdapterStore(plan.served).publish(recipe.name, plan.artifact("sft")).id if plan.trained()[2] else recipe.name
    found = asyncio.run(answers(url, own, [row["messages"][:-1] for row in rows], recipe.evaluate.max_new_tokens))
    predicted: list[str] = [parse_answer(text, recipe.task.function, recipe.task.argument).kind for text in found]
    served = score([row["label"] for row in rows], predicted)
    before = score([p["label"] for p in offline], [p["predicted"] for p in offline])
    differing = [(p, text) for p, text in zip(offline, found, strict=True) if p["answer"] != text]
    lines = [
        f"served   F1 {served['strict']['f1']:.4f}, accuracy {served['accuracy']:.4f}, of {len(rows)} rows asked at {url}",
        f"offline  F1 {before['strict']['f1']:.4f}, accuracy {before['accuracy']:.4f}",
        f"{len(rows) - len(differing)} of {len(rows)} answers are equal to the letter",
    ]
    lines += [f"row {p['id']}: served {text[:80]!r}, offline {p['answer'][:80]!r}" for p, text in differing[:5]]
    return lines, not differing


async def answers(url: str, model: str, conversations: list[Any], max_tokens: int) -> list[str]:
    """Greedy answers of a server, in order."""
    import openai

    key = os.environ.get("GRAFT_API_KEY", "").split(",")[0].strip() or "none"
    slots = asyncio.Semaphore(AT_ONCE)
    async with (
        openai.DefaultAsyncHttpxClient(trust_env=False) as direct,
        openai.AsyncOpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=key, http_client=direct) as client,
    ):

        async def one(messages: Any) -> str:
            async with slots:
                reply = await client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, temperature=0)
                return reply.choices[0].message.content or ""

        try:
            return await asyncio.gather(*map(one, conversations))
        except openai.APIError as e:
            raise ServeError(f"the server at {url} did not answer: {e}") from None
