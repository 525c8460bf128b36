"""Stage `merge` and the command `graft merge`: base + LoRA adapter -> one model, W + (alpha / r) B A for every adapted layer.

W is what the adapter was trained on: of an fp8 or nf4 base the de-quantised weights. Weights pass one at a time: a few tensors
and the logits of five short texts are in memory, whatever the model's size. What was written is read again and
compared with base + adapter, which costs two forward passes, three or four where the base is quantised; a merged model that
differs by more than TOLERANCES is refused and nothing is left of it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from graft.core.artifact import MANIFEST, digest_of, sha256_file, writing
from graft.core.errors import ArtifactError, ConfigError, TrainError
from graft.core.hub import commit_of
from graft.core.stages import Job
from graft.model.chat import load_tokenizer, save_tokenizer
from graft.model.frozen import fp8_works
from graft.model.lora import WEIGHTS
from graft.model.stream import stored_as
from graft.train.merge_compare import Difference, difference, logits_of, tokens_of
from graft.train.merge_weights import Adapter, MergeBase
from graft.train.parity import FILE as PARITY
from graft.train.tensor_files import TensorFiles


class Tolerance(NamedTuple):
    logits: float  # the greatest difference, in standard deviations of the logits
    kl_nats: float


# Merged weights are rounded once: in fp32 nothing else differs, in bf16 each is off by 2^-9 of itself at most. Over 20 layers of a 13B shape with
# random weights that comes to 0.15 deviations at most and 0.0007 nats; nats grow with the depth, logits with its root.
_ROUNDED = Tolerance(0.25, 0.01)
TOLERANCES = {"fp32": Tolerance(1e-3, 1e-6), "bf16": _ROUNDED, "fp8": _ROUNDED, "nf4": _ROUNDED}


def run(job: Job) -> None:
    base, revision = job.plan.base_model("cpt")
    model = job.recipe.model
    tokenizer = load_tokenizer(base, revision, job.plan.chat_template)
    with job.writing() as draft:
        draft.counts.update(merge(job.parents["cpt"].path, base, revision, model.precision, tokenizer, draft.path))


def merge_folder(adapter: Path, base: str, revision: str | None, precision: str | None, out: Path) -> dict[str, Any]:
    """`graft merge`: publish the merged model as an artifact at `out`, whole or not at all; returns its counts.

    precision: how the base was held in training; None for what the adapter's folder says, else bf16. ConfigError, ArtifactError or
    TrainError, in one line, where something is refused.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists already: name another --out, or remove it")
    told = _precision_of(adapter)
    if precision and told and precision != told:
        raise ConfigError(f"{adapter} was trained on a base in {told}: merge it with --precision {told}")
    precision = precision or told or "bf16"
    if precision not in TOLERANCES:
        raise ConfigError(f"--precision {precision!r} is none of {', '.join(TOLERANCES)}")
    if not Path(base).is_dir() or revision:
        if base.startswith((".", "/", "~")) or base.count("/") != 1:
            raise ConfigError(f"--base {base!r} is neither a folder nor a hub id like 'owner/name'")
        revision = commit_of("model", base, revision)
    Adapter(adapter)  # before anything is loaded
    own = (adapter / "tokenizer_config.json").is_file()  # with the template that it was trained with
    tokenizer = load_tokenizer(str(adapter)) if own else load_tokenizer(base, revision)
    inputs = {"base": f"{base}@{revision}" if revision else str(Path(base).resolve()), "adapter": sha256_file(adapter / WEIGHTS)}
    head = {"keys": {"model.precision": precision}, "inputs": inputs, "parents": {}}
    with _alone(out), writing(out, kind="merge", fingerprint=digest_of(head), head=head) as draft:
        draft.counts.update(merge(adapter, base, revision, precision, tokenizer, draft.path))
        if out.exists():  # since we looked
            raise ConfigError(f"{out} exists already: name another --out, or remove it")
    return draft.counts


def merge(adapter_folder: Path, base: str, revision: str | None, precision: str, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write the merged model into an empty folder and compare it with base + adapter; returns what the artifact counts.

    TrainError where it differs by more than TOLERANCES[precision]; ConfigError, ArtifactError where base and adapter cannot be merged.
    """
    device = _device(precision)
    adapter = Adapter(adapter_folder)
    found = MergeBase(base, revision, precision, device)
    found.check(adapter)
    texts = tokens_of(tokenizer, found)
    with torch.no_grad():
        wanted = logits_of(found, found.trained, adapter, texts)
        shards = found.write(adapter, folder)
        save_tokenizer(tokenizer, folder)
        files = TensorFiles(folder)
        got = logits_of(found, lambda name: files.get(stored_as(found.tied.get(name, name), found.config)).to(device), None, texts)
        off = difference(wanted, got)
        _refuse(off, precision)
        counts = {"layers": len(adapter.pairs), "shards": shards, "tokens": sum(map(len, wanted)), **off._asdict()}
        if found.left_out:
            counts["left_out"] = found.left_out
        if found.quantised:
            counts["unquantised"] = _figures(difference(logits_of(found, found.stored, adapter, texts), got))
        if precision == "fp8":
            counts["fp8_inputs"] = _figures(difference(logits_of(found, found.trained, adapter, texts, rounds_inputs=True), got))
    return counts


def _device(precision: str) -> torch.device:
    """A GPU where there is one, so that weights are quantised by the kernels that trained; one that has no FP8 cannot quantise to it."""
    cuda = torch.device("cuda")
    return cuda if torch.cuda.is_available() and (precision != "fp8" or fp8_works(cuda)) else torch.device("cpu")


def _refuse(off: Difference, precision: str) -> None:
    most = TOLERANCES[precision]
    if not (off.logit_difference_max <= most.logits * max(off.logit_std, 1e-6) and off.kl_nats <= most.kl_nats):
        raise TrainError(
            f"the merged model differs from base + adapter by {off.logit_difference_max:.3g} in logits (spread {off.logit_std:.3g}) "
            f"and {off.kl_nats:.3g} nats, in {precision} {most.logits:g} of the spread and {most.kl_nats:g} nats are allowed: nothing was written"
        )


def _figures(off: Difference) -> dict[str, float]:
    return {"kl_nats": off.kl_nats, "logit_difference_max": off.logit_difference_max}


def _precision_of(adapter: Path) -> str | None:
    """How the base was held that an adapter of graft was trained on; None where its folder does not say."""
    try:
        if (adapter / PARITY).is_file():
            return json.loads((adapter / PARITY).read_text(encoding="utf-8"))["precision"]
        if (adapter / MANIFEST).is_file():
            return json.loads((adapter / MANIFEST).read_text(encoding="utf-8"))["recipe"]["model"]["precision"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ArtifactError(f"{adapter}: its {PARITY} or {MANIFEST} cannot be read ({e})") from None
    return None


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One writer of `out`: the drafts of others are swept. ConfigError where another process holds it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.parent / f".{out.name}.lock"
    with lock.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another `graft merge` writes {out}: wait for it, or name another --out") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
