"""From tokens to text as it may be shown: whole characters, and nothing that may be the beginning of a stop text."""

from __future__ import annotations

from typing import Any

HALF = "\ufffd"  # what decoding gives for a character whose bytes are not all there


class Text:
    """Of one row. `tokens` are those so far, without one that ended the turn."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self._shown = self._before = 0  # tokens whose text was given out, and where the last given piece starts
        self._held = ""  # may be the beginning of a stop text

    def push(self, token: int, last: bool) -> tuple[str, bool]:
        """(text to show now, whether a stop text was met). last: no token follows."""
        self.tokens.append(token)
        return self._give(last)

    def end(self, *tokens: int) -> str:
        """What is left to show, with these last tokens of the row; no stop text is looked for in them."""
        self.tokens += tokens
        return self._give(True)[0]

    def _give(self, last: bool) -> tuple[str, bool]:
        text = self._held + self._decode(last)
        met = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if met:
            self._held = ""
            return text[: min(met)], True
        wait = 0 if last else max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - wait :]
        return text[: len(text) - wait], False

    def _text(self, start: int, end: int | None = None) -> str:
        found: str = self.tokenizer.decode(self.tokens[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return found

    def _decode(self, last: bool) -> str:
        """Text of the tokens not yet shown, read together with the piece before them (a tokenizer may join or strip at its
        start); "" while the last character is not whole, which at the end is left out."""
        text = self._text(self._before)
        if text.endswith(HALF) and not last:
            return ""
        new = text[len(self._text(self._before, self._shown)) :]
        self._before, self._shown = self._shown, len(self.tokens)
        return new.rstrip(HALF) if last else new
