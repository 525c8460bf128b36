"""A dataset of the Hugging Face hub as Arrow files: downloaded once into the cache of `datasets`, then read as any file.

Not streamed, so that what is read has a digest, can be cut into pieces and read again without the network. The cache
(HF_HOME) must lie on a file system that all nodes see. Importing `datasets` costs 1 to 2 s.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from graft.core.errors import ConfigError
from graft.core.hub import dataset_of, why_not


def hub_files(path: str, commit: str) -> list[Path]:
    """The sorted Arrow files of `hub:owner/name[@revision][/configuration][:split]` at a commit, of all splits where none is named.

    Raises ConfigError in one line where the hub cannot be reached (or HF_HUB_OFFLINE is set) and the cache has it not, and
    where there is no such configuration or split.
    """
    named = dataset_of(path)
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(f"{path} needs the package datasets: pip install 'graft[all]', or name local files") from None
    try:
        config = named.config or _default_configuration(named.name, commit)
        # hf:// and not the name alone, which `datasets` would look for in the current folder first
        loaded = load_dataset(f"hf://datasets/{named.name}", config, split=named.split, revision=commit)
    except Exception as e:  # noqa: BLE001  of four packages and many kinds; each means that the dataset cannot be had
        raise ConfigError(f"{path} {why_not(e)}") from None
    splits = [loaded] if named.split else loaded.values()
    files = sorted(Path(file["filename"]) for split in splits for file in split.cache_files)
    if not all(commit in file.parts for file in files):  # without the hub, `datasets` takes what its cache holds of any commit
        raise ConfigError(f"{path}: the cache holds no commit {commit[:12]} of it, and the hub cannot be reached: mend the network or HF_HUB_OFFLINE")
    return files


def _default_configuration(name: str, commit: str) -> str | None:
    """What the README declares: without the hub, `datasets` would take any configuration that its cache holds."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with suppress(EntryNotFoundError):  # nor does it need to have a README
        card = DatasetCard.load(hf_hub_download(name, "README.md", repo_type="dataset", revision=commit))
        return MetadataConfigs.from_dataset_card_data(card.data).get_default_config_name()
    return None
