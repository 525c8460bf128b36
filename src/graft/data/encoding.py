"""Texts to token ids, flat and without a Python object a token: by fastokens where it is verified to give the same ids.

fastokens (https://github.com/crusoecloud/fastokens) reads the tokenizer's own JSON. It is asked once a process has met
WORTH of text, for it needs 2 to 3 s to load 130,000 tokens. Its ids must be those of `tokenizers` on PROBES when it is
loaded, and in each call on the head of every 256th text; at the first difference, `tokenizers` does that call's work, and
with a difference at the load all of it. Side by side on one busy core fastokens gives 25 to 45 MB/s, `tokenizers` 2 to 2.5;
10 MB without a space take fastokens 4 to 20 s and 0.7 GB, 10 MB of words 0.3 s.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

WORTH = 32  # characters of text a token of the vocabulary: what `tokenizers` encodes while fastokens would load
SAMPLE = 256  # texts to one that both engines encode
HEAD = 4096  # characters of it
CHUNK = 1 << 20  # characters that `tokenizers` encodes at once: its encodings take some 100 bytes a token

PROBES = [
    "Hello, world! It's the model's 3rd try: don't, we'll, I'VE, they'd… 'quoted' \"text\" e.g. foo_bar(baz[1:2]) != None;\n\tindented\r\n",
    "  two  spaces   three    four\t\ttabs \n\n\n newlines \n \r\n\r\n trailing   ",
    "0 12 345 6789 12345678901234567890 3.14159 1,000,000 ½ ² ١٢٣ १२३ 一二三 Ⅻ",
    "床前明月光，疑是地上霜。繁體與简体；「引號」《書名》（全形）ＡＢＣ１２３ 臺語：逐家好，食飽未？ Tâi-lô: Guá sī Tâi-uân-lâng. POJ: o͘ ⁿ ê̍",
    "ひらがなカタカナ漢字ｶﾀｶﾅ、한국어 문장입니다. ภาษาไทยไม่มีช่องว่าง हिन्दी में क्षत्रिय தமிழ்",
    "שלום עולם, مرحبا بالعالم \u202bRTL inside\u202c and \u200fmarks\u200e; naïve café e\u0301 a\u030a \u1e69 s\u0323\u0307 ﬁ ﬂ ß İ ı",
    "🐱👍🏽👨‍👩‍👧‍👦🇹🇼🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f ❤️ ☺︎ 1️⃣ \u200b\u200d\ufeff\u00a0\u3000\u2028\u2029\x00\x1b\x7f\ufffd\ue000",
    "Привет, как дела? Ελληνικά Ծիածան ქართული አማርኛ Tiếng Việt Ünïcödé",
    "supercalifragilisticexpialidocious" * 8 + " " + "A" * 300 + " " + "=" * 200 + " " + "-_" * 100 + " " * 500 + "x",
    "https://example.com/a/b?c=d&e=f#g user@example.com C:\\path\\file.txt <div class=\"x\">&amp;</div> {'k': [1, 2]} def f(x):\n    return x**2\n",
    "",
    " ",
    "\n",
    "a",
    "的",
]


class Flat(NamedTuple):
    """Ids of many texts: those of text i are ids[ends[i] : ends[i + 1]]."""

    ids: np.ndarray  # int32 [total]
    ends: np.ndarray  # int64 [texts + 1], from 0


class Encoder:
    """One tokenizer's two engines. Special tokens in a text become their ids, none are added. One thread."""

    def __init__(self, tokenizer: Any):
        self.reference = tokenizer.backend_tokenizer
        self.reference.no_padding()
        self.reference.no_truncation()
        self.patience = WORTH * tokenizer.vocab_size
        self.fast: Any = None
        self.differed = 0  # calls whose sample differed

    def encode(self, texts: list[str]) -> Flat:
        """Ids of every text; the texts must be Unicode (no lone surrogates)."""
        if self.patience > 0:
            self.patience -= sum(map(len, texts))
            if self.patience <= 0:
                self.fast = _fast(self.reference)
        if self.fast is None or not texts:
            return self._by_reference(texts)
        heads = [text[:HEAD] for text in texts[::SAMPLE]]
        try:
            same = _equal(_flat(self.fast, heads), self._by_reference(heads))
            if same:
                return _flat(self.fast, texts)
        except ValueError:  # a text that its regular expressions give up on
            pass
        self.differed += 1
        return self._by_reference(texts)

    def _by_reference(self, texts: list[str]) -> Flat:
        ids, ends = array("i"), [0]
        for chunk in _chunks(texts):
            for encoding in self.reference.encode_batch_fast(chunk, add_special_tokens=False):
                ids.fromlist(encoding.ids)
                ends.append(len(ids))
        return Flat(np.array(ids, np.int32), np.array(ends, np.int64))


def _fast(reference: Any) -> Any:
    """fastokens' tokenizer, None where it is not installed, cannot read this tokenizer or gives other ids."""
    try:
        import fastokens
    except ImportError:
        return None
    before = os.environ.get("RAYON_NUM_THREADS")
    os.environ["RAYON_NUM_THREADS"] = "1"  # read once, at the first call: Ray's workers are the parallelism
    try:
        fast = fastokens.Tokenizer.from_json_str(reference.to_str())
        specials = [token.content for token in reference.get_added_tokens_decoder().values()][:200]
        probes = [*PROBES, *("a " + text + "\nb" + text + text + " c" for text in specials), *(a + b for a in PROBES for b in PROBES)]
        wanted = reference.encode_batch_fast(probes, add_special_tokens=False)
        found = _flat(fast, probes)
    except (ValueError, NotImplementedError, TypeError):
        return None
    finally:
        os.environ.pop("RAYON_NUM_THREADS") if before is None else os.environ.update(RAYON_NUM_THREADS=before)
    same = all(found.ids[a:b].tolist() == w.ids for a, b, w in zip(found.ends, found.ends[1:], wanted, strict=False))
    return fast if same else None


def _flat(fast: Any, texts: list[str]) -> Flat:
    ids, ends = fast.encode_batch_flat(texts)
    return Flat(np.frombuffer(ids, np.int32), np.frombuffer(ends, np.int64))


def _equal(a: Flat, b: Flat) -> bool:
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.ends, b.ends)


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
