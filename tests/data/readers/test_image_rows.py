import pytest

from graft.core.rows import AN_IMAGE
from graft.core.sections import Mcq
from graft.data.readers.image_rows import to_messages_and_images, with_parts


def user(content):
    return {"role": "user", "content": content}


def read(value, layout="messages"):
    """(contents, images) or the reason."""
    messages, images, reason = to_messages_and_images(value, layout, Mcq())
    return reason or ([m["content"] for m in messages], images)


ANSWER = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("value", "layout", "wanted"),
    [
        ({"messages": [user("<image>a<image>b"), ANSWER], "images": ["1", "2"]}, "messages", ([f"{AN_IMAGE}a{AN_IMAGE}b", "x"], ["1", "2"])),
        ({"messages": [user("a"), ANSWER], "images": ["1", "2"]}, "messages", ([f"{AN_IMAGE}{AN_IMAGE}a", "x"], ["1", "2"])),
        ({"messages": [user("a<image>"), ANSWER], "images": "1"}, "messages", ([f"a{AN_IMAGE}", "x"], ["1"])),
        ({"query": "<image>q", "response": "x", "images": ["1"]}, "ms-swift", ([f"{AN_IMAGE}q", "x"], ["1"])),
        ({"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "x"}], "image": "1"}, "sharegpt", ([f"{AN_IMAGE}q", "x"], ["1"])),
        ({"messages": [user([{"type": "image"}, {"type": "text", "text": "a"}]), ANSWER], "images": [{"bytes": b"1", "path": None}]}, "messages",
         ([f"{AN_IMAGE}a", "x"], [{"bytes": b"1", "path": None}])),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "1"}}]), ANSWER]}, "messages", ([AN_IMAGE, "x"], ["1"])),
        ({"messages": [user([{"type": "text", "text": "the tag <image>"}, {"type": "image", "image": "1"}]), ANSWER]}, "messages",
         ([f"the tag <image>{AN_IMAGE}", "x"], ["1"])),
        ({"messages": [user("what does <image> do in HTML?"), ANSWER]}, "messages", (["what does <image> do in HTML?", "x"], [])),
    ],
)  # fmt: skip
def test_images_stand_where_the_record_places_them(value, layout, wanted):
    assert read(value, layout) == wanted


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"messages": [user("<image><image>"), ANSWER], "images": ["1"]}, "2 images are to be shown and 1 are given"),
        ({"messages": [user("<image>a"), ANSWER], "images": []}, "1 images are to be shown and 0 are given"),
        ({"messages": [user("<image>a"), ANSWER], "image": None}, "1 images are to be shown and 0 are given"),
        ({"messages": [{**user("a"), "images": ["1"]}, ANSWER]}, "images, audio or video"),
        ({"messages": [user([{"type": "image"}]), ANSWER]}, "1 images are to be shown and 0 are given"),
        ({"messages": [user("a"), {"role": "assistant", "content": "<image>"}], "images": ["1"]}, "an image that is not the user's"),
        ({"messages": [user(f"a{AN_IMAGE}"), ANSWER]}, "a message holds U+FFFC, which stands for an image"),
        ({"messages": [user([{"type": "video", "video": "v"}]), ANSWER]}, "a part of a message is neither text nor image"),
        ({"messages": [user("a"), ANSWER], "videos": ["v"]}, "images, audio or video"),
        ({"messages": [user("a")], "images": ["1"]}, "unbalanced roles"),
    ],
)
def test_what_cannot_be_shown_surely_is_refused(value, reason):
    assert read(value) == reason


def test_parts_are_cut_at_the_images():
    found = with_parts([user(f"a{AN_IMAGE}{AN_IMAGE}b"), ANSWER], [{"file": "1"}, {"file": "2"}])
    text, image = {"type": "text"}, {"type": "image"}
    assert found == [user([text | {"text": "a"}, image | {"file": "1"}, image | {"file": "2"}, text | {"text": "b"}]), ANSWER]
