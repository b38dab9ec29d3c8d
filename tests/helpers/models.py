# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, one of a kind."""

import torch
from torch import nn

# The linear layers of `mlp` that tests adapt.
TARGETS = ["0", "2"]


def mlp(dtype=torch.float32):
    return (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        .to(dtype)
        .eval()
    )


def llama(**fields):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 48,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            **fields,
        }
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        vocab_size=48,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        vocab_size=48,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
    )
    return T5ForConditionalGeneration(config).eval()
