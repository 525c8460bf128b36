"""Templates and masks: assistant tokens only, end of turn included, and a prompt is a prefix of what was trained."""

import sys
from pathlib import Path

import pytest

from graft.core.errors import ConfigError, DataError
from graft.model.chat import TEMPLATES, end_of_turn_ids, in_chatml, load_tokenizer, render, render_prompt

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from small import tokenizer as plain_tokenizer

CHAT = [
    {"role": "system", "content": "你是助手"},
    {"role": "user", "content": "畫貓 🐱"},
    {"role": "assistant", "content": "好 👌"},
    {"role": "user", "content": "再畫"},
    {"role": "assistant", "content": "不"},
]


@pytest.fixture
def tokenizer():
    t = plain_tokenizer()
    t.chat_template = TEMPLATES["chatml"]
    return t


def supervised(tokenizer, rendered):
    """The runs of supervised text."""
    runs, current = [], []
    for i, m in zip(rendered.ids, rendered.loss_mask, strict=True):
        if m:
            current.append(i)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs + ([tokenizer.decode(current)] if current else [])


def test_every_answer_with_its_end_of_turn_and_nothing_else(tokenizer):
    assert supervised(tokenizer, render(tokenizer, CHAT)) == ["好 👌<|im_end|>", "不<|im_end|>"]


def test_ids_are_the_templates_own(tokenizer):
    rendered = render(tokenizer, CHAT)
    assert rendered.ids == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    prompt = render_prompt(tokenizer, CHAT[:-1])
    assert rendered.ids[: len(prompt)] == prompt and rendered.loss_mask[len(prompt)] == 1
    assert tokenizer.decode(rendered.ids) == in_chatml(CHAT)


def test_llama_3_template():
    t = plain_tokenizer()
    t.add_special_tokens({"additional_special_tokens": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]})
    t.bos_token, t.chat_template = "<|begin_of_text|>", TEMPLATES["llama-3"]
    rendered = render(t, CHAT)
    assert supervised(t, rendered) == ["好 👌<|eot_id|>", "不<|eot_id|>"]
    assert rendered.ids.count(t.bos_token_id) == 1
    assert t.convert_tokens_to_ids("<|eot_id|>") in end_of_turn_ids(t)


def test_end_of_turn(tokenizer):
    assert end_of_turn_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("messages", [[], CHAT[:2], CHAT[2:], [CHAT[1], CHAT[1], CHAT[2]], [CHAT[1], {"role": "assistant", "content": " "}]])
def test_unbalanced_or_empty_conversations_are_refused(tokenizer, messages):
    with pytest.raises(DataError):
        render(tokenizer, messages)


def test_a_template_needs_its_tokens(tmp_path):
    plain_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), None, "chatml").chat_template == TEMPLATES["chatml"]
    with pytest.raises(ConfigError, match="eot_id"):
        load_tokenizer(str(tmp_path), None, "llama-3")
    with pytest.raises(ConfigError, match="no chat template"):
        render(load_tokenizer(str(tmp_path)), CHAT)
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(str(tmp_path / "gone"))
