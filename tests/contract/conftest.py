# SPDX-License-Identifier: Apache-2.0
"""The table that signs a method up for the contract suite."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import peft
from peft.base.registry import registered_methods


@dataclass
class Method:
    """How to make and call a method in tests.

    Args:
        config_cls: Its config class.
        fields: A config on layers of sizes that are multiples of 8, random from the start.
        call: Arguments of forward and generate that only this method takes.
        merge: Arguments that merging needs besides.
        no_op: Fields with which a fresh adapter changes nothing, None where there are none.
    """

    config_cls: type
    fields: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    no_op: dict[str, Any] | None = None

    def config(self, **more):
        return self.config_cls(**{**self.fields, **more})


METHODS = {
    "LOHA": Method(
        peft.LoHaConfig, {"r": 2, "alpha": 3, "init_weights": False}, no_op={"init_weights": True}
    ),
    "LOKR": Method(
        peft.LoKrConfig, {"r": 2, "alpha": 3, "init_weights": False}, no_op={"init_weights": True}
    ),
    "LORA": Method(
        peft.LoraConfig,
        {"r": 2, "lora_alpha": 3, "init_lora_weights": False},
        no_op={"init_lora_weights": True},
    ),
    "VBLORA": Method(
        peft.VBLoRAConfig,
        {
            "r": 2,
            "num_vectors": 12,
            "vector_length": 4,
            "init_vector_bank_bound": 1.0,
            "init_logits_std": 1.0,
        },
    ),
    "POLY": Method(
        peft.PolyConfig,
        {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2, "init_weights": False},
        call={"task_ids": 1},
        merge={"task_id": 1},
        no_op={"init_weights": True},
    ),
}


def test_every_registered_method_is_in_the_table():
    assert sorted(METHODS) == registered_methods()


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def mlp(dtype=torch.float32):
    return (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        .to(dtype)
        .eval()
    )


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=48,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
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


TARGETS = ["0", "2"]


@pytest.fixture
def model(method):
    return peft.get_peft_model(mlp(), method.config(target_modules=TARGETS))


def snapshot(model):
    """All that an error must leave alone."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {
            name: parameter.requires_grad for name, parameter in model.named_parameters()
        },
        "modules": {
            name: (type(module).__name__, module.training) for name, module in model.named_modules()
        },
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(before, model):
    after = snapshot(model)
    assert after["requires_grad"] == before["requires_grad"]
    assert after["modules"] == before["modules"]
    assert torch.equal(after["rng"], before["rng"])
    assert after["state"].keys() == before["state"].keys()
    for name, tensor in before["state"].items():
        torch.testing.assert_close(after["state"][name], tensor, rtol=0, atol=0, equal_nan=True)


def assert_rounded(actual, expected, terms=256):
    """Assert that two ways to compute the same differ by rounding alone.

    Each number is a sum of products on the way of which at most `terms` numbers are added, so two
    orders of adding them are apart by at most `terms` units in the last place of the largest. The
    small models here have two layers with some seven products of width 16 or 24.
    """
    size = max(1.0, expected.detach().abs().max().item())
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=terms * torch.finfo(expected.dtype).eps * size
    )
