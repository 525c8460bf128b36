"""Records with images to conversations: a column of images with `<image>` where each stands, or images among the parts of a message.

Both as ms-swift, LLaMA-Factory, TRL and OpenAI write them. Images that no marker places stand before the first question, as in ms-swift.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from graft.core.rows import AN_IMAGE
from graft.core.sections import Mcq
from graft.data.readers.layouts import to_messages
from graft.data.readers.mcq import Refused
from graft.model.chat import Messages

_MARK, _OF_PARTS = re.compile(f"<image>|{AN_IMAGE}"), re.compile(AN_IMAGE)


def to_messages_and_images(value: dict[str, Any], layout: str, mcq: Mcq, answered: bool = True) -> tuple[Messages | None, list[Any], str]:
    """(messages whose contents hold AN_IMAGE for each image, the images in that order, "") or (None, [], reason).

    answered: as for `to_messages`. An image is as the record names it: a path, or {"path", "bytes"}. The reasons are those of `to_messages`, and what
    is wrong with the images.
    """
    column = value.get("images") or value.get("image") or ([] if "images" in value or "image" in value else None)
    column = column if column is None or isinstance(column, list) else [column]
    inline: list[Any] = []  # of the parts; None: the column's next
    try:
        plain = {key: [_marked(m, inline) for m in v] if _is_list_of_parts(v) else v for key, v in value.items() if key not in ("images", "image")}
        messages, reason = to_messages(plain, layout, mcq, answered)
        if messages is None:
            return None, [], reason
        return messages, _placed(messages, column, inline), ""
    except Refused as e:
        return None, [], str(e)


def with_parts(messages: Messages, images: list[dict[str, Any]]) -> Messages:
    """Messages whose contents hold AN_IMAGE, as messages of parts; a content without stays a text."""
    following = iter(images)
    return [{**m, "content": list(_parts(m["content"], following)) if AN_IMAGE in m["content"] else m["content"]} for m in messages]


def _parts(content: str, images: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for n, text in enumerate(content.split(AN_IMAGE)):
        if n:
            yield {"type": "image", **next(images)}
        if text:
            yield {"type": "text", "text": text}


def _is_list_of_parts(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(m, dict) and isinstance(m.get("content"), list) for m in value)


def _marked(message: Any, inline: list[Any]) -> Any:
    """The message with its parts as one text, AN_IMAGE for an image, which is appended to `inline`."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url"):
            found = part.get(kind)
            inline.append(found.get("url") if kind == "image_url" and isinstance(found, dict) else found)
            texts.append(AN_IMAGE)
        elif isinstance(part, dict) and isinstance(part.get("text"), str) and kind in (None, "text"):
            texts.append(part["text"])
        else:
            raise Refused("a part of a message is neither text nor image")
    return {**message, "content": "".join(texts)}


def _placed(messages: Messages, column: list[Any] | None, inline: list[Any]) -> list[Any]:
    """Make every marker AN_IMAGE; the images in the order they are shown. Without a column, `<image>` is a text like any other."""
    mark = _OF_PARTS if column is None else _MARK
    column = column or []
    if sum(m["content"].count(AN_IMAGE) for m in messages) != len(inline):
        raise Refused("a message holds U+FFFC, which stands for an image")
    if any(mark.search(m["content"]) for m in messages if m["role"] != "user"):
        raise Refused("an image that is not the user's")
    wanted = sum(len(mark.findall(m["content"])) for m in messages) - sum(image is not None for image in inline)
    if wanted > len(column):
        raise Refused(f"{wanted} images are to be shown and {len(column)} are given")
    first = next(m for m in messages if m["role"] == "user")
    first["content"] = "<image>" * (len(column) - wanted) + first["content"]
    own, given, found = iter(inline), iter(column), []
    for message in messages:
        for marker in mark.findall(message["content"]):
            image = next(own) if marker == AN_IMAGE else None
            found.append(next(given) if image is None else image)
        message["content"] = mark.sub(AN_IMAGE, message["content"])
    return found
