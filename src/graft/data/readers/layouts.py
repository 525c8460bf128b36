"""Records to texts and conversations: which layout they have, and one record at a time to messages, or to the reason why not.

The chat layouts are those of OpenAI (`messages`; TRL's `prompt` and `completion` pass as such too), ShareGPT
(`conversations`) and Alpaca as LLaMA-Factory documents them (https://llamafactory.readthedocs.io/en/latest/getting_started/data_preparation.html),
ms-swift (`query`, `response`, `history`; https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html), and `question` with `answer`, as GSM8K has them.
Reasons never hold the record's content, so they can be counted. 140,000 chats a second and core, 60,000 with options.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from graft.core.errors import ConfigError
from graft.core.rows import is_unicode, wrong_roles
from graft.core.sections import Corpus, Mcq
from graft.data.readers import mcq as reading_comprehension
from graft.data.readers.mcq import Refused, text_of
from graft.model.chat import Messages

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_TOOLS = {"tool", "tools", "function", "function_call", "function_response", "observation", "tool_call", "tool_response"}
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_REASONING = ("reasoning_content", "reasoning", "thinking")  # beside the content, as servers of reasoning models write them
_EXCERPT = 200  # characters


def layout_of(corpus: Corpus, values: list[dict[str, Any]], answered: bool = True) -> str:
    """The corpus's layout: the recipe's, or the one detected by `values`, its first records. The templates of mcq are tried.

    answered: whether its records must have the keys of an answer. Raises ConfigError in one line.
    """
    layout = detect(values, corpus.text, corpus.mcq, answered) if corpus.layout == "auto" else corpus.layout
    if layout == "mcq":
        reading_comprehension.check(corpus.mcq)
    return layout


def detect(values: list[dict[str, Any]], text: str = "text", mcq: Mcq = Mcq(), answered: bool = True) -> str:
    """The layout that fits more than half of the records, by their keys that are not null, else by all keys.

    A record that fits several counts for the first of: mcq, messages, sharegpt, ms-swift, alpaca, qa, text.
    Raises ConfigError that names the keys seen.
    """
    if not values:
        raise ConfigError("no layout can be detected: none of the first records can be read; mend the files, or force one with layout")
    signatures = _signatures(text, mcq) if answered else _unanswered(text, mcq)
    for with_null in (False, True):
        keys = [{k for k, v in value.items() if with_null or v is not None} for value in values]
        votes = Counter(next((name for name, need in signatures if need <= k), "") for k in keys)
        layout, count = votes.most_common(1)[0]
        if layout and 2 * count > len(values):
            return layout
    seen = ", ".join(map(repr, dict.fromkeys(k for value in values for k in value)))
    raise ConfigError(
        f"no layout fits records with the keys {seen[:300] or 'none'}: name the text's key with text, or force a layout: "
        f"{', '.join(dict.fromkeys(name for name, _ in signatures))}"
    )


def _signatures(text: str, mcq: Mcq) -> list[tuple[str, set[str]]]:
    return [
        ("mcq", {mcq.article, mcq.question, *mcq.options, mcq.answer}),
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("ms-swift", {"conversation"}),
        ("ms-swift", {"query", "response"}),
        ("alpaca", {"instruction", "output"}),
        ("messages", {"prompt", "completion"}),
        ("qa", {"question", "answer"}),
        ("text", {text}),
    ]


def _unanswered(text: str, mcq: Mcq) -> list[tuple[str, set[str]]]:
    """The same without the keys of the answers."""
    answers = {mcq.answer, "response", "output", "completion", "answer"} - {mcq.article, mcq.question, *mcq.options, text}
    return [(layout, need - answers) for layout, need in _signatures(text, mcq)]


def to_text(value: dict[str, Any], key: str) -> tuple[str, str]:
    """(text, "") of a record of layout `text`, or ("", the reason)."""
    try:
        return text_of(value, key), ""
    except Refused as e:
        return "", str(e)


def to_messages(value: dict[str, Any], layout: str, mcq: Mcq, answered: bool = True) -> tuple[Messages | None, str]:
    """(messages, "") or (None, reason): an optional system message, then user and assistant in turn, none of them empty.

    answered: else nothing is learned of it: a record may lack its last answer, and the messages end with the user's, those of mcq always. Tool calls
    and images are refused, and of what is learned reasoning beside an answer and turns marked as not to be trained, as leaving them out would change it.
    """
    try:
        messages = _CONVERSIONS[layout](value, mcq, answered)
    except Refused as e:
        return None, str(e)
    if ("images" in value or "image" in value) and any("<image>" in m["content"] for m in messages):
        return None, "<image> in a text, and no image beside"
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        del messages[0]  # as exports write a conversation without one
    open_end: Messages = []
    if not answered:
        if messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
            del messages[-1]
        open_end = [{"role": "assistant", "content": "?"}] if messages and messages[-1]["role"] == "user" else []
    if wrong := wrong_roles([*messages, *open_end]):
        return None, "empty message" if wrong.endswith("is empty") else "unbalanced roles"
    if not is_unicode("".join([m["content"] for m in messages])):
        return None, "lone surrogate"
    return messages, ""


def excerpt(value: dict[str, Any]) -> str:
    """The first 200 characters of a record as JSON, of its keys where it is nested too deep, for one that is refused."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)[:_EXCERPT]
    except RecursionError:  # it is nested deeper than Python writes, though it could be read
        return json.dumps(list(value), ensure_ascii=False)[:_EXCERPT]


