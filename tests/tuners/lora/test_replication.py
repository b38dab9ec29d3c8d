# SPDX-License-Identifier: Apache-2.0
"""`layer_replication`: repeated layers share the base weights, and have adapters of their own."""

import copy

import pytest
import torch
from helpers.models import llama
from helpers.states import assert_unchanged, snapshot
from torch import nn

import peft
from peft import LoraConfig, PeftModel, get_peft_model

IDS = torch.tensor([[3, 1, 4, 1, 5]])
MAP = [[0, 2], [1, 2]]


def base():
    torch.manual_seed(0)
    return llama().eval()  # of two layers


def config(**fields):
    return LoraConfig(
        **{"r": 2, "target_modules": ["q_proj", "down_proj"], "layer_replication": MAP, **fields}
    )


def deep(weights_of=None):
    """A model of three layers whose weights are those of layers 0, 1 and 1."""
    result, source = llama(num_hidden_layers=3).eval(), base() if weights_of is None else weights_of
    state = source.state_dict()
    state |= {
        key.replace("layers.1.", "layers.2."): value
        for key, value in state.items()
        if "layers.1." in key
    }
    result.load_state_dict(state)
    return result


def shaken(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def test_a_deeper_model_with_an_adapter_for_each_layer(tmp_path):
    """It computes as an adapter of a model that has the layers as its own."""
    own = base()
    numbers = sum(p.numel() for p in own.parameters())
    model = get_peft_model(own, config())
    shaken(model)
    assert sum(p.numel() for n, p in model.named_parameters() if "lora" not in n) == numbers
    assert (len(own.model.layers), own.config.num_hidden_layers) == (3, 3)
    assert [layer.self_attn.layer_idx for layer in own.model.layers] == [0, 1, 2]
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(deep(), tmp_path, config=config(layer_replication=None))
    expected = plain(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected)
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, plain.generate(IDS, max_new_tokens=4, do_sample=False))
    again = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(again(IDS).logits, expected)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    torch.testing.assert_close(copy.deepcopy(again)(IDS).logits, expected)
    with pytest.raises(NotImplementedError, match="Cannot merge adapters while layers are repl"):
        again.merge_adapter()
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected)
    assert len({id(p) for p in merged.parameters()}) == len(list(deep().parameters()))
    assert type(merged.model.layers) is nn.ModuleList


def test_the_model_gets_its_layers_back():
    plain = base()
    expected, before = plain(IDS).logits, snapshot(plain)
    layers = plain.model.layers
    model = get_peft_model(plain, config())
    result = model.unload()
    assert result.model.layers is layers and result.config.num_hidden_layers == 2
    torch.testing.assert_close(result(IDS).logits, expected)
    del before


def test_what_can_not_be_repeated():
    plain = base()
    before = snapshot(plain)
    for fields, message in (
        ({"layer_replication": [[0, 4]]}, "`model.layers` has 2 layers"),
        ({"layer_replication": [[0, 1]], "target_modules": ["nothing"]}, "nothing"),
        ({"layer_replication": [[1, 1]]}, "must be a list of ranges"),
        ({"layer_replication": [0, 1]}, "must be a list of ranges"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(plain, config(**fields))
        assert_unchanged(before, plain)
        assert plain.config.num_hidden_layers == 2
    report = peft.plan(plain, config())
    assert len(report.layers) == 6
    assert_unchanged(before, plain)
    model = get_peft_model(plain, config(layer_replication=None))
    with pytest.raises(ValueError, match="would change the layers that other adapters have"):
        model.add_adapter("second", config())
    model = get_peft_model(base(), config())
    model.add_adapter("second", config(layer_replication=None))
    assert len(model.base_model.model.model.layers) == 3
    with pytest.raises(ValueError, match="Could not locate the layers attribute"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), config(target_modules=["0"]))
