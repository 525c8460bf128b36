"""The logprobs of a reply: each token by its own bytes, which joined are the text, and by its place, whole and streamed."""

import asyncio
import json
import random
import time

import pytest
from tiny_model import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graft.engine.protocol import Chunk, Request, Told
from graft.engine.text import Text
from graft.serve.pieces import OF_LETTER, key, token_bytes
from graft.serve.replies import Reply
from graft.serve.runner import Ticket

PARTS = ["hello", "the ", " cat", "今", "天", "柴", "🐕", "é", " ", "\n", "<0x41>", "Ġ"]


def sentencepiece():
    """As Llama 2's: a space is part of the word behind it, a character without a piece of its own is its bytes."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    bpe.train_from_iterator(
        ["hello world the cat sat on the mat 今天 天氣"] * 10, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    held = json.loads(bpe.to_str())
    held["added_tokens"] = [own for own in held["added_tokens"] if not own["content"].startswith("<0x")]
    bpe = Tokenizer.from_str(json.dumps(held))
    strip = decoders.Strip(" ", 1, 0)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=[tiny_tokenizer, sentencepiece])
def tokenizer(request):
    made = request.param()
    made.add_tokens([AddedToken("▁Ġ!", special=False, normalized=False)])
    return made


def test_the_bytes_of_any_text_join_to_it(tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices([*PARTS, "▁Ġ!", tokenizer.eos_token], k=8))
        joined = b"".join(token_bytes(tokenizer, token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])
        assert joined.decode().removeprefix(" ") == text.removeprefix(" "), "SentencePiece puts a space before the first word"
    assert token_bytes(tokenizer, 10**6) == b""


def test_the_letters_of_bytes_are_the_libraries():
    assert set(OF_LETTER) == set(pre_tokenizers.ByteLevel.alphabet()) and set(OF_LETTER.values()) == set(range(256))
    decoder = decoders.ByteLevel()
    assert all(decoder.decode([letter]) == chr(byte) for letter, byte in OF_LETTER.items() if byte < 128)


def test_the_space_before_a_word_stays():
    made = sentencepiece()
    assert [token_bytes(made, t) for t in made("the cat", add_special_tokens=False)["input_ids"]] == [b" the", b" cat"]


def reply(tokenizer, tickets, chat):
    return Reply({}, tickets, chat, True, tokenizer)


def chunks(tokenizer, ids, stop=()):
    """As an engine gives them, a token a chunk; the likeliest tokens are the two that follow in the vocabulary, and this one."""
    text = Text(tokenizer, stop)
    for n, token in enumerate(ids):
        last = n == len(ids) - 1
        shown, met = text.push(token, last)
        told = Told(-0.5, ((token, -0.5), (token + 1, -1.0), (token + 2, -2.0)))
        yield Chunk(0, shown, (token,), "stop" if met or last else None, (told,))
        if met:
            return


def answers(tokenizer, given, chat):
    """(the choice of the whole reply, the choices of the streamed events, one token each)"""

    async def ask():
        tickets = [Ticket(Request([1], 9), asyncio.get_running_loop(), time.monotonic() + 60) for _ in range(2)]
        for chunk in given:
            tickets[0].chunks.put_nowait(chunk)
        whole = (await reply(tokenizer, tickets[:1], chat).whole())["choices"][0]
        streamed = []

        async def feed():
            for chunk in given:
                tickets[1].chunks.put_nowait(chunk)
                await asyncio.sleep(0.03)  # longer than a burst

        feeding = asyncio.create_task(feed())
        async for event in reply(tokenizer, tickets[1:], chat).events(False):
            streamed += json.loads(event[6:])["choices"] if "[DONE]" not in event else []
        await feeding
        return whole, streamed

    return asyncio.run(ask())


def test_a_character_that_is_split_over_tokens(tokenizer):
    ids = tokenizer("🐕今é", add_special_tokens=False)["input_ids"]
    whole, _ = answers(tokenizer, list(chunks(tokenizer, ids)), chat=True)
    content = whole["logprobs"]["content"]
    assert bytes(b for c in content for b in c["bytes"]).decode().lstrip() == "🐕今é" == whole["message"]["content"]
    assert any(c["token"] == "\ufffd" for c in content) and all(len(c["bytes"]) == 1 for c in content if c["token"] == "\ufffd")
    completion, _ = answers(tokenizer, list(chunks(tokenizer, ids)), chat=False)
    told = completion["logprobs"]
    assert all(len(top) == 3 for top in told["top_logprobs"]), "tokens that are no whole characters are told apart"
    assert "bytes:\\xf0" in told["tokens"] and told["tokens"] == [key(bytes(c["bytes"])) for c in content]
    joined = b"".join(token_bytes(tokenizer, t) for t in ids).decode()
    assert [told["text_offset"][told["tokens"].index("bytes:\\xf0")], max(told["text_offset"])] == [joined.index("🐕"), joined.index("é")]


def test_offsets_go_on_where_text_is_held_back(tokenizer):
    ids = tokenizer("the cat 🐕 hello hello", add_special_tokens=False)["input_ids"]
    given = list(chunks(tokenizer, ids, stop=("hello the",)))
    whole, streamed = answers(tokenizer, given, chat=False)
    assert sum(not c.text for c in given) > 2, "of a character that is not whole, and of what may be a stop"
    told = [choice["logprobs"] for choice in streamed if choice["logprobs"]]
    assert len(told) > 3 and [at for own in told for at in own["text_offset"]] == whole["logprobs"]["text_offset"]
    assert [token for own in told for token in own["tokens"]] == whole["logprobs"]["tokens"]
    assert whole["logprobs"]["text_offset"] == sorted(whole["logprobs"]["text_offset"]) and "".join(c["text"] for c in streamed) == whole["text"]
