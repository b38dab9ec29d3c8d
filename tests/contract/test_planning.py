# SPDX-License-Identifier: Apache-2.0
"""What `plan` says of an adapter, against the adapter itself: counted, multiplied out, its rank
taken.
"""

import copy
import math
import re

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama, mlp
from helpers.states import assert_unchanged, snapshot
from helpers.variants import CASES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import peft
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, plan


@pytest.mark.parametrize("name", CASES)
def test_a_plan_counts_what_is_made(name):
    case = CASES[name]
    base, config = case.base(), case.config()
    before, fields = snapshot(base), copy.deepcopy(vars(config))
    found = plan(base, config)
    assert_unchanged(before, base)
    assert vars(config) == fields
    model = get_peft_model(base, config)
    layers = dict(model.base_model.named_tuner_layers())
    own = {
        n: p
        for n, p in model.named_parameters()
        if "base_layer" not in n and any(part in n for part in ("default",))
    }
    assert found.parameters == sum(p.numel() for p in own.values())
    assert found.bytes == sum(p.numel() * p.element_size() for p in own.values())
    assert [layer.path for layer in found.layers] == list(layers)
    assert found.base_parameters == sum(p.numel() for p in case.base().parameters())
    for planned in found.layers:
        weight = layers[planned.path].get_base_layer().weight
        assert planned.base_multiplications == weight.numel()
        assert planned.full_rank == min(weight.shape[0], weight[0].numel())


@pytest.mark.parametrize("name", METHODS)
def test_a_model_without_memory_does_as_well(name):
    with torch.device("meta"):
        empty = llama()
    config = METHODS[name].config(
        target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]
    )
    found, real = plan(empty, config), plan(llama(), config)
    assert found == real
    text = str(found)
    assert "model.layers.*.self_attn.q_proj (2x)  Linear 16->16" in text
    assert f"{name} on 4 layers: {found.parameters:,} parameters" in text
    assert found.shared["lm_head"] == 48 * 16


def blocks(*sizes):
    """Numbered blocks, in each of which are numbered layers of the given sizes."""
    return nn.ModuleList(
        nn.ModuleDict(
            {"resnets": nn.ModuleList(nn.ModuleDict({"conv": nn.Conv2d(i, o, 3)}) for i, o in each)}
        )
        for each in sizes
    )


def unet():
    sizes = [(4, 8), (8, 8)], [(8, 16), (16, 16)], [(16, 16), (16, 16)]
    return nn.ModuleDict({
        "conv_in": nn.Conv2d(2, 4, 3),
        "down": blocks(*sizes),
        "mid": blocks([(16, 16)]),
        "up": blocks(*[[(o, i) for i, o in reversed(each)] for each in reversed(sizes)]),
        "other": nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(16, 16, 3)}), nn.ReLU(), nn.ModuleDict({"conv": nn.ReLU()})]),
    })  # fmt: skip


@pytest.mark.parametrize("excluded", [r"", r"|down\.1\..*", r"|up\.[02]\.resnets\.1\..*"])
def test_rows_name_the_modules_that_they_are_about(excluded):
    """Each row's name, read as a pattern for the model's own modules, gives as many as it says, and
    of the size it says.
    """
    model = unet()
    modules = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)
    }
    found = plan(
        model,
        LoraConfig(
            target_modules=["conv", "conv_in"], exclude_modules=r"other\.2\.conv" + excluded
        ),
    )
    seen = []
    for row in str(found).splitlines()[1 : -1 - len(found.remarks)]:
        name, count, size = re.fullmatch(
            r"(\S+)(?: \((\d+)x\))?  +(Conv2d \d+->\d+) 3x3  .*", row
        ).groups()
        pattern = re.escape(name).replace(r"\*", r"\d+")
        pattern = re.sub(
            r"\\{(.*?)\\}", lambda m: "[" + m[1].replace("\\", "").replace(",", "") + "]", pattern
        )
        meant = [path for path in modules if re.fullmatch(pattern, path)]
        assert len(meant) == int(count or 1), row
        assert {
            f"Conv2d {modules[path].in_channels}->{modules[path].out_channels}" for path in meant
        } == {size}
        seen += meant
    assert sorted(seen) == sorted(layer.path for layer in found.layers)
    assert len(set(seen)) == len(seen)


