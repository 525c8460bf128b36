"""Whether an adapter does here what it did when it was trained: what is asked before a server answers in its name.

Before it is loaded: every file is as published; it was trained on this base, with this tokenizer; its conversations render to the token ids
that it was trained on. Once it is loaded: on its canaries, its effect, the logprobs of the targets with it less those of the base in the same
engine, is the recorded one, and is not nothing, so that an adapter which was never applied fails. Canaries with images (canaries.py) are judged
apart from those of text, which would hide a tower that is not as in training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from graft.core.artifact import digest_of
from graft.core.errors import GraftError, ServeError, Unreadable
from graft.core.store import AdapterStore, Version
from graft.model.chat import end_of_turn_ids, load_tokenizer, render, render_prompt, tokenizer_digest
from graft.model.images import ImageProcessor
from graft.serve import canaries
from graft.serve.spec import ServeSpec

# root mean square over the canaries' targets, in nats, of what the two arithmetics may differ by: (trained in, served in)
TOLERANCE_NATS = {("fp32", "fp32"): 0.002, ("bf16", "bf16"): 0.05, ("nf4", "nf4"): 0.06}
OTHER_TOLERANCE_NATS = 0.12  # of a base that is held otherwise, as fp8 is
SHARE = 0.1  # of the effect, where that is larger


class Refused(ServeError):
    """An adapter that must not answer here."""


@dataclass(frozen=True)
class Candidate:
    """An adapter that may be loaded."""

    version: Version
    tokenizer: Any
    ends: tuple[int, ...]  # ids that end its answers
    parity: dict[str, Any]
    fault: str | None = None  # why it would be refused, were it not for an override


@dataclass(frozen=True)
class Verdict:
    """effect: of the adapter here, difference: to the recorded one; root mean squares over the canaries' targets, nats: of text, or of rows with
    images, whichever are the further apart."""

    effect_nats: float
    difference_nats: float
    tolerance_nats: float
    passed: bool
    reason: str | None = None


def examined(store: AdapterStore, model: str, spec: ServeSpec, base_tokenizer: Any, processor: ImageProcessor | None) -> Candidate:
    """The version `model` of the store; Refused says what is not as it was in training, Unreadable or OSError that this cannot be seen now. Reads
    every file of it. processor: the engine's."""
    try:
        version = store.verified(model)
        parity = _read(version, "parity.json")
        tokenizer = load_tokenizer(str(version.folder))
    except Unreadable:
        raise
    except GraftError as e:
        raise Refused(str(e)) from None
    where = version.id
    if parity.get("base") != spec.identity:
        raise Refused(f"{where} was trained on the base {_short(parity.get('base'))}, this server has {_short(spec.identity)}")
    if _vocabulary(tokenizer) != _vocabulary(base_tokenizer):
        raise Refused(f"{where} comes with another tokenizer than the base has here: the same text would be other tokens")
    if digest_of(tokenizer.chat_template) != parity.get("chat_template"):
        raise Refused(f"{where} was trained with another chat template than the one it comes with")
    special = {str(i): token.content for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special}
    if special != parity.get("special_tokens"):
        raise Refused(f"{where} was trained with other special tokens: {_differs(parity.get('special_tokens') or {}, special)}")
    if tokenizer_digest(tokenizer) != parity.get("tokenizer"):
        raise Refused(f"{where} was trained with another tokenizer than the one it comes with")
    if fault := canaries.fault(version, parity, processor):
        raise Refused(f"{where} {fault}")
    for number, probe in enumerate(_read(version, "probes.json") if "probes.json" in version.about["files"] else []):
        wanted, tokens = probe["ids"], canaries.tokens(probe["messages"], processor)
        try:
            ids, prompt = render(tokenizer, probe["messages"], tokens).ids, render_prompt(tokenizer, probe["messages"][:-1], tokens)
        except GraftError as e:
            raise Refused(f"{where}: its conversation {number} cannot be rendered here: {e}") from None
        at = next((i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), min(len(ids), len(wanted)))
        if ids != wanted:
            raise Refused(
                f"{where}: its conversation {number} renders to other tokens here, from token {at} on: {ids[at : at + 4]}, not {wanted[at : at + 4]}"
            )
        if ids[: len(prompt)] != prompt:
            raise Refused(f"{where}: what it would be asked with is not how its conversation {number} begins")
    return Candidate(version, tokenizer, tuple(end_of_turn_ids(tokenizer)), parity)


