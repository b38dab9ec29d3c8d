# SPDX-License-Identifier: Apache-2.0
"""Switching, deleting and copying adapters: what is trained, what is refused, what a copy has."""

import pytest
import torch
from helpers.adapted import adapted
from helpers.models import TARGETS

from peft import LoraConfig, VBLoRAConfig
from peft.core import filling, switching
from peft.core.injection import Construction
from peft.utils.error import CheckpointError, PeftTypeError, PeftValueError

X = torch.linspace(-1, 1, 16).reshape(2, 8)


def bank_config(**fields):
    return VBLoRAConfig(r=2, num_vectors=8, vector_length=4, target_modules=TARGETS, **fields)


# --- switching ---------------------------------------------------------------------------------


def test_a_shared_bank_is_trained_with_its_adapter_and_frozen_with_it():
    model = adapted(bank_config(), "a")
    model.add_adapter("b", bank_config())
    banks = model.vblora_vector_bank

    def state():
        return banks["a"].requires_grad, banks["b"].requires_grad

    assert state() == (True, False)
    model.set_adapter("b")
    assert state() == (False, True)
    model.set_adapter("b", inference_mode=True)
    assert state() == (False, False)
    model.set_requires_grad("a", True)
    assert state() == (True, False)
    model.set_requires_grad(["a", "b"], True)
    assert state() == (True, True)
    model.set_requires_grad("b", False)
    with model.disable_adapter():
        assert state() == (False, False)
        with model.disable_adapter():
            assert state() == (False, False)
        assert state() == (False, False)
    assert state() == (True, False)
    model.base_model.disable_adapter_layers()
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert state() == (True, False)
    model.delete_adapter("a")
    assert list(banks) == ["b"]


def test_what_can_not_be_deleted():
    model = adapted()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    for name, kind, message in (
        (["default"], PeftTypeError, "must be one adapter's name; delete several one by one"),
        ("x", PeftValueError, "x does not exist"),
    ):
        with pytest.raises(kind, match=message):
            model.delete_adapter(name)
    model.base_model.model[2].merge(adapter_names=["default"])
    with pytest.raises(PeftValueError, match=r"\['default'\] while they are merged"):
        model.delete_adapter("default")
    model.delete_adapter("b")
    assert list(model.peft_config) == ["default"]


def test_one_merged_layer_makes_a_model_merged():
    model = adapted()
    parts = [model.base_model.model[0], model.base_model.model[2]]
    assert not switching.is_merged(parts)
    parts[1].merge()
    assert switching.is_merged(parts)
    with model.disable_adapter():  # merged until adapters were switched off
        assert not parts[1].merged and switching.is_merged(parts)


# --- filling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["modules", "parameters"])
def test_a_replicated_adapter_has_the_scale_that_was_set(target):
    """`copy_fill`: values and what is in no checkpoint."""
    fields = {"target_modules": TARGETS}
    if target == "parameters":
        fields = {"target_modules": [], "target_parameters": ["0.weight", "2.weight"]}
    model = adapted(LoraConfig(r=2, lora_alpha=8, **fields))
    model.base_model.model[0].set_scale("default", 3.0)
    fill = filling.copy_fill(model, model.peft_config["default"], "default")
    config = LoraConfig(r=2, lora_alpha=8, **fields)
    model.add_filled_adapter("twin", config, fill, Construction(True))
    expected = model(X)
    model.set_adapter("twin")
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)


def test_a_wrong_set_of_tensors_fills_nothing():
    model = adapted()

    def fill(build):
        filling.fill_with(build, {"x": torch.ones(1)})

    with pytest.raises(CheckpointError, match="'new' does not hold this adapter's weights"):
        model.add_filled_adapter(
            "new", LoraConfig(r=2, target_modules=TARGETS), fill, Construction(True)
        )
    assert list(model.peft_config) == ["default"]
