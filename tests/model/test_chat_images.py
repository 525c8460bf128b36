"""Messages with images, by Qwen2.5-VL's own template: ids and masks are the template's, each image as many tokens as it is told."""

import pytest

from graft.core.errors import ConfigError, DataError
from graft.model.chat import IMAGE, WITH_IMAGES, render

from . import real

PICTURE = {"type": "image", "file": "a.png", "width": 1, "height": 1}
ANSWER = {"role": "assistant", "content": "一個長條圖。"}


def words(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": list(parts)}


CHATS = {
    "one": [user(PICTURE, words("What is drawn?")), ANSWER],
    "two with a system message": [{"role": "system", "content": "JSON."}, user(PICTURE, words(" 這張和 "), PICTURE, words("\n比較")), ANSWER],
    "turns": [user(words("Look: "), PICTURE), ANSWER, {"role": "user", "content": "and now?"}, {"role": "assistant", "content": " so \n"}],
    "an image alone": [user(PICTURE), ANSWER],
}


def shrunk(tokenizer, rendered):
    """ids and mask with each run of image tokens as one."""
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    keep = [i != image or i != before for i, before in zip(rendered.ids, [None, *rendered.ids], strict=False)]
    return [[x for x, k in zip(xs, keep, strict=True) if k] for xs in (rendered.ids, rendered.loss_mask)]


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "ours"])
def test_ids_are_the_templates_own_and_images_take_their_tokens(name, kind):
    t, messages = real.tokenizer("qwen2_5_vl"), CHATS[kind]
    if name == "ours":
        t = real.with_template(t, WITH_IMAGES)
    counts = [7, 2][: sum(p is PICTURE for m in messages if isinstance(m["content"], list) for p in m["content"])]
    rendered = render(t, messages, counts)
    ids, mask = shrunk(t, rendered)
    assert ids == t.apply_chat_template(messages, return_dict=False)
    assert rendered.ids.count(t.convert_tokens_to_ids(IMAGE)) == sum(counts) and len(rendered.ids) == len(rendered.loss_mask)
    learned = t.decode([i for i, m in zip(rendered.ids, rendered.loss_mask, strict=True) if m])
    assert learned == "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    assert sum(mask) == sum(rendered.loss_mask), "no image is supervised"


@pytest.mark.parametrize("kind", CHATS)
def test_masks_are_those_of_trls_training_template(kind):
    t, messages = real.tokenizer("qwen2_5_vl_training"), CHATS[kind]
    counts = [1] * sum(p is PICTURE for m in messages if isinstance(m["content"], list) for p in m["content"])
    theirs = t.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = render(t, messages, counts)
    assert ours.ids == theirs["input_ids"]
    beyond = [i for i, a, b in zip(ours.ids, ours.loss_mask, theirs["assistant_masks"], strict=True) if a != b]
    assert t.decode(beyond).strip() == "", "TRL's also has the white space behind the end of turn"
    assert all(b or not a for a, b in zip(ours.loss_mask, theirs["assistant_masks"], strict=True))


def test_what_cannot_be_rendered_surely_is_refused():
    t = real.tokenizer("qwen2_5_vl")
    with pytest.raises(DataError, match="1 images in the conversation, 2 are given"):
        render(t, CHATS["one"], [1, 1])
    with pytest.raises(DataError, match="the text of the special token"):
        render(t, [user(PICTURE, words(f"see {IMAGE}")), ANSWER], [1])
    with pytest.raises(DataError, match="not the user's"):
        render(t, [user(words("draw")), {"role": "assistant", "content": [PICTURE]}], [1])
    with pytest.raises(ConfigError, match=r"writes no <\|image_pad\|> for an image"):
        render(real.tokenizer("qwen2_5"), CHATS["one"], [1])
