"""One document cleaned for continued pre-training: the recipe's steps, masks, the language's share, cuts and bounds.

All steps together run at 20 to 30 MB/s a core (processor time; the machine was shared): on Taiwanese news, DRCD and GSM8K
MB/s are mojibake 270 280 730, nfc 700 860 600, control 230 250 100, urls 1200 1300 430, page_numbers 130 550 180,
punctuation 110 80 690, repeated_lines 250 1900 280, whitespace 210 1400 200; then masks 260 170 27, cuts 260 80 46, and the
share of "zh" 25 64 13. A document needs about six times its size in memory while it is cleaned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from graft.core.sections import CLEANING, Clean
from graft.data.cleaning.characters import control, mojibake, nfc
from graft.data.cleaning.lines import page_numbers, repeated_lines, urls, whitespace
from graft.data.cleaning.masking import mask
from graft.data.cleaning.punctuation import punctuation
from graft.data.cleaning.segments import segment
from graft.data.script import language_share

Step = Callable[[str], tuple[str, int]]  # text to (text, how many things were changed); twice is as once
_STEPS: tuple[Step, ...] = (mojibake, nfc, control, urls, page_numbers, punctuation, repeated_lines, whitespace)
STEPS: dict[str, Step] = dict(zip(CLEANING, _STEPS, strict=True))


def clean_document(text: str, clean: Clean) -> tuple[list[str], str, Counter[str]]:
    """(documents, why there are none or "", counts).

    Counts: "nfc.documents" is 1 where the step of that name changed the text, "nfc.changes" how many things it changed, for
    every step and for "mask.email", "mask.phone" and "mask.id"; "segment.changes" counts cuts, and "segment.too_short"
    pieces of a cut text that no neighbour had room for. Reasons: "empty", "too little <language>", "too short".
    """
    counts: Counter[str] = Counter()

    def count(name: str, changes: int) -> None:
        if changes:
            counts[f"{name}.documents"] += 1
            counts[f"{name}.changes"] += changes

    for name in STEPS:
        if name in clean.steps:
            text, changes = STEPS[name](text)
            count(name, changes)
    if clean.mask:
        text, masked = mask(text, clean.mask)
        for kind in sorted(masked):
            count(f"mask.{kind}", masked[kind])
    if not text.strip():
        return [], "empty", counts
    if language_share(text, clean.language) < clean.language_share:
        return [], f"too little {clean.language}", counts
    pieces = segment(text, clean.min_chars, clean.max_chars)
    count("segment", len(pieces) - 1)
    kept = [piece for piece in pieces if len(piece) >= clean.min_chars]
    if kept and len(kept) < len(pieces):
        counts["segment.too_short"] += len(pieces) - len(kept)
    return kept, "" if kept else "too short", counts
