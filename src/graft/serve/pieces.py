"""A token's own bytes, which those of its neighbours join to the text: decoding a token alone loses the space before a word and characters that are
split over several. Cost: a look into the vocabulary a token."""

from __future__ import annotations

import codecs
import re
from functools import lru_cache
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte that has no piece of its own, as SentencePiece writes it
PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# byte-level BPE's letters (bytes_to_unicode of https://github.com/openai/gpt-2/blob/master/src/encoder.py): printed bytes stand for themselves
OF_LETTER = {chr(b): b for b in PRINTED} | {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in PRINTED)}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """tokenizer: a fast one. Of an added token, special or not, its text; none of an id that the vocabulary does not have, as models may give."""
    byte_level, added = _kind(tokenizer)
    if token in added:
        return added[token]
    piece: str = tokenizer.convert_ids_to_tokens(token) or ""
    if byte_level:
        return bytes(OF_LETTER[c] for c in piece) if all(c in OF_LETTER for c in piece) else piece.encode()
    if byte := BYTE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()


@lru_cache(maxsize=16)
def _kind(tokenizer: Any) -> tuple[bool, dict[int, bytes]]:
    """(whether its pieces are written in byte-level BPE's letters, the added tokens): both are slow to ask for, and the same for every token."""
    decoder = tokenizer.backend_tokenizer.decoder
    added = {token: str(own.content).encode() for token, own in tokenizer.added_tokens_decoder.items()}
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__(), added


def key(piece: bytes) -> str:
    """As OpenAI's completions name a token: its text, or `bytes:` and each byte where it is no whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in piece)


class Places:
    """Where each token begins in the text of all of one choice's, in characters, whatever of it was shown; within a character, that one's place."""

    def __init__(self) -> None:
        self._at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, piece: bytes) -> int:
        at = self._at
        self._at += len(self._decoder.decode(piece))
        return at
