# SPDX-License-Identifier: Apache-2.0
"""Adapters that are copies of others, and adapters that were made with one config object."""

from copy import deepcopy

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, llama, mlp
from helpers.states import snapshot
from torch import nn

from peft import (
    PEFT_TYPE_TO_TUNER_MAPPING,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)

VARIANTS = {
    **{name: (name, {}) for name in METHODS},
    "LORA dora": ("LORA", {"use_dora": True, "lora_dropout": 0.5}),
    "LORA pissa": ("LORA", {"init_lora_weights": "pissa_niter_2"}),
    "LOKR lengths": (
        "LOKR",
        {"weight_decompose": True, "use_scalar": True, "rank_dropout": 0.5, "module_dropout": 0.5},
    ),
    "POLY input": ("POLY", {"poly_type": "mope", "n_tasks": 1, "task_rank": 0}),
    "POLY own skills": (
        "POLY",
        {"task_rank": 2, "router_dropout": 0.3, "router_granularity": "model"},
    ),
    "VBLORA gate": (
        "VBLORA",
        {"output_gate": True, "vblora_dropout": 0.5, "save_only_topk_weights": True},
    ),
}


def trained(variant, base=mlp, **more):
    """A model with an adapter whose values are none that an adapter starts with."""
    method, fields = VARIANTS[variant]
    model = get_peft_model(
        base(), METHODS[method].config(**{"target_modules": TARGETS, **fields, **more})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.base_model.set_requires_grad("default")
    return model, {} if "n_tasks" in fields else METHODS[method].call


def output(model, name, x, call):
    before = model.active_adapters
    model.set_adapter(name)
    with torch.no_grad():
        result = model(x, **call)
    model.set_adapter(before[0])
    return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_copy_computes_the_same_and_goes_its_own_way(variant):
    model, call = trained(variant, modules_to_save=["4"])
    x = torch.randn(5, 8)
    for layer in model.base_model.tuner_layers():
        layer.set_scale("default", 3.0)
    model.eval()
    model.copy_adapter("default", "twin")
    assert model.active_adapters == ["default"]
    assert not any(".twin" in name and p.requires_grad for name, p in model.named_parameters())
    start = output(model, "default", x, call)
    torch.testing.assert_close(output(model, "twin", x, call), start, rtol=0, atol=0)
    model.train()
    model(x, **call).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=0.1)
    model.eval()
    assert not torch.allclose(output(model, "default", x, call), start, atol=1e-4)
    torch.testing.assert_close(output(model, "twin", x, call), start, rtol=0, atol=0)
    model.peft_config["default"].target_modules.add("9")
    assert "9" not in model.peft_config["twin"].target_modules


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reference_computes_in_training_what_it_does_in_evaluation(variant):
    model, call = trained(variant)
    model.copy_adapter("default", "ref", reference=True)
    x = torch.randn(5, 8)
    expected = output(model.eval(), "default", x, call)
    for _ in range(3):
        torch.testing.assert_close(output(model.train(), "ref", x, call), expected)


def base():
    torch.manual_seed(0)
    return llama()


def test_a_copy_of_a_loaded_adapter_is_saved_as_that_one_is(method, tmp_path):
    model = get_peft_model(
        base(), method.config(target_modules=["q_proj"], trainable_token_indices=[3, 5])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "first")
    loaded.copy_adapter("default", "again")
    loaded.save_pretrained(tmp_path / "second")
    again = PeftModel.from_pretrained(base(), tmp_path / "second" / "again").eval()
    ids = torch.randint(3, 48, (2, 5))
    once = PeftModel.from_pretrained(base(), tmp_path / "first").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            again(ids, **method.call).logits, once(ids, **method.call).logits
        )


