"""Bases of the hub: loaded by graft's own loaders from a hub of the test's own (tests/hub.py)."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedModel

from graft.core.recipe import EmbeddedBase, Train
from graft.model.base import load_base, random_llama

from ..engine.tiny_model import tiny_tokenizer

NAME = "owner/tiny-llama"
LOAD = """
import torch
from graft.model.base import load_base
from graft.model.chat import load_tokenizer
from graft.model.stream import load_fused
base, answer = sys.argv[1], []
for revision in sys.argv[2:]:
    revision = revision or None
    ids = load_tokenizer(base, revision)("Draw me a shiba")["input_ids"]
    models = load_base(base, revision, "fp32", "cpu"), load_fused(base, revision, "fp32", None, torch.device("cpu"), 0)
    with torch.no_grad():
        answer.append([ids, *(model(input_ids=torch.tensor([ids])).logits[0, -1].tolist() for model in models)])
"""
FETCH = """
from graft.core.hub import model_folder
answer = sorted(path.name for path in model_folder(sys.argv[1], None, weights=True).iterdir())
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """make(seed) -> (files of a random Llama in several shards, what LOAD answers of it)."""

    def make(seed: int) -> tuple[dict[str, bytes], list[list[float]]]:
        folder, tokenizer = tmp_path_factory.mktemp("base"), tiny_tokenizer()
        shape = EmbeddedBase(hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, train=Train(lora=None))
        model = random_llama(shape, len(tokenizer), 64, seed).eval()
        model.save_pretrained(folder, max_shard_size="50KB")
        tokenizer.save_pretrained(folder)
        ids = tokenizer("Draw me a shiba")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].tolist()
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert sum(name.endswith(".safetensors") for name in files) > 1
        return files, [ids, logits, logits]

    return make


def same(got, wanted) -> bool:
    return got[0] == wanted[0] and all(torch.allclose(torch.tensor(g), torch.tensor(w), atol=1e-5) for g, w in zip(got[1:], wanted[1:], strict=True))


def test_a_branch_and_a_commit_are_loaded_and_nothing_is_downloaded_twice(hub, client, made):
    (files, wanted), (others, other) = made(1), made(2)
    assert not same(wanted, other)
    copies = {"original/consolidated.safetensors": b"0" * 1000, "pytorch_model.bin": b"0" * 1000}
    commit = hub.push(f"models/{NAME}", files | copies)
    hub.push(f"models/{NAME}", others, branch="next")
    now, next_one = client.asks(LOAD, NAME, "", "next")
    assert same(now, wanted) and same(next_one, other)
    sent = [name for name in files if not name.endswith(".md")]
    assert {*hub.downloads} == {*sent}, "no other form of the weights"
    hub.push(f"models/{NAME}", others)
    (client.root / NAME).mkdir(parents=True)  # in the current folder, and no model
    hub.requests.clear()
    [again] = client.asks(LOAD, NAME, commit)
    assert same(again, wanted) and not hub.requests


def refused(client, **extra: str) -> str:
    said = client.asks(FETCH, NAME, **extra)
    assert isinstance(said, str) and "\n" not in said and said.startswith(f"model.base = '{NAME}'"), said
    return said


def test_a_base_that_cannot_be_had_is_one_line(hub, client, made):
    files, _ = made(1)
    assert "is not on the hub, or is private" in refused(client)
    hub.push(f"models/{NAME}", files)
    hub.access[f"models/{NAME}"] = "gated"
    assert "is gated" in (said := refused(client)) and "HF_TOKEN" in said
    hub.access.clear()
    hub.down = True
    assert "500" in refused(client)
    hub.down = False
    assert "HF_HUB_OFFLINE" in refused(client, HF_HUB_OFFLINE="1")
    hub.cut_bytes, hub.gone_after_cut = 1000, True
    assert "disconnected" in refused(client)
    hub.gone = False
    assert client.asks(FETCH, NAME) == sorted(name for name in files if not name.endswith(".md"))


def test_two_loads_at_once_leave_the_next_one_whole(tmp_path):
    shape = EmbeddedBase(hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, train=Train(lora=None))
    random_llama(shape, 300, 64, 0).save_pretrained(tmp_path)
    ties = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as at_once:
        for model in at_once.map(lambda _: load_base(str(tmp_path), None, "fp32", "cpu"), range(12)):
            assert not any(p.is_meta for p in model.parameters())
    assert PreTrainedModel.tie_weights is ties
