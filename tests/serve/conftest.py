from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))  # for tiny_model: pytest imports by file and adds no folder

from tiny_model import build

from graft.serve.runner import ServeSpec


@pytest.fixture(scope="session")
def spec(tmp_path_factory):
    base, adapters = build(tmp_path_factory.mktemp("served"))
    return ServeSpec(str(base), None, "fp32", {name: str(folder) for name, folder in adapters.items()}, str(adapters["one"]), max_batch=4)
