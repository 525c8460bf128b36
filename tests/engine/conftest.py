from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_model: pytest imports by file and adds no folder

from tiny_model import build

from graft.engine.hf import HFEngine
from graft.model.chat import load_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(base folder, {adapter name: folder})"""
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def engine(tiny):
    base, adapters = tiny
    return HFEngine(str(base), None, "fp32", adapters, load_tokenizer(str(base)), device="cpu", max_batch=13)
