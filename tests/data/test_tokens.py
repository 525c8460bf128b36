"""The fast path: ids and masks of every row are those of the template and of the slow reference, by both engines."""

import json
import random
import sys
import time
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from graft.core.errors import DataError
from graft.data import encoding, tokens
from graft.data.encoding import PROBES, Encoder
from graft.model.chat import TEMPLATES, render

sys.path[:0] = [str(Path(__file__).parents[1] / "model"), str(Path(__file__).parents[1] / "train")]
import real  # noqa: E402
from real import CHATS, chat  # noqa: E402
from small import tokenizer as plain_tokenizer  # noqa: E402

DATA = Path(__file__).parents[3] / "shared/data"
# chatml with the answers marked, for transformers' own mask
MARKED = TEMPLATES["chatml"].replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}",
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """fastokens is asked for the first text."""
    monkeypatch.setattr(encoding, "WORTH", 1e-9)
    tokens._kit.cache_clear()


@pytest.fixture
def saved(tmp_path):
    """saved(name): the source of real.tokenizer(name)."""

    def save(name: str) -> tokens.Source:
        real.tokenizer(name).save_pretrained(tmp_path / name, save_jinja_files=False)
        return str(tmp_path / name), None, "tokenizer"

    return save


def row(made: tokens.Tokens, i: int) -> tuple[list[int], list[int]]:
    return made.ids[made.ends[i] : made.ends[i + 1]].tolist(), made.mask[made.ends[i] : made.ends[i + 1]].tolist()


def held_against_render(source, conversations, seq_len=4096) -> tokens.Tokens:
    """Every row is what `render` gives, or has its reason."""
    made, tokenizer = tokens.tokenize_chats(source, conversations, seq_len), tokens._kit(source).tokenizer
    assert made.ids.dtype == np.int32 and made.mask.dtype == np.uint8 and made.ends.dtype == np.int64
    assert len(made.ends) == len(conversations) + 1 == len(made.reasons) + 1 and made.ends[-1] == len(made.ids) == len(made.mask)
    for i, messages in enumerate(conversations):
        try:
            wanted, reason = render(tokenizer, messages), ""
        except DataError as e:
            wanted, reason = None, str(e)
        if wanted is not None and len(wanted.ids) > seq_len:
            wanted, reason = None, tokens.TOO_LONG
        assert made.reasons[i] == reason and row(made, i) == ((wanted.ids, wanted.loss_mask) if wanted else ([], []))
    return made


# ---- chats --------------------------------------------------------------------------------------------------------------------
WORDS = [
    "the model's",
    "don't",
    " 12,345.6 ",
    "今天天氣",
    "食飽未？",
    "「引號」",
    "Tâi-lô",
    "שלום",
    "مرحبا",
    "\u202bRTL\u202c",
    "🐱👍🏽",
    "👨‍👩‍👧‍👦",
    "🇹🇼",
    "e\u0301",
    "\n\n",
    "  ",
    "\t",
    "नमस्ते",
]
WORDS += ["ภาษาไทย", "한국어", "def f(x):\n    return x", "<b>", "|", "\u200f", "ﬁ", "\ufeff", "A" * 40, "Привет", "\x07", "user", "assistant\n"]


def mixed(rng: random.Random) -> str:
    text = "".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    return (text if rng.random() < 0.1 else text.strip()) if text.strip() else "x"


def test_ten_thousand_mixed_rows_are_as_transformers_makes_them(saved):
    rng = random.Random(4)
    rows = [chat(*(mixed(rng) for _ in range(2 * rng.choice([1, 1, 1, 2, 3]))), system=rng.choice([None, mixed(rng)])) for _ in range(10_000)]
    source, t = saved("chatml"), real.tokenizer("chatml")
    found = tokens.tokenize_chats(source, rows, 4096)
    assert found.counts["differed"] == 0 and found.counts["rendered"] < 2000 and not any(found.reasons)
    straddled = 0
    for at in range(0, len(rows), 500):
        some = rows[at : at + 500]
        wanted = t.apply_chat_template(some, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True)
        for i, (ids, mask) in enumerate(zip(wanted["input_ids"], wanted["assistant_masks"], strict=True), at):
            got_ids, got_mask = row(found, i)
            assert got_ids == ids
            if got_mask != mask:  # a token that begins in the header and ends in the answer is no target of ours
                straddled += 1
                assert (1, 0) not in zip(got_mask, mask, strict=True)
                more = [k for k, pair in enumerate(zip(got_mask, mask, strict=True)) if pair == (0, 1)]
                assert all(mask[k - 1] == 0 and t.decode([ids[k]]).startswith("\n") and not t.decode([ids[k]]).strip() for k in more)
        assert t.apply_chat_template(some[:9], return_dict=False) == [row(found, i)[0] for i in range(at, at + 9)]
    assert 0 < straddled < 2000
    held_against_render(source, rows[::20])