def unexamined(store: AdapterStore, model: str, base_tokenizer: Any, fault: str) -> Candidate:
    """A version that an override lets pass in spite of `fault`; asked by its own template where it has one that can be used."""
    version = store.get(model)
    try:
        tokenizer = load_tokenizer(str(version.folder))
        return Candidate(version, tokenizer, tuple(end_of_turn_ids(tokenizer)), {}, fault)
    except GraftError:
        return Candidate(version, base_tokenizer, tuple(end_of_turn_ids(base_tokenizer)), {}, fault)


def judged(candidate: Candidate, precision: str, scores: list[tuple[list[float], list[float]]]) -> Verdict:
    """scores: of each canary, from its first target on, with the adapter and without, as the engine gives them."""
    parity, name = candidate.parity, candidate.version.id
    if candidate.fault:
        return Verdict(0.0, 0.0, 0.0, False, candidate.fault)
    least = TOLERANCE_NATS.get((parity["precision"], precision), OTHER_TOLERANCE_NATS)
    arithmetic = f"{parity['precision']} served in {precision}"
    found: list[Verdict] = []
    most = 0.0  # of the recorded effects
    for of in ("text", "images"):
        here: list[float] = []
        recorded: list[float] = []
        for canary, (own, base) in zip(parity["canaries"], scores, strict=True):
            if ("images" in canary) == (of == "images"):
                first = min(canary["at"])
                here += [own[at - first] - base[at - first] for at in canary["at"]]
                recorded += [a - b for a, b in zip(canary["adapter"], canary["base"], strict=True)]
        effect, wanted = _rms(here), _rms(recorded)
        difference = _rms([a - b for a, b in zip(here, recorded, strict=True)])
        tolerance, reason = max(least, SHARE * wanted), None
        if not difference <= tolerance:  # nan too
            said = "as if it were not applied" if effect < 0.1 * wanted else "so it is not applied as it was trained"
            reason = (
                f"{name} changes the log-probabilities of its {len(here)} canary tokens of {of} by {effect:.4f} nats here and by {wanted:.4f} in "
                f"training ({difference:.4f} apart, {tolerance:.4f} allowed for {arithmetic}): {said}"
            )
        most = max(most, wanted)
        found += [Verdict(effect, difference, tolerance, reason is None, reason)] if here else []
    if not found:
        return Verdict(0.0, 0.0, least, False, f"{name} has no canaries: nothing says what it does")
    worst = max(found, key=lambda verdict: (not verdict.passed, verdict.difference_nats / verdict.tolerance_nats))
    if worst.passed and most <= 2 * least:
        reason = (
            f"{name} changed its canary tokens by {most:.4f} nats in training, which cannot be told from nothing ({least:.4f} are allowed for "
            f"{arithmetic}): it learned next to nothing"
        )
        return replace(worst, passed=False, reason=reason)
    return worst


def _rms(values: list[float]) -> float:
    return sqrt(sum(v * v for v in values) / len(values)) if values else 0.0


def _read(version: Version, name: str) -> Any:
    try:
        return json.loads((version.folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as e:
        raise Refused(
            f"{version.id} has no {name} that can be read ({type(e).__name__}): train it with this graft, or load it with an override"
        ) from None


def _vocabulary(tokenizer: Any) -> str:
    return digest_of(json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None})


def _short(identity: str | None) -> str:
    return "unknown" if identity is None else identity if ":" in identity else identity[:12]


def _differs(a: dict[str, str], b: dict[str, str]) -> str:
    key = next(k for k in sorted({*a, *b}, key=int) if a.get(k) != b.get(k))
    return f"token {key} was {a.get(key)!r} and is {b.get(key)!r}"
