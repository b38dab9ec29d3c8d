# SPDX-License-Identifier: Apache-2.0
"""An adapter for each sample of a batch: always the same as running each sample alone with its
adapter active.
"""

import contextlib
import copy

import numpy
import pytest
import torch
from helpers import models
from helpers.methods import METHODS
from helpers.models import llama, mlp
from torch import nn

import peft


def three_adapters(base, method, **options):
    """A model with the adapters a and b, and c of another size."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base, method.config(**options), "a")
    model.add_adapter("b", method.config(**options))
    model.add_adapter("c", method.config(**{**options, "r": 3}))
    return model.eval()


def task_of(method, sample):
    return {"task_ids": torch.tensor([sample % 3])} if method.call else {}


def all_tasks(method, n):
    return {"task_ids": torch.arange(n) % 3} if method.call else {}


def alone(model, method, name, sample, run):
    """`run` for one sample with one adapter active, or none."""
    if name != "__base__":
        model.set_adapter(name, inference_mode=True)
    with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
        return run(sample, task_of(method, sample))


NAMES = ["b", "a", "__base__", "c", "a", "b"]


@pytest.mark.parametrize(
    "names", [NAMES, ["a"] * 6, ["__base__"] * 6], ids=["mixed", "one", "none"]
)
def test_each_sample_runs_with_its_adapter(method, names):
    model = three_adapters(mlp(torch.float64), method, target_modules=["0", "2"])
    x = torch.randn(6, 8, dtype=torch.float64)
    together = model(x, adapter_names=names, **all_tasks(method, 6))
    each = [
        alone(model, method, n, i, lambda i, call: model(x[i : i + 1], **call))
        for i, n in enumerate(names)
    ]
    torch.testing.assert_close(together, torch.cat(each))


class Stream(nn.Module):
    """A model whose methods are generators, as those that stream their outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        try:
            for _ in range(2):
                x = self.layer(x)
                yield x
        finally:
            self.ended = True

    def generate(self, x):
        for item in self(x):
            yield item.detach()


@pytest.mark.parametrize("run", ["forward", "generate"])
def test_a_method_that_yields_runs_as_the_call_at_each_item(method, run):
    """Between items other calls go their own way."""
    model = three_adapters(Stream(), method, target_modules=["layer"])
    x, names, seen = torch.randn(3, 8), ["b", "__base__", "a"], []
    for item in getattr(model, run)(x, adapter_names=names, **all_tasks(method, 3)):
        seen.append(item)
        list(model(x[:2], **task_of(method, 0)))
    assert len(seen) == 2
    for i, name in enumerate(names):
        own = alone(model, method, name, i, lambda i, call: list(model(x[i : i + 1], **call)))
        torch.testing.assert_close([item[i : i + 1] for item in seen], own)
    model.get_base_model().ended = False
    items = getattr(model, run)(x, adapter_names=names, **all_tasks(method, 3))
    next(items)
    items.close()
    assert model.get_base_model().ended


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generate(method, family, beams):
    model = three_adapters(
        getattr(models, family)(),
        method,
        target_modules={"gpt2": ["c_attn"], "t5": ["q", "v"]}.get(family, ["q_proj", "v_proj"]),
    )
    ids = torch.randint(3, 48, (6, 5))
    options = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False}
    together = model.generate(input_ids=ids, adapter_names=NAMES, **options, **all_tasks(method, 6))
    for i, name in enumerate(NAMES):
        own = alone(
            model,
            method,
            name,
            i,
            lambda i, call: model.generate(input_ids=ids[i : i + 1], **options, **call),
        )
        assert torch.equal(together[i : i + 1], own), (i, name)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_training_reaches_each_adapter_by_its_own_samples(method, checkpointing):
    model = three_adapters(llama(), method, target_modules=["q_proj", "v_proj"])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        # Checkpointing is on in training only; dropout and drawn weights are off so that runs can
        # be compared.
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True
    model.set_requires_grad(["a", "b", "c"], True)
    ids = torch.randint(3, 48, (4, 5))
    names = ["a", "c", "__base__", "a"]
    model(
        input_ids=ids, adapter_names=names, **all_tasks(method, 4)
    ).logits.square().sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert got
    assert not any(".b." in n or n.endswith(".b") for n in got)
    model.zero_grad()
    for i, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
            model(input_ids=ids[i : i + 1], **task_of(method, i)).logits.square().sum().backward()
    model.set_requires_grad(["a", "b", "c"], True)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == got.keys()
    for n, gradient in expected.items():
        torch.testing.assert_close(got[n], gradient, rtol=1e-4, atol=1e-5)


