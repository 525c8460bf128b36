"""The lowest validation loss of a run: its weights are kept beside the checkpoints, and patience may end the run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graft.core.artifact import fsync_dir, fsync_tree
from graft.core.recipe import Train

FOLDER = "best"


class Best:
    """Told of each validation, on every rank alike; rank 0 saves. `state` goes into the cursor and comes back from it."""

    def __init__(self, config: Train, run: Path, state: dict[str, Any] | None):
        self.patience, self.folder = config.patience, run / FOLDER if config.keep == "best" else None
        self.state: dict[str, Any] = state or {"loss": None, "step": 0, "waited": 0}

    @property
    def stop(self) -> bool:
        """No lower loss for `patience` validations."""
        return self.patience is not None and self.state["waited"] >= self.patience

    def validated(self, loss: float, step: int, save: Callable[[Path], Any] | None) -> None:
        """save: writes the weights into a folder; None on ranks that do not. A kill leaves the old weights or the new."""
        if self.state["loss"] is not None and not loss < self.state["loss"]:
            self.state["waited"] += 1
            return
        self.state = {"loss": loss, "step": step, "waited": 0}
        if self.folder and save:
            draft = self.folder.with_name(f".{FOLDER}.writing")
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            save(draft)
            fsync_tree(draft)
            shutil.rmtree(self.folder, ignore_errors=True)
            os.rename(draft, self.folder)
            fsync_dir(self.folder.parent)

    def place(self, target: Path, save: Callable[[Path], Any]) -> dict[str, Any]:
        """The weights of the artifact, the best or the last; what to say of them."""
        if self.folder and self.folder.is_dir():
            shutil.copytree(self.folder, target, dirs_exist_ok=True)
            return {"kept_step": self.state["step"], "kept_validation_loss": self.state["loss"]}
        save(target)
        return {}
