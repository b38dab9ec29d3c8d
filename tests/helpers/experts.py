# SPDX-License-Identifier: Apache-2.0
"""Tiny mixtures of experts of transformers, and the dense weights that they should compute with."""

import torch
from torch import nn

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_OWN = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "head_dim": 8,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "llama4": {
        "head_dim": 8,
        "intermediate_size_mlp": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
}


def mixture(kind, implementation="eager", dtype=torch.float32, seed=0, **sizes):
    """A mixture of experts, with larger random weights than those of a new model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    name = "llama4_text" if kind == "llama4" else kind
    config = AutoConfig.for_model(name, **{**_SIZES, **_OWN[kind], **sizes})
    if kind == "gpt_oss":
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    if kind != "llama4":
        config._experts_implementation = implementation
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tokens(samples=3, length=7, seed=1):
    """Token ids without padding."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(2, 60, (samples, length), generator=random)


def with_deltas(base, deltas, **inputs):
    """The logits of a plain model with some parameters replaced by their sum with a delta."""
    parameters = dict(base.named_parameters())
    summed = {name: parameters[name] + delta for name, delta in deltas.items()}
    return torch.func.functional_call(base, summed, kwargs=inputs).logits


class Loop(nn.Module):
    """Experts of a module that this package does not know: a loop that reads parameters."""

    def __init__(self, experts=3, inner=6, outer=4, dtype=torch.float32):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, outer, inner, dtype=dtype))
        self.mix = nn.Parameter(torch.randn(outer, outer, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(outer, dtype=dtype))

    def forward(self, x):
        summed = sum(nn.functional.linear(x, self.up[i]) for i in range(len(self.up)))
        return torch.tanh(summed) @ self.mix + self.bias


class Outer(nn.Module):
    """A model with a `Loop` inside."""

    def __init__(self, **options):
        super().__init__()
        self.first = nn.Linear(6, 6, dtype=options.get("dtype", torch.float32))
        self.experts = Loop(**options)

    def forward(self, x):
        return self.experts(self.first(x))
