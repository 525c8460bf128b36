"""The images of questions, from the files beside them to what a model is shown: read, verified and decoded as they are asked about, none kept.

An image of 1 MP takes about 80 ms of a core, and 24 MB until the batch that shows it has been answered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.core.errors import ArtifactError
from graft.model.chat import Messages, files_of
from graft.model.pixels import Unusable, shown, verified

FOLDER = "images"


def images_of(messages: Messages, folder: Path) -> list[Any]:
    """The RGB images of PIL that a conversation shows, in order; ArtifactError for a file of `folder` that is not what its name, a SHA-256, says."""
    return [_opened(folder / file) for file in files_of(messages)]


def _opened(path: Path) -> Any:
    mend = "make the questions again by `graft run RECIPE --from questions`"
    data = verified(path, mend)
    try:
        return shown(data)
    except Unusable as e:
        raise ArtifactError(f"{path} shows nothing ({e}): {mend}") from None