def test_copies_that_are_refused_change_nothing():
    model, _ = trained("LOKR")
    before = snapshot(model)
    for arguments, error, message in (
        (("none", "b"), ValueError, "Adapter none not found"),
        (("default", "default"), ValueError, "already exists"),
        (("default", "a.b"), ValueError, "dot"),
        ((["default"], "b"), TypeError, r"`adapter_name`=\['default'\] must be one adapter's name"),
        ((None, "b"), TypeError, "`adapter_name`=None must be one adapter's name"),
        (("default", ["b"]), TypeError, r"name \['b'\] must be a string"),
        (("default", "b", "x"), TypeError, "`reference`='x' must be True or False"),
    ):
        with pytest.raises(error, match=message):
            model.copy_adapter(*arguments)
        after = snapshot(model)
        assert after["modules"] == before["modules"] and list(model.peft_config) == ["default"]


def test_one_config_object_makes_adapters_of_their_own(method):
    config = method.config(target_modules=TARGETS)
    model = get_peft_model(mlp(), config)
    model.add_adapter("other", config)
    model.add_adapter("third", model.peft_config["default"])
    assert len({id(own) for own in (config, *model.peft_config.values())}) == 4
    layer = model.base_model.model[0]
    drawn = [layer.adapter_tensors(name) for name in ("default", "other")]
    assert any(
        not torch.equal(a, b) for a, b in zip(*drawn, strict=True)
    )  # a fresh adapter, no copy
    if config.peft_type == "POLY":
        model.add_tasks(2)
        counts = [own.n_tasks for own in (config, *model.peft_config.values())]
        assert counts == [3, 5, 3, 3]
        model.set_adapter("other")
        with pytest.raises(ValueError, match="Only 3 tasks available"):
            model(torch.randn(2, 8), task_ids=[0, 4])


ENTRANCES = {
    "get_peft_model": lambda base, config: get_peft_model(base, config),
    "mixed": lambda base, config: get_peft_model(base, config, mixed=True),
    "PeftModel": lambda base, config: PeftModel(base, config),
    "tuner": lambda base, config: PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](
        base, config, "default"
    ),
    "inject": lambda base, config: inject_adapter_in_model(config, base),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_config_object_is_as_it_was_when_an_adapter_was_made_of_it(method, entrance):
    """Two models of different layers are made of one config, at each entrance; neither model, nor a
    change to one, is seen in the config or in the other model. (`from_pretrained` keeps the object
    that it is given: see test_state.)
    """
    config = method.config(target_modules="all-linear")
    before = deepcopy(vars(config))
    bases = (nn.Sequential(nn.Linear(8, 8)), mlp())
    models = [ENTRANCES[entrance](base, config) for base in bases]
    assert vars(config) == before
    one, other = (model.peft_config["default"] for model in models)
    assert len({id(own) for own in (config, one, other)}) == 3
    assert one.target_modules == {"0"} < other.target_modules
    one.target_modules.add("x")
    assert "x" not in other.target_modules and vars(config) == before


@pytest.mark.parametrize("kind", ["SEQ_CLS", "refused name"])
def test_what_a_class_or_a_failed_attempt_sets_is_not_set_in_the_config(method, kind):
    config = method.config(target_modules=["q_proj"], task_type="SEQ_CLS")
    before = deepcopy(vars(config))
    if kind == "SEQ_CLS":
        get_peft_model(llama(), config)
    else:
        with pytest.raises(ValueError, match="without dots"):
            get_peft_model(llama(), config, "a.b")
    assert vars(config) == before


def test_only_trl_gets_a_copy_for_the_config_of_an_adapter():
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    for caller, is_copy in (
        ("trl.trainer.some_trainer", True),
        ("trlx.trainer", False),
        ("__main__", False),
    ):
        scope = {"__name__": caller, "model": model, "config": model.peft_config["default"]}
        exec("model.add_adapter('ref', config)", scope)
        A = model.base_model.model[0].lora_A
        assert torch.equal(A["ref"].weight, A["default"].weight) is is_copy
        model.delete_adapter("ref")
