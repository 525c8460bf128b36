"""A sweep: one recipe at several settings and seeds, as a small TOML file (`configs/sweeps/*.toml`).

Its runs are runs of the recipe under the sweep's name, beside each other as runs with other keys always are: what two of them have
in common has one fingerprint and is made once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from graft.core.errors import ConfigError
from graft.core.recipe import read_toml, validated
from graft.core.sections import Name, Section

OWN = ("name", "seed")  # keys of the recipe that the sweep itself sets


class Arm(Section):
    """One setting of the recipe."""

    name: Name
    set: dict[str, Any] = Field(default_factory=dict)  # recipe keys, as after --set; paths are relative to the recipe
    match_tokens: Name | None = None  # another arm: sft takes as many steps as have that one's tokens, to the nearest step

    @property
    def overrides(self) -> tuple[str, ...]:
        """`set` as the KEY=VALUE of --set."""
        return tuple(f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in _flat(self.set))


class Sweep(Section):
    name: Name  # of the runs and their adapters instead of the recipe's own: data_shards/NAME, checkpoints/NAME
    recipe: str  # relative to this file
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _arms_and_seeds_agree(self) -> Sweep:
        names = [arm.name for arm in self.arms]
        for what, found in (("seeds", self.seeds), ("arms", names)):
            if twice := [x for n, x in enumerate(found) if x in found[:n]]:
                raise ValueError(f"{what} has {twice[0]!r} twice: each run once, under a name of its own")
        for arm in self.arms:
            keys = [key for key, _ in _flat(arm.set)]
            if own := [key for key in keys if key in OWN]:
                raise ValueError(f"arm {arm.name!r} sets {own[0]!r}, which is the sweep's: its seeds and its name are for all arms")
            if arm.match_tokens is None:
                continue
            other = next((a for a in self.arms if a.name == arm.match_tokens), None)
            if other is None or other is arm:
                near = difflib.get_close_matches(arm.match_tokens, [n for n in names if n != arm.name], 1, 0.0)
                hint = f"did you mean {near[0]!r}?" if near else "the sweep has no other arm"
                raise ValueError(f"arm {arm.name!r}: match_tokens names {arm.match_tokens!r}, which is no other arm: {hint}")
            if other.match_tokens:
                raise ValueError(f"arm {arm.name!r}: match_tokens names {other.name!r}, which matches another itself: name {other.match_tokens!r}")
            if scaled := [key for key in keys if key in ("sft.epochs", "sft.max_steps")]:
                raise ValueError(f"arm {arm.name!r} sets {scaled[0]!r} and match_tokens, which sets it too: leave one out")
        return self


def load(path: str | Path) -> Sweep:
    """Read and validate a sweep; raises ConfigError with one line that says what, where and the mend."""
    path = Path(path)
    tree = read_toml(path, "sweep")
    if "arms" not in tree and "sft" in tree:
        raise ConfigError(f"{path} is a recipe: a sweep names one (`recipe = …`), with seeds and [[arms]]")
    return validated(Sweep, tree, path)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