def test_trained_heads_follow(method):
    """A module in `modules_to_save` runs with the copy of each sample's adapter, where it has one."""
    model = three_adapters(mlp(), method, target_modules=["0", "2"], modules_to_save=["4"])
    with torch.no_grad():
        for name in "abc":
            model.base_model.model[4].modules_to_save[name].weight.normal_()
    x = torch.randn(6, 8)
    together = model(x, adapter_names=NAMES, **all_tasks(method, 6))
    each = [
        alone(model, method, n, i, lambda i, call: model(x[i : i + 1], **call))
        for i, n in enumerate(NAMES)
    ]
    torch.testing.assert_close(together, torch.cat(each))


@pytest.mark.compile
def test_compiled_whole(method):
    model = three_adapters(nn.Sequential(nn.Linear(8, 8)), method, target_modules=["0"])
    x = torch.randn(6, 8)
    expected = model(x, adapter_names=NAMES, **all_tasks(method, 6))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, adapter_names=NAMES, **all_tasks(method, 6)), expected)


def test_a_call_without_names_is_as_before_and_a_failed_one_leaves_nothing(method, model):
    model.eval()
    x = torch.randn(4, 8)
    before = model(x, **method.call)
    with pytest.raises(RuntimeError):
        model(x[:, :5], adapter_names=["default"] * 4, **method.call)
    torch.testing.assert_close(model(x, **method.call), before, rtol=0, atol=0)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x, adapter_names=["default"] * 4, **method.call), before)


def test_what_does_not_fit_is_refused(method, model):
    model.eval()
    x = torch.randn(4, 8)
    cases = [
        (["default"] * 3, "Length of `adapter_names`.*3 and 4"),
        ([], "`adapter_names` is empty"),
        (["default", "nobody", "x", "default"], "non-existing adapter.*nobody, x"),
        ("default", "must be a list"),
        ([0, 1, 2, 3], "must be a list"),
    ]
    for names, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            model(x, adapter_names=names, **method.call)
    model.merge_adapter(**method.merge)
    with pytest.raises(ValueError, match="merged adapters"):
        model(x, adapter_names=["default"] * 4, **method.call)


def test_rows_that_do_not_belong_to_samples_are_refused(method):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x[:3])

    model = peft.get_peft_model(Pairs(), method.config(target_modules=["linear"])).eval()
    x = torch.randn(4, 8)
    with pytest.raises(
        ValueError,
        match=r"^linear sees an input of shape \[3, 8\] in a call of 4 samples.*the same adapter",
    ):
        model(x, adapter_names=["default", "__base__"] * 2, **method.call)
    torch.testing.assert_close(
        model(x, adapter_names=["default"] * 4, **method.call), model(x, **method.call)
    )


def test_disabled_adapters_stay_off(method, model):
    model.eval()
    x = torch.randn(4, 8)
    with model.disable_adapter():
        base = model(x)
        torch.testing.assert_close(model(x, adapter_names=["default"] * 4, **method.call), base)


@pytest.mark.parametrize("form", [list, tuple, numpy.array, torch.tensor, lambda ids: range(3)])
def test_task_ids_of_every_form_beside_adapter_names(form):
    config = METHODS["POLY"].config(target_modules=["0"])
    model = peft.get_peft_model(models.mlp(), config, "a").eval()
    model.add_adapter("b", config)
    x, names = torch.randn(3, 8), ["a", "b", "a"]
    found = model(x, task_ids=form([0, 1, 2]), adapter_names=names)
    for i, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(found[i : i + 1], model(x[i : i + 1], task_ids=i))
