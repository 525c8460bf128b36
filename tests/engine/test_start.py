"""Which engine a recipe gets, and with what in it."""

import importlib.util

import pytest
import torch

from graft.core.errors import ArtifactError, ConfigError
from graft.engine.hf import HFEngine
from graft.engine.protocol import Request
from graft.engine.start import start
from graft.model.chat import load_tokenizer

LIMITS = {"max_batch": 2, "max_adapters": 2, "max_rank": 8}


def test_the_engine_has_its_adapters(tiny, engine):
    base, adapters = tiny
    made = start("auto" if not torch.cuda.is_available() else "hf", str(base), None, "fp32", load_tokenizer(str(base)), adapters=adapters, **LIMITS)
    assert isinstance(made, HFEngine) and made.adapters == list(adapters) and made.max_batch == 2
    request = Request([5, 6, 7], 8, adapter="two")
    assert made.generate([request]) == engine.generate([request])
    with pytest.raises(ArtifactError, match="rank 8"):
        start("hf", str(base), None, "fp32", load_tokenizer(str(base)), adapters=adapters, **LIMITS | {"max_rank": 4})


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_engine_that_is_named_and_not_there_is_one_line(tiny):
    with pytest.raises(ConfigError, match="vLLM cannot be imported"):
        start("vllm", str(tiny[0]), None, "fp32", load_tokenizer(str(tiny[0])), **LIMITS)
