# SPDX-License-Identifier: Apache-2.0
"""`quantize_dynamic` of an adapted model, which also replaces the factors of LoRA, as they are
linear layers: it computes nearly what it did, and is not merged.
"""

import copy

import pytest
import torch
from helpers.models import TARGETS, mlp
from torch import nn
from torch.ao.quantization import quantize_dynamic

import peft


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_adapted_model_runs_quantized(method, tmp_path):
    base = mlp()
    model = peft.get_peft_model(copy.deepcopy(base), method.config(target_modules=TARGETS)).eval()
    x = torch.randn(5, 8)
    expected = model(x, **method.call)
    known = model.base_model.model[0].get_delta_weight("default", **method.merge)
    quantize_dynamic(model, {nn.Linear}, inplace=True)
    found = model(x, **method.call)
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    with model.disable_adapter():
        assert (model(x) - expected).norm() > (found - expected).norm()
    with pytest.raises(ValueError, match="quantized storage format"):
        model.merge_adapter(**method.merge)
    layer = model.base_model.model[0]
    if isinstance(model.peft_config["default"], peft.LoraConfig):
        assert type(model.base_model.model[0].lora_A["default"]) is not nn.Linear
        with pytest.raises(ValueError, match=r"`base_model.model.0.lora_A` is quantized"):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()
        for read in (
            lambda: layer.get_delta_weight("default"),
            lambda: peft.convert_to_lora(model, 1),
            lambda: peft.adapter_similarity(model),
        ):
            with pytest.raises(ValueError, match="`lora_A` of adapter default is quantized"):
                read()
    else:
        delta = layer.get_delta_weight("default", **method.merge)
        torch.testing.assert_close(delta, known)
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(loaded(x, **method.call), expected)
