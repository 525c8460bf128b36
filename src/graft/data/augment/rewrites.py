"""What is asked of the API for one row, and which of the rewrites that come back are well-formed. No state, about 50 us an answer."""

from __future__ import annotations

import json
from typing import Any

from graft.core.calls import parse_answer
from graft.core.recipe import Recipe
from graft.core.rows import Row
from graft.data.api.request import Answer, Request
from graft.data.augment.answers import read, structured
from graft.data.augment.language import wrong_language

SYSTEM = "你是訓練資料的撰寫人，使用台灣的繁體中文。只輸出 JSON，不要解釋。"
INSTRUCTION = (
    "請把最後一行的對話改寫成 {n} 則新的對話：意圖要相同，說法、主題和語氣要不同。"
    "回答如果是 call(...)，改寫後也要是同一種呼叫，參數配合新的句子；回答如果是文字，改寫後也要是文字。\n"
    '輸出格式：{{"rewrites": [{{"user": "…", "assistant": "…"}}]}}\n{seed}'
)
_REWRITE = {
    "type": "object",
    "properties": {"user": {"type": "string"}, "assistant": {"type": "string"}},
    "required": ["user", "assistant"],
    "additionalProperties": False,
}
_ASKED = {
    "type": "object",
    "properties": {"rewrites": {"type": "array", "items": _REWRITE}},
    "required": ["rewrites"],
    "additionalProperties": False,
}
# what is demanded of an answer: less than was asked for, so that one bad rewrite spoils no other
_DEMANDED = {"type": "object", "properties": {"rewrites": {"type": "array"}}, "required": ["rewrites"]}
_FORMATS = {"json_schema": structured(_ASKED, "rewrites"), "json_object": {"type": "json_object"}, "none": None}


def request(recipe: Recipe, parent: Row, sample: int) -> Request:
    """Ask for rewrites of `parent`; another `sample` asks the same words for another answer."""
    a, api = recipe.augmentation, recipe.api
    user, assistant = (m["content"] for m in parent["messages"][-2:])
    seed = json.dumps({"user": user, "assistant": assistant}, ensure_ascii=False)
    body: dict[str, Any] = {
        "model": api.model,
        "temperature": a.temperature,
        "seed": recipe.seed * 1_000_000 + sample,
        api.output_limit: api.max_output_tokens,
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": INSTRUCTION.format(n=a.rewrites_per_call, seed=seed)}],
    }
    if api.service_tier:
        body["service_tier"] = api.service_tier
    if _FORMATS[api.response_format]:
        body["response_format"] = _FORMATS[api.response_format]
    return Request(body)


def rewrites_of(answer: Answer) -> list[tuple[Row, str | None]]:
    """(text, why it cannot be used) of each rewrite; at least one, so that an answer without any is seen too.

    text: {"user", "assistant"}, stripped, where both are strings; else {"text": what there is}, or {}.
    """
    if answer.response is None:
        return [({}, f"failed: {answer.error}")]
    value, reason = read(answer.response, _DEMANDED)
    if reason or not value["rewrites"]:
        return [(_raw(answer.response), reason or "malformed: no rewrites")]
    return [_text(rewrite) for rewrite in value["rewrites"]]


def unfit(recipe: Recipe, user: str, assistant: str, label: str) -> str | None:
    """Why a rewrite cannot stand beside its parent: its kind, length or language; None where it can."""
    a, task = recipe.augmentation, recipe.task
    answer = parse_answer(assistant, task.function, task.argument)
    if answer.kind != label:
        return f"wrong kind: the answer is {answer.kind}, its seed's is {label}"
    chars = len(user) + len(assistant)
    if not a.min_chars <= chars <= a.max_chars:
        return f"wrong length: {chars} characters, augment has {a.min_chars} to {a.max_chars}"
    said = " ".join(map(str, answer.arguments.values())) if answer.arguments else assistant
    wrong = wrong_language(f"{user}\n{said}", a.language)
    return f"wrong language: {wrong}" if wrong else None


def _text(rewrite: Any) -> tuple[Row, str | None]:
    user, assistant = (rewrite.get(k) for k in ("user", "assistant")) if isinstance(rewrite, dict) else (None, None)
    if not isinstance(user, str) or not isinstance(assistant, str):
        return {"text": json.dumps(rewrite, ensure_ascii=False)}, "malformed: user or assistant is no text"
    text = {"user": user.strip(), "assistant": assistant.strip()}
    return text, None if all(text.values()) else "malformed: user or assistant is empty"


def _raw(response: dict[str, Any]) -> Row:
    try:
        content = response["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return {}
    return {"text": content} if isinstance(content, str) else {}
