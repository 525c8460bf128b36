"""The last stage of a recipe: start the server, ask it one sentence as any client would, keep the reply, stop it.

An adapter that was trained on images is asked about the smallest of those that were published with it.
"""

from __future__ import annotations

import base64
import json
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from graft.core.errors import ConfigError, ServeError
from graft.core.stages import Job, Plan
from graft.core.store import IMAGE, AdapterStore
from graft.model.pixels import Unusable, shown
from graft.serve.app import Server, own_key, spec_of, start
from graft.serve.images import MAX_BYTES, MAX_PIXELS
from graft.serve.spec import ServeSpec


def run(job: Job) -> None:
    """Write reply.json: {model, prompt, image, reply, path, seconds, first_token_s}. About 20 s on two cores."""
    recipe, image, spec = job.recipe, published_image(job.plan.artifact("sft").path), spec_of(job.plan)
    with job.writing() as draft, start(spec) as server:
        reply = ask(server.url, spec.own, recipe.serve.prompt, recipe.evaluate.max_new_tokens, recipe.serve.system, image)
        (draft.path / "reply.json").write_text(json.dumps(reply, ensure_ascii=False, indent=1), encoding="utf-8")
        draft.counts |= {
            "model": reply["model"],
            "reply": reply["reply"],
            "first_token_s": reply["first_token_s"],
            "start_s": round(server.start_s, 3),
        }


def published_image(adapter: Path) -> Path | None:
    """The smallest of an adapter's images; None where it has none, or a server would not take it."""
    for file in sorted((f for f in adapter.iterdir() if IMAGE.fullmatch(f.name)), key=lambda f: f.stat().st_size):
        with suppress(Unusable):
            shown(file.read_bytes(), MAX_PIXELS)
            return file if file.stat().st_size <= MAX_BYTES else None
    return None


def ask(url: str, model: str, prompt: str, max_tokens: int, system: str | None = None, image: Path | None = None) -> dict[str, Any]:
    """One greedy question through the openai client, streamed and whole; ServeError where the two replies differ. image: shown before it."""
    import openai

    key = own_key() or "none"
    content: Any = prompt
    if image:
        data = f"data:image/{image.suffix[1:]};base64,{base64.b64encode(image.read_bytes()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": prompt}]
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": content}]
    question: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    with openai.DefaultHttpxClient(trust_env=False) as direct, openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=direct) as client:
        try:
            began, first, streamed = time.monotonic(), None, ""
            for event in client.chat.completions.create(**question, stream=True):
                if event.choices and event.choices[0].delta.content:
                    first = first or time.monotonic() - began
                    streamed += event.choices[0].delta.content
            began = time.monotonic()
            whole = client.chat.completions.create(**question).choices[0].message.content
            seconds = time.monotonic() - began
        except openai.APIError as e:
            raise ServeError(f"the server at {url} did not answer the question of serve.prompt: {e}") from None
    if streamed != whole:
        raise ServeError(f"the server at {url} streams {streamed!r}, but answers {whole!r} when it does not stream")
    return {
        "model": model,
        "prompt": prompt,
        "image": image and image.name,
        "reply": whole,
        "path": "/v1/chat/completions",
        "seconds": round(seconds, 4),
        "first_token_s": first and round(first, 4),  # None where the reply is empty
    }


def serve_forever(plan: Plan, port: int | None = None, override: str | None = None) -> None:
    """Serve a finished recipe, say where, and stop on SIGINT or SIGTERM. override: why its adapter may answer although the gate refuses it."""
    spec = spec_of(plan, port)
    if override is not None:
        overridden(spec, override)
    with start(spec) as server:
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # for good: a second Ctrl-C must not cut the stopping short
            signal.signal(number, lambda *_: ended.set())
        print("\n".join([*where(server, plan.recipe.name), *other_than(spec, plan.recipe.name), "Ctrl-C stops it"]), flush=True)
        ended.wait()
        print("stopping", flush=True)


def overridden(spec: ServeSpec, why: str) -> None:
    """Leave beside the recipe's own adapter what /admin/load leaves with an override; every server of the store follows it. ConfigError."""
    if spec.store is None or not why.strip():
        raise ConfigError("--override says why an adapter may answer although it is refused: " + ("give a reason" if spec.store else "here is none"))
    AdapterStore(Path(spec.store)).note(spec.own, override=why, withdrawn=None)


def where(server: Server, model: str) -> list[str]:
    """What a user needs to know of a running server, a line each."""
    lines = [f"API        {server.url}/v1  (model {model!r})", f"chat page  {server.url}/"]
    if server.dashboard_url:
        lines.append(f"dashboard  {server.dashboard_url}  (asks for the token in ~/.ray/auth_token)")
    return lines


def other_than(spec: ServeSpec, name: str) -> list[str]:
    """A line where the recipe's name does not answer as what the recipe made: it stays where it was put, by a person or by a later run."""
    if spec.store is None or (stands := AdapterStore(Path(spec.store)).names().get(name)) == spec.own:
        return []
    given = json.dumps({"alias": name, "model": spec.own})
    return [f"{name} answers as {stands}, not as this recipe's {spec.own}: POST /admin/alias {given} changes that"]