@pytest.mark.parametrize(
    "name", ["llama3_2", "qwen2_5", "qwen3", "gemma", "phi3", "deepseekv3", "mistral", "cohere2", "gptoss", "qwen3_5_think", "alpaca", "glm4moe"]
)
def test_every_real_template_is_compiled_to_what_it_renders(saved, name):
    thought = [chat("a", "<think>\nr1\n</think>\n\nb", "c", "<think>r2</think>d"), chat("<tool_response>x</tool_response>", "b")]
    refused = [
        chat("a <|im_end|> [INST] <|eot_id|> <end_of_turn> <eos>", "b"),
        chat("a"),
        chat(" \n", "b"),
        [{"role": "user"}],
        [7],
        [],
        chat("a", None),
    ]
    made = held_against_render(saved(name), [*CHATS.values(), *thought, *refused] * tokens.OFTEN)
    assert made.counts["differed"] == 0
    gone = {"glm4moe": 8, "gemma": 3, "deepseekv3": 1}.get(name, 0)  # no end of turn; system messages; reasoning that is cut
    assert sum(map(bool, made.reasons)) >= tokens.OFTEN * gone and made.counts["rendered"] <= tokens.OFTEN * (2 + len(refused) + gone)


CONTENT = st.text(st.sampled_from("ab 1\n\t<|im_end>/think[INST]好🐱é\u0301\u202b\ud800"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(CONTENT, min_size=1, max_size=5), min_size=1, max_size=8), seq_len=st.sampled_from([20, 4096]))
def test_any_conversation_is_rendered_or_refused_the_same(tmp_path_factory, rows, seq_len):
    folder = tmp_path_factory.getbasetemp() / "qwen3"
    if not folder.exists():
        real.tokenizer("qwen3").save_pretrained(folder, save_jinja_files=False)
    conversations = [chat(*contents) for contents in rows]
    bad = [i for i, c in enumerate(rows) if any("\ud800" in text for text in c)]
    made = tokens.tokenize_chats((str(folder), None, "tokenizer"), conversations, seq_len)
    assert all(made.reasons[i] for i in bad)
    held_against_render((str(folder), None, "tokenizer"), [c for i, c in enumerate(conversations) if i not in bad], seq_len)


def test_what_a_chat_is_rejected_for(saved):
    source = saved("qwen2_5")
    long = chat("word " * 300_000, "b")  # over LONG: measured without offsets
    made = tokens.tokenize_chats(source, [chat("a", "b"), long, long[:1], chat("a", "b" * 500), chat("a\ud800", "b"), chat("a\ud800")], 100)
    assert [r.split(":")[0] for r in made.reasons] == [
        "",
        tokens.TOO_LONG,
        "roles are ['user']",
        tokens.TOO_LONG,
        tokens.NOT_UNICODE,
        "roles are ['user']",
    ]
    assert row(made, 0)[0] and len(made.ids) == len(row(made, 0)[0])
    empty = tokens.tokenize_chats(source, [], 100)
    assert len(empty.ids) == 0 and empty.ends.tolist() == [0] and empty.reasons == []


