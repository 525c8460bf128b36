"""Names on the Hugging Face hub, and the commits that they stand for.

A branch moves. What a run reads is the commit that its branch names when the run begins: every stage and rank loads that one,
the fingerprint tells it from the next, the manifest says which it was. Asking costs a request or two, and 1 s for importing
`huggingface_hub`; where the hub cannot be reached, the commit is the one that its cache holds.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from graft.core.errors import ConfigError

Kind = Literal["model", "dataset"]
UNREACHABLE = "the hub cannot be reached"
TIMEOUT_S = 10.0  # for each answer to what a branch stands for; the client's own would wait as long as the connection does
HUB = "hub:"  # begins the path of a corpus that lies there, and what a manifest says of such an input

_DATASET = re.compile(HUB + r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?")
_SMALL = ["*.json", "*.jinja", "*.txt", "*.model"]  # config, tokenizer, chat templates, the index of the weights
_FIRST = {"model": "config.json", "dataset": "README.md"}  # what is read of a repository before all else


class OutOfReach(ConfigError):
    """What lies on the hub cannot be looked at from here, right or wrong; `why` in a few words."""

    def __init__(self, message: str, why: str):
        super().__init__(message)
        self.why = why


class HubDataset(NamedTuple):
    """A dataset as a corpus names it."""

    name: str
    revision: str | None
    config: str | None
    split: str | None


def dataset_of(path: str) -> HubDataset:
    """The dataset that `hub:owner/name[@revision][/configuration][:split]` names; ConfigError where that is no such name."""
    named = _DATASET.fullmatch(path)
    if not named:
        raise ConfigError(
            f"{path!r} names no dataset of the hub: write hub:owner/name, hub:owner/name:split or hub:owner/name@revision/configuration:split"
        )
    return HubDataset(**named.groupdict())


def commit_of(kind: Kind, name: str, revision: str | None, key: str = "model.base") -> str:
    """The commit that a branch or tag (main where None) stands for; ConfigError where it is not to be had, OutOfReach where nobody can tell from here.
    key: of the recipe, that names a model.

    One file is fetched, so that a repository that is closed to this user says so now, not when the run gets there.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        mend = "which needs the package huggingface_hub: pip install 'graft[all]', or name local files"
        raise OutOfReach(f"{name} is on the hub, {mend}", "huggingface_hub is not installed") from None

    class Api(HfApi):
        away = False  # was asked, and did not answer: what follows is the cache's, and not asked five times more

        def repo_info(self, *arguments: Any, **named: Any) -> Any:
            self.away = True
            found = super().repo_info(*arguments, **{"timeout": TIMEOUT_S, **named})
            self.away = False
            return found

    api = Api()
    try:
        commit = api.resolve_revision(name, repo_type=kind, revision=revision).resolved
        try:
            api.hf_hub_download(name, _FIRST[kind], repo_type=kind, revision=commit, local_files_only=api.away)
        except EntryNotFoundError:
            if kind == "model":  # a dataset needs no README
                raise
    except Exception as e:  # noqa: BLE001  the hub has many ways to fail, offline among them
        message = f"{key} = {name!r} {why_not(e)}" if kind == "model" else f"{HUB}{name} {why_not(e)}"
        raise (OutOfReach(message, why) if (why := out_of_reach(e)) else ConfigError(message)) from None
    return commit


def model_folder(base: str, revision: str | None, weights: bool = False, key: str = "model.base") -> Path:
    """A base as a folder: itself, or the hub's cache once config, tokenizer and, where asked, weights are there; ConfigError where it cannot be had.

    key: of the recipe, that names it.
    Of the weights the safetensors that the model is made of, not the copies that some repositories hold in other forms. With a
    revision, `base` is never a folder that happens to have the name.
    """
    if revision is None and Path(base).is_dir():
        return Path(base)
    if base.startswith((".", "/", "~")):
        raise ConfigError(f"{key} = {base!r} is no folder: mend the path, or name a hub id like 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=_SMALL))
        if weights:
            snapshot_download(base, revision=revision, allow_patterns=[*_SMALL, *weight_files(folder)])
    except Exception as e:  # noqa: BLE001  as above
        raise ConfigError(f"{key} = {base!r} {why_not(e)}") from None
    return folder


def config_file(base: str, revision: str | None) -> Path:
    """A base's config.json, on the hub's side the one that commit_of() has brought here; OSError where it is not there."""
    if revision is None:
        return Path(base) / "config.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(base, "config.json", revision=revision, local_files_only=True))


def weight_files(folder: Path) -> list[str]:
    """The names of a model's safetensors files, in order."""
    index = folder / "model.safetensors.index.json"
    return sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]


def why_not(error: Exception) -> str:
    """What goes on a line behind a repository's name: why it cannot be had, and the mend."""
    from huggingface_hub import errors

    login = "set HF_TOKEN or run `hf auth login`"
    chain = _chain(error)
    for link in chain:
        match link:
            case errors.GatedRepoError():
                return f"is gated: ask for access on its page, then {login}"
            case errors.RepositoryNotFoundError():
                return f"is not on the hub, or is private: mend the name, or {login}"
            case errors.RevisionNotFoundError():
                return "has no such branch, tag or commit on the hub: mend the revision"
            case errors.RemoteEntryNotFoundError():
                return f"lacks {Path(link.response.url.path).name} on the hub: mend the name"
            case errors.HfHubHTTPError() if link.response.status_code in (401, 403):
                return f"is refused by the hub: {login} with a token that may read it"
    said = ": ".join(dict.fromkeys(" ".join(str(link).split())[:200] or type(link).__name__ for link in (error, chain[-1])))
    return f"cannot be had from the hub ({said}): mend the name, the network or HF_HUB_OFFLINE, {login}, or name local files"


def out_of_reach(error: Exception) -> str | None:
    """Why it cannot be looked at from here, in a few words; None where the hub has answered that it is not there."""
    from huggingface_hub import errors

    for link in _chain(error):
        match link:
            case errors.GatedRepoError():
                return "it is gated"
            case errors.RepositoryNotFoundError() | errors.RevisionNotFoundError() | errors.RemoteEntryNotFoundError():
                return None
            case errors.HfHubHTTPError():
                status = link.response.status_code
                return None if status == 404 else "the hub refuses it" if status in (401, 403) else f"the hub answers {status}"
    return UNREACHABLE


def _chain(error: BaseException) -> list[BaseException]:
    return [error, *(_chain(error.__cause__) if error.__cause__ else [])]
