"""The forward pass that brings weights in one at a time gives the whole model's logits, for models of several kinds; the figures are their formulas'."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

from graft.core.errors import ConfigError
from graft.core.recipe import Lora
from graft.model.base import load_base
from graft.model.lora import PREFIX, read_adapter
from graft.train import merge_compare
from graft.train.merge_compare import TEXTS, TOKENS, difference, logits_of, tokens_of
from graft.train.merge_weights import Adapter, MergeBase

from ..engine.tiny_model import random_adapter, tiny_tokenizer

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 330, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=8),  # its embedding is scaled
    "gpt2": GPT2Config(vocab_size=330, n_embd=64, n_layer=2, n_head=4, n_positions=48),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            p.data.mul_(4) if p.dim() > 1 else p.data.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_a_model_that_is_read_as_it_runs_gives_the_logits_of_the_whole(bases, name, monkeypatch):
    monkeypatch.setattr(merge_compare, "_SLICE", 1000)  # several slices of each weight
    base, whole = MergeBase(str(bases / name), None, "fp32", CPU), load_base(str(bases / name), None, "fp32", "cpu")
    texts = [torch.arange(3, 40), torch.tensor([5]), torch.arange(100, 112)]
    for _ in range(2):  # and leaves the empty model as it was
        for got, text in zip(logits_of(base, base.trained, None, texts), texts, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(got, whole(text[None]).logits[0], rtol=1e-5, atol=1e-5)
        assert all(p.is_meta for p in base.lm.parameters())


def test_learned_positions_end_where_the_model_ends(bases):
    base, whole = MergeBase(str(bases / "gpt2"), None, "fp32", CPU), load_base(str(bases / "gpt2"), None, "fp32", "cpu")
    texts = tokens_of(tiny_tokenizer(), base)
    assert max(map(len, texts)) == 48 < TOKENS
    with torch.no_grad():
        torch.testing.assert_close(logits_of(base, base.trained, None, texts)[0], whole(texts[0][None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_adapter_beside_the_weights_is_pefts(bases, name, tmp_path):
    from peft import PeftModel

    folder = random_adapter(bases / name, Lora(r=4, alpha=12), tmp_path / "adapter", 1)
    base, adapter = MergeBase(str(bases / name), None, "fp32", CPU), Adapter(folder)
    theirs, plain = (PeftModel.from_pretrained(load_base(str(bases / name), None, "fp32", "cpu"), folder).eval() for _ in range(2))
    plain.disable_adapter_layers()
    text = torch.arange(3, 40)
    with torch.no_grad():
        wanted, without = theirs(text[None]).logits[0], plain(text[None]).logits[0]
    torch.testing.assert_close(logits_of(base, base.trained, adapter, [text])[0], wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - without).abs().max() > 0.1
    assert len(adapter.pairs) == 14 and PREFIX not in next(iter(read_adapter(folder)[1]))


def test_divergence_and_difference_are_their_formulas():
    torch.manual_seed(0)
    p, q = [torch.randn(3, 7) * 2, torch.randn(5, 7)], [torch.randn(3, 7), torch.randn(5, 7)]
    found = difference(p, q)
    of_p, of_q = (F.softmax(torch.cat(x), -1) for x in (p, q))
    assert found.kl_nats == pytest.approx((of_p * (of_p / of_q).log()).sum(-1).mean().item(), rel=1e-5)
    assert found.logit_difference_max == (torch.cat(p) - torch.cat(q)).abs().max().item()
    assert found.logit_std == pytest.approx(torch.cat(p).std().item())
    assert difference(p, p)[:2] == (0.0, 0.0)
    q[0][1, 2] = float("nan")
    broken = difference(p, q)
    assert broken.kl_nats != broken.kl_nats and broken.logit_difference_max != broken.logit_difference_max


def test_the_texts_are_of_every_script_and_long_enough(bases):
    assert (
        any("佇" in t for t in TEXTS) and any("tī" in t for t in TEXTS) and any("在尊嚴" in t for t in TEXTS) and any("born free" in t for t in TEXTS)
    )
    texts = tokens_of(tiny_tokenizer(), MergeBase(str(bases / "llama"), None, "fp32", CPU))
    assert len(texts) == 5 and all(len(t) == TOKENS for t in texts)


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(bases):
    base = MergeBase(str(bases / "llama"), None, "fp32", CPU)
    base.config.vocab_size = 200
    with pytest.raises(ConfigError, match=r"gives the id \d+, its model has 200 embeddings"):
        tokens_of(tiny_tokenizer(), base)