# ---- the layouts -----------------------------------------------------------------------------------------------------
def _openai(value: dict[str, Any], mcq: Mcq, answered: bool) -> Messages:
    if "messages" not in value and "prompt" in value:
        return _prompt_and_completion(value, answered)
    return _conversation(value, "messages", answered)


def _sharegpt(value: dict[str, Any], mcq: Mcq, answered: bool) -> Messages:
    return _conversation(value, "conversations", answered)


def _alpaca(value: dict[str, Any], mcq: Mcq, answered: bool) -> Messages:
    _no_media_or_tools(value)
    asked = [_optional(value, "instruction"), _optional(value, "input")]
    return _turns(value, "\n".join(filter(None, asked)), "output", answered)


def _ms_swift(value: dict[str, Any], mcq: Mcq, answered: bool) -> Messages:
    if "messages" in value:
        return _conversation(value, "messages", answered)
    _no_media_or_tools(value)
    if "query" in value or "response" in value:
        return _turns(value, text_of(value, "query"), "response", answered)
    messages = _system(value)
    for pair in _list_of(value, "conversation"):
        if not isinstance(pair, dict):
            raise Refused("a message is no object")
        messages += [{"role": "user", "content": text_of(pair, "human")}, {"role": "assistant", "content": text_of(pair, "assistant")}]
    return messages


def _mcq(value: dict[str, Any], mcq: Mcq, answered: bool) -> Messages:
    _no_media_or_tools(value)
    if not answered:
        return [{"role": "user", "content": reading_comprehension.asked(value, mcq)[0]}]
    prompt, reply = reading_comprehension.render(value, mcq)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def _qa(value: dict[str, Any], mcq: Mcq, answered: bool) -> Messages:
    _no_media_or_tools(value)
    return _turns(value, text_of(value, "question"), "answer", answered)


_CONVERSIONS: dict[str, Callable[[dict[str, Any], Mcq, bool], Messages]] = {
    "messages": _openai,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "ms-swift": _ms_swift,
    "mcq": _mcq,
    "qa": _qa,
}


def _conversation(value: dict[str, Any], key: str, answered: bool) -> Messages:
    """A list of {role, content} or {from, value}, behind a system column where there is one."""
    _no_media_or_tools(value)
    return _system(value) + [_message(m, answered) for m in _list_of(value, key)]


def _prompt_and_completion(value: dict[str, Any], answered: bool) -> Messages:
    """Two texts, or two lists of messages: https://huggingface.co/docs/trl/dataset_formats."""
    _no_media_or_tools(value)
    if isinstance(value["prompt"], list):
        completion = _list_of(value, "completion") if answered or value.get("completion") else ()
        return [_message(m, answered) for m in (*_list_of(value, "prompt"), *completion)]
    return _turns(value, text_of(value, "prompt"), "completion", answered)


def _turns(value: dict[str, Any], asked: str, answer: str, answered: bool) -> Messages:
    """The system column, the pairs of the history, and the last turn, whose reply lies under the key `answer`."""
    messages = _system(value)
    for pair in _list_of(value, "history") if value.get("history") else ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Refused('"history" is no list of pairs')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": asked})
    if answered or (isinstance(reply := value.get(answer), str) and reply.strip()):
        messages.append({"role": "assistant", "content": text_of(value, answer)})
    return messages


def _system(value: dict[str, Any]) -> Messages:
    content = _optional(value, "system")
    return [{"role": "system", "content": content}] if content.strip() else []


def _message(message: Any, learned: bool) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Refused("a message is no object")
    name = message.get("role", message.get("from"))
    if (isinstance(name, str) and name in _TOOLS) or message.get("tool_calls") or message.get("function_call"):
        raise Refused("tool calls")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Refused("unknown role")
    if any(message.get(key) for key in _MEDIA):
        raise Refused("images, audio or video")
    if learned and role == "assistant" and any(message.get(key, 1) in (0, False) for key in ("train", "weight", "loss")):
        raise Refused("a turn that is not to be trained")
    if learned and any(str(message.get(key) or "").strip() for key in _REASONING):
        raise Refused("reasoning beside the answer")
    return {"role": role, "content": _content(message.get("content", message.get("value")))}


def _content(content: Any) -> str:
    """A text, or a list of text parts."""
    if isinstance(content, str):
        return content
    if content is None:
        raise Refused("empty message")
    parts = content if isinstance(content, list) else [None]
    if any(isinstance(part, dict) and part.get("type") not in (None, "text") for part in parts):
        raise Refused("images, audio or video")
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Refused("a message is no text")
    return "".join(map(str, texts))


def _no_media_or_tools(value: dict[str, Any]) -> None:
    if any(value.get(key) for key in _MEDIA):
        raise Refused("images, audio or video")
    if value.get("tools") not in (None, "", "[]", []):
        raise Refused("tool calls")


def _list_of(value: dict[str, Any], key: str) -> Iterable[Any]:
    found = value.get(key)
    if found is None:
        raise Refused(f'"{key}" is null' if key in value else f'no "{key}"')
    if not isinstance(found, list):
        raise Refused(f'"{key}" is no list')
    return found


def _optional(value: dict[str, Any], key: str) -> str:
    found = value.get(key)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise Refused(f'"{key}" is no text')
    return found
