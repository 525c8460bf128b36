"""The lowest validation loss of a run: its weights are kept beside the checkpoints, and patience may end the run."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from graft.core.artifact import fsync_dir, fsync_tree
from graft.core.recipe import Train

FOLDER, KEPT = "best", "kept.json"  # KEPT: beside the weights, of which step and loss they are


class Best:
    """Told of each validation, on every rank alike; rank 0 saves. `state` goes into the cursor and comes back from it."""

    def __init__(self, config: Train, run: Path, state: dict[str, Any] | None):
        self.patience, self.folder = config.patience, run / FOLDER if config.keep == "best" else None
        self.kept: dict[str, Any] = {}  # step and loss of the weights in the folder, which after a full disk are not the state's
        if self.folder and state and (self.folder / KEPT).is_file():
            self.kept = json.loads((self.folder / KEPT).read_text(encoding="utf-8"))
        self.state: dict[str, Any] = state or {"loss": None, "step": 0, "waited": 0}

    @property
    def stop(self) -> bool:
        """No lower loss for `patience` validations."""
        return self.patience is not None and self.state["waited"] >= self.patience

    def validated(self, loss: float, step: int, save: Callable[[Path], Any] | None) -> str | None:
        """save: writes the weights into a folder; None on ranks that do not. A kill leaves the old weights, the new or, for a moment, none.

        Returns why they were not kept; then those of an earlier step still are.
        """
        lower = loss < _or_infinite(self.state["loss"])
        self.state = {"loss": loss, "step": step, "waited": 0} if lower else self.state | {"waited": self.state["waited"] + 1}
        if not self.folder or not save or not (lower or loss < _or_infinite(self.kept.get("loss"))):
            return None
        draft = self.folder.with_name(f".{FOLDER}.writing")
        shutil.rmtree(draft, ignore_errors=True)
        kept = {"step": step, "loss": loss}
        try:
            draft.mkdir(parents=True)
            save(draft)
            (draft / KEPT).write_text(json.dumps(kept), encoding="utf-8")
            fsync_tree(draft)
            self.kept = {}  # none, until the new ones are in the place of the old
            shutil.rmtree(self.folder, ignore_errors=True)
            os.rename(draft, self.folder)
            fsync_dir(self.folder.parent)
        except (OSError, SafetensorError) as e:  # both of a full disk
            shutil.rmtree(draft, ignore_errors=True)
            return f"the best weights so far, of step {step}, were not written: {getattr(e, 'strerror', None) or e}"
        self.kept = kept
        return None

    def place(self, target: Path, save: Callable[[Path], Any]) -> dict[str, Any]:
        """The weights of the artifact, the best that are kept or the last; what to say of them."""
        if self.folder and self.kept:
            shutil.copytree(self.folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(KEPT))
            return {"kept_step": self.kept["step"], "kept_validation_loss": self.kept["loss"]}
        save(target)
        return {}


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss
