"""Bins as text: the tokens of each document with their mask, by the tokenizer that the shards were made with.

Its digest must be the index's, else ids are shown: another tokenizer's text would be a lie. About 10 microseconds a token.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from graft.core.artifact import Artifact
from graft.core.errors import ConfigError, GraftError
from graft.core.shards import ShardSet
from graft.core.stages import DATA, lineage

CUT = "\N{REPLACEMENT CHARACTER}"  # what decoders make of a character whose last bytes are still to come
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte of a character that the vocabulary lacks, as SentencePiece writes it


class Run(NamedTuple):
    """Neighbouring tokens that decode together: a character may be spread over several."""

    text: str
    ids: tuple[int, ...]
    supervised: bool


class Document(NamedTuple):
    source: str
    runs: list[Run]


class RenderedBin(NamedTuple):
    number: int
    documents: list[Document]
    padding: int  # tokens
    note: str  # why ids are shown in place of text, or ""


def render_bins(held: ShardSet, numbers: Iterable[int], artifact: Artifact | None) -> list[RenderedBin]:
    """The bins of these numbers; ids in place of text, and a note that says why, where the tokenizer cannot be had."""
    tokenizer, note = None, ""
    try:
        tokenizer = _tokenizer(artifact, held.index["tokenizer"])
    except (GraftError, ImportError) as e:
        note = f"ids, not text: {e}"
    return [_render(held, number, tokenizer, note) for number in numbers]


def _render(held: ShardSet, number: int, tokenizer: Any, note: str) -> RenderedBin:
    found = held.bin(number)
    ends = np.cumsum(found.doc_lens).tolist()
    documents = []
    for source, end, length in zip(held.sources(number), ends, found.doc_lens.tolist(), strict=True):
        here = slice(end - length, end)
        documents.append(Document(source, list(runs(tokenizer, found.input_ids[here].tolist(), found.loss_mask[here].tolist()))))
    return RenderedBin(number, documents, held.seq_len - (ends[-1] if ends else 0), note)


def runs(tokenizer: Any, ids: list[int], mask: list[int]) -> Iterator[Run]:
    """The tokens in order, as few together as give whole characters; ids as text where `tokenizer` is None.

    A token's text is what it adds to its predecessor's, because decoders drop a space at the start of what they are given.
    """

    def run(text: str, end: int) -> Run:
        return Run(text[len(_decode(tokenizer, ids[before:read])) :], tuple(ids[read:end]), any(mask[read:end]))

    if tokenizer is None:
        yield from (Run(f"{i} ", (i,), bool(m)) for i, m in zip(ids, mask, strict=True))
        return
    before = read = 0
    held = ""  # what the tokens behind `before` give while it may end within a character
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[before:end])
        if held and len(text) > len(held) and text.startswith(held) and not BYTE.fullmatch(tokenizer.convert_ids_to_tokens(ids[end - 1])):
            yield run(held, end - 1)  # it was whole: the text has the replacement character itself
            before, read = read, end - 1
            text = _decode(tokenizer, ids[before:end])
        held = text if text.endswith(CUT) and end < len(ids) else ""
        if not held:
            yield run(text, end)
            before, read = read, end


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def _tokenizer(artifact: Artifact | None, digest: str) -> Any:
    """The tokenizer by which the artifact was made; ConfigError where it is not to be found."""
    if artifact is None:
        raise ConfigError("these shards lie in no artifact that says which tokenizer made them")
    from graft.model.chat import load_tokenizer, tokenizer_digest

    model = artifact.manifest["recipe"]["model"]
    template = model["chat_template"]
    if template.endswith(".jinja"):
        template = _named(artifact, "model.chat_template", template).read_text(encoding="utf-8")
    tokenizer = load_tokenizer(*_base(artifact, model), template)
    if tokenizer_digest(tokenizer) != digest:
        raise ConfigError(f"the tokenizer of {model['base']!r} is not the one these shards were made with")
    return tokenizer


def _base(artifact: Artifact, model: dict[str, Any]) -> tuple[str, str | None]:
    """(folder or hub id, revision) of the model whose tokenizer made the shards."""
    if "init" in artifact.manifest["parents"]:
        return str(next(a.path for _, a in lineage(artifact.path) if a.manifest["kind"] == "init")), None
    if isinstance(named := artifact.manifest["inputs"].get("model"), str):  # "hub:owner/name@commit"
        return model["base"], named.rpartition("@")[2]
    return str(_named(artifact, "model.base", model["base"])), None


def _named(artifact: Artifact, key: str, name: str) -> Path:
    """What a recipe names relative to itself, of which the manifest does not say where it lies."""
    workspace = next((p.parent for p in artifact.path.parents if p.name == DATA), Path.cwd())
    for place in (workspace, workspace / "configs" / "recipes", Path.cwd()):
        if (place / name).exists():
            return place / name
    raise ConfigError(f"{key} = {name!r} is not found from {workspace}")


def visible(text: str) -> str:
    """Control and format characters by their number, line ends by ↵: what a file holds must not steer the terminal."""
    return "".join(
        "↵\n" if c == "\n" else "⇥" if c == "\t" else f"<U+{ord(c):04X}>" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text
    )