def test_a_plan_is_short_in_a_debugger_and_a_table_in_a_notebook():
    found = plan(llama(), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
    assert (
        repr(found)
        == "<AdapterPlan: LORA on 1 layer, 64 parameters, 256 bytes; print it for a table>"
    )
    assert "\nmodel.layers.1.self_attn.q_proj  Linear" in str(found)

    class Printer:
        def text(self, text):
            self.shown = text

    printer = Printer()
    found._repr_pretty_(printer, False)
    assert printer.shown == str(found)


SHAPES = {
    "linear": (lambda: nn.Linear(24, 40), (1, 24)),
    "conv2d": (lambda: nn.Conv2d(16, 32, 3, padding=1), (1, 16, 6, 6)),
    "conv2d stride": (lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1), (1, 16, 8, 8)),
    "conv2d groups": (lambda: nn.Conv2d(16, 32, 3, padding=1, groups=2), (1, 16, 6, 6)),
}
FORMS = {
    "lokr": LoKrConfig(r=1),
    "lokr whole": LoKrConfig(full_matrix=True),
    "lokr both": LoKrConfig(r=1, decompose_both=True, decompose_factor=4),
    "lokr tucker": LoKrConfig(r=1, use_effective_conv2d=True),
    "loha": LoHaConfig(r=2),
    "loha whole": LoHaConfig(r=9),
    "lora": LoraConfig(r=4),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SHAPES)
def test_cost_and_rank_are_those_of_the_adapter(kind, form):
    make, shape = SHAPES[kind]
    config = copy.deepcopy(FORMS[form])
    config.target_modules = {"0"}
    planned = plan(nn.Sequential(make()), config).layers[0]
    model = get_peft_model(nn.Sequential(make()), config)
    layer, x = model.base_model.model[0], torch.randn(shape)
    with torch.no_grad():
        for parameter in layer.adapter_parameters("default"):
            parameter.normal_()
    if kind != "conv2d groups" or form != "lora":  # there the delta goes across the groups
        delta = layer.get_delta_weight("default").double().flatten(1)
        assert torch.linalg.matrix_rank(delta, rtol=1e-6) == planned.rank
    if kind == "conv2d groups":
        return
    with FlopCounterMode(display=False) as counter:
        layer.delta_activations("default", x)
    positions = math.prod(layer.base_layer(x).shape[2:])
    # Composing factors does not grow with the input; it is not in the plan, and little here but for
    # the whole product of LoHa.
    once = layer.get_delta_weight("default").numel() * 2 * config.r if form == "loha whole" else 0
    counted = (counter.get_total_flops() / 2 - once) / positions
    assert counted == pytest.approx(planned.multiplications, rel=0.15 if kind != "linear" else 0.05)


def test_remarks():
    base = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(64, 64))
    small = plan(base, LoKrConfig(r=8, decompose_factor=4, target_modules=["0"]))
    (remark,) = small.remarks
    assert remark.startswith("a larger factor takes fewer parameters: `decompose_factor`=")
    factor = int(remark.split("=")[1].split()[0])
    better = plan(base, LoKrConfig(r=8, decompose_factor=factor, target_modules=["0"]))
    assert better.parameters < small.parameters and not better.remarks
    assert f"{better.parameters:,} in place of {small.parameters:,}" in remark
    whole = plan(base, LoKrConfig(r=8, target_modules=["0", "1"]))
    assert whole.remarks == {
        "`r`=8 is at least half of 8, so W2 is a full matrix; `r` only divides the scale.": ["1"]
    }
    assert "! `1`: `r`=8 is at least half of 8" in str(whole)
    assert not plan(base, LoKrConfig(full_matrix=True, target_modules=["1"])).remarks
    assert (
        "`r`=100 is above the weight's own rank, 64."
        in plan(base, LoraConfig(r=100, target_modules=["1"])).remarks
    )
    assert "are no cheaper than the full product" in str(
        plan(base, LoHaConfig(r=8, target_modules=["1"]))
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="not found in the base model"):
        plan(mlp(), LoKrConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="must be a PeftConfig"):
        plan(mlp(), {"r": 8})
    assert peft.plan is plan
