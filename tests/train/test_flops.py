"""The FLOP formula at the shape whose numbers are published: Llama-3.1-8B with r = 16 on all seven projections."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.core.recipe import Lora
from graft.model.lora import inject
from graft.train.flops import Flops


def test_llama_8b_counts():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
    )
    with torch.device("meta"):
        lm = LlamaForCausalLM(config)
        whole = Flops.of(lm)
        inject(lm, Lora(r=16), torch.bfloat16, 0)
    flops = Flops.of(lm)
    assert flops.matmul == whole.matmul == 7_504_658_432  # all weights but the input embedding and the norms
    assert flops.adapter == 41_943_040 and whole.adapter == 0
    assert flops.attention_width == 32 * 32 * 128
    one = flops.per_step(1, 1)
    assert one == 4 * flops.matmul + 6 * flops.adapter + 3 * 4 * flops.attention_width
    assert whole.per_step(10, 1) == 10 * (6 * whole.matmul + 3 * 4 * whole.attention_width)
