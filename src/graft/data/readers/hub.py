"""A dataset of the Hugging Face hub as Arrow files: downloaded once into the cache of `datasets`, then read as any file.

Not streamed, so that what is read has a digest, can be cut into pieces and read again without the network. The cache
(HF_HOME) must lie on a file system that all nodes see. Importing `datasets` costs 1 to 2 s.
"""

from __future__ import annotations

import re
from pathlib import Path

from graft.core.errors import ConfigError

_NAME = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?")


def hub_files(path: str) -> list[Path]:
    """The Arrow files of `hub:owner/name[/configuration][:split]`, of all splits where none is named.

    Raises ConfigError in one line where the hub cannot be reached (or HF_HUB_OFFLINE is set) and the cache has it not, and
    where there is no such dataset, configuration or split.
    """
    named = _NAME.fullmatch(path)
    if not named:
        raise ConfigError(f"{path!r} names no dataset of the hub: write hub:owner/name, hub:owner/name:split or hub:owner/name/configuration:split")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(f"{path} needs the package datasets: pip install 'graft[all]', or name local files") from None
    try:
        loaded = load_dataset(named["name"], named["config"], split=named["split"])
    except Exception as e:  # noqa: BLE001  # of four packages and many kinds; each means that the dataset cannot be had
        why = " ".join(str(e).split())[:200]
        raise ConfigError(
            f"{path} cannot be loaded from the hub ({why}): mend the name, the network or HF_HUB_OFFLINE, or name local files"
        ) from None
    splits = [loaded] if named["split"] else loaded.values()
    return [Path(file["filename"]) for split in splits for file in split.cache_files]