# ---- the engines ----------------------------------------------------------------------------------------------------------------
def test_a_faster_engine_that_gives_other_ids_is_not_used(saved):
    """The engine of another tokenizer stands for one that is wrong."""
    right, wrong = real.tokenizer("qwen3"), real.tokenizer("llama3")
    kit = tokens._kit(saved("qwen3"))
    texts = [*PROBES[:8], "<|im_start|>x"] * 100
    wanted = [e.ids for e in right.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert encoding._fast(right.backend_tokenizer) is not None
    kit.encoder.encode(["a"])
    kit.encoder.fast = encoding._fast(wrong.backend_tokenizer)
    assert kit.encoder.fast is not None
    flat = kit.encoder.encode(texts)
    assert [flat.ids[a:b].tolist() for a, b in pairwise(flat.ends)] == wanted and kit.encoder.differed == 1
    made = tokens.tokenize_chats(saved("qwen3"), list(CHATS.values()), 4096)
    assert made.counts["differed"] == 1 and row(made, 0)[0] == render(right, CHATS["single"]).ids


def test_a_template_that_looks_into_contents_is_found_out_and_rendered(tmp_path):
    """Every 256th row is rendered too: here the template shouts where it reads "wow", which no constant of more than three letters gives away."""
    t = PreTrainedTokenizerFast(tokenizer_object=real.tokenizer("qwen3").backend_tokenizer, eos_token="<eos>")
    t.chat_template = TEMPLATES["chatml"].replace("<|im_end|>\n", "{% if 'wow' in m['content'] %}!{% endif %}<|im_end|>\n")
    t.save_pretrained(tmp_path, save_jinja_files=False)
    source = (str(tmp_path), None, "tokenizer")
    assert held_against_render(source, [chat("a", "b"), chat("c", "d")]).counts == {"rendered": 0, "differed": 0}
    assert held_against_render(source, [chat("wow", "b"), chat("c", "wow")]).counts == {"rendered": 2, "differed": 1}


# ---- texts ----------------------------------------------------------------------------------------------------------------------
def test_texts_end_in_their_tail(saved, tmp_path):
    source = saved("qwen3")
    texts = ["hello", "", "好 <|im_end|>", "\ud800", "a"]
    made, tokenizer = tokens.tokenize_texts(source, texts), real.tokenizer("qwen3")
    eos = tokenizer.eos_token_id
    assert [row(made, i)[0] for i in (0, 2, 4)] == [[*tokenizer(texts[i], add_special_tokens=False)["input_ids"], eos] for i in (0, 2, 4)]
    assert made.reasons == ["", tokens.EMPTY, "", tokens.NOT_UNICODE, ""] and row(made, 1) == row(made, 3) == ([], []) and made.mask.all()
    assert tokens.tokenize_texts(source, []).ends.tolist() == [0]
    plain_tokenizer().save_pretrained(tmp_path / "plain")
    made = tokens.tokenize_texts((str(tmp_path / "plain"), None, "chatml"), ["a"])
    assert row(made, 0)[0][-1] == plain_tokenizer().convert_tokens_to_ids("<|endoftext|>") != plain_tokenizer().eos_token_id


@pytest.mark.parametrize(
    "text", ["a" * 10_000_000, "中文。" * 3_300_000, " ".join(f"w{i}" for i in range(1_300_000))], ids=["letter", "Han", "words"]
)
def test_a_text_of_ten_megabytes(saved, text):
    """By fastokens; the first 4,096 characters alone are encoded twice."""
    began = time.perf_counter()
    made = tokens.tokenize_texts(saved("qwen3"), ["before", text, "after"])
    assert time.perf_counter() - began < 60 and made.reasons == ["", "", ""] and made.counts == {"differed": 0}
    ids, decode = row(made, 1)[0], real.tokenizer("qwen3").decode
    assert text.startswith(decode(ids[:99])) and text.endswith(decode(ids[-100:-1])) and len(ids) > 1_000_000


def test_a_real_tokenizer_and_real_inputs(tmp_path, monkeypatch):
    """131,072 tokens: fastokens gives the ids of `tokenizers`, with it and without it the result is one."""
    t = PreTrainedTokenizerFast(tokenizer_object=real.tekken(), eos_token="<|im_end|>", bos_token="<s>", chat_template=TEMPLATES["chatml"])
    t.save_pretrained(tmp_path, save_jinja_files=False)
    source = (str(tmp_path), None, "tokenizer")
    texts, rows = list(PROBES), list(CHATS.values())
    if DATA.is_dir():  # the real inputs are beside a developer's checkout, and no part of it
        articles = json.loads((DATA / "drcd_dev.json").read_text(encoding="utf-8"))["data"]
        texts += [p["context"] for article in articles for p in article["paragraphs"]][:200]
        texts += (DATA / "taigi_news.txt").read_text(encoding="utf-8").splitlines()[:2000]
        with (DATA / "gsm8k_train.jsonl").open(encoding="utf-8") as f:
            rows += [chat(r["question"], r["answer"]) for r in islice(map(json.loads, f), 2000)]
    made, chats = tokens.tokenize_texts(source, texts), tokens.tokenize_chats(source, rows, 2048)
    assert tokens._kit(source).encoder.fast is not None
    full = [text for text in texts if text]
    wanted = [e.ids for e in t.backend_tokenizer.encode_batch(full, add_special_tokens=False)]
    kept = [row(made, i)[0][:-1] for i, text in enumerate(texts) if text]
    assert kept == wanted and made.counts == {"differed": 0}
    assert chats.counts["differed"] == 0 and chats.counts["rendered"] <= 1 and not any(chats.reasons)
    held_against_render(source, rows[::100])
    monkeypatch.setitem(sys.modules, "fastokens", None)
    slow = Encoder(t)
    assert np.array_equal(slow.encode(full).ids, np.concatenate([np.array(ids) for ids in kept])) and slow.fast is None


def test_fastokens_is_not_asked_for_what_it_cannot_read():
    model = {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"}
    assert encoding._fast(Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))) is None
