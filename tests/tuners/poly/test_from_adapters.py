# SPDX-License-Identifier: Apache-2.0
"""Poly adapters whose skills are other adapters: each task computes what its adapter did."""

import math
import re

import pytest
import torch
from helpers.models import gpt2, mlp
from torch import nn

from peft import (
    LoKrConfig,
    LoraConfig,
    PeftError,
    PeftModel,
    PolyConfig,
    convert_to_poly,
    get_peft_model,
    save_as_poly,
)

TARGETS = ["0", "2"]


def lora(r=2, **fields):
    return LoraConfig(
        **{"r": r, "lora_alpha": 5, "init_lora_weights": False, "target_modules": TARGETS, **fields}
    )


def library(base, *configs):
    model = get_peft_model(base, configs[0], "a").eval()
    for name, config in zip("bcdef", configs[1:], strict=False):
        model.add_adapter(name, config)
    return model


def test_every_task_is_its_adapter(tmp_path):
    model = library(
        mlp(),
        lora(),
        lora(3),
        lora(1, target_modules=["2"], use_rslora=True),
        lora(2, target_modules=["4"]),
    )
    x, expected = torch.randn(3, 8), {}
    for name in "abcd":
        model.set_adapter(name)
        expected[name] = model(x).detach()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = save_as_poly(tmp_path, model, ["a", "b", "c", "d"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(error == 0 for error in converted.errors.values()) and converted.config.r == 3
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True).eval()
    assert loaded.peft_config["default"].task_names == ["a", "b", "c", "d"]
    for name in "abcd":
        torch.testing.assert_close(loaded(x, task_ids=name), expected[name], atol=1e-5, rtol=1e-4)
    loaded.add_tasks(["new"], init="mean")
    target = (expected["a"] + expected["b"]) / 2
    fit = loaded.fit_task(
        "new", lambda: (loaded(x, task_ids="new") - target).square().mean(), steps=20
    )
    assert min(fit.losses) < fit.losses[0]
    loaded.train()
    loaded(x, task_ids=["a", "b", "c"]).square().sum().backward()
    assert all(
        layer.poly_lora_B["default"].grad.abs().sum() > 0
        for layer in loaded.base_model.tuner_layers()
    )


def test_tasks_that_share_skills_a_little():
    converted = convert_to_poly(
        library(mlp(), lora(), lora(), lora()), {"a": "sum", "c": "max"}, own_weight=0.9
    )
    logits = converted.state_dict["base_model.model.0.poly_router.module_logits"]
    gates = logits.double().sigmoid()
    torch.testing.assert_close(
        gates / gates.sum(1, keepdim=True),
        torch.tensor([[0.9, 0.1], [0.1, 0.9]]).double(),
        atol=1e-6,
        rtol=0,
    )
    assert converted.config.task_names == ["sum", "max"]
    smaller = convert_to_poly(library(mlp(), lora(4), lora()), ["a", "b"], rank=2)
    assert smaller.config.r == 2 and 0 < smaller.errors["a"] < 1 and smaller.errors["b"] == 0


def test_other_methods_and_layouts(tmp_path):
    model = get_peft_model(
        gpt2(), lora(target_modules=["c_attn"], fan_in_fan_out=True), "a", mixed=True
    ).eval()
    model.add_adapter(
        "b",
        LoKrConfig(
            r=2,
            target_modules=["c_attn", "c_proj"],
            init_weights=False,
            decompose_both=True,
            decompose_factor=4,
        ),
    )
    model.add_adapter(
        "c", PolyConfig(r=2, n_tasks=3, n_splits=2, init_weights=False, target_modules=["c_proj"])
    )
    ids = torch.randint(3, 48, (2, 5))
    expected = []
    for name in "ab":
        model.set_adapter(name)
        expected.append(model(ids).logits)
    save_as_poly(tmp_path / "two", model, ["a", "b"])
    one = convert_to_poly(model, ["c"], task_id=1)
    assert one.config.n_skills == 1 and one.errors["c"] == 0
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "two").eval()
    loaded.get_base_model().load_state_dict(
        {k: v for k, v in loaded.get_base_model().state_dict().items() if "poly" in k}
        | {
            k.replace("c_attn.", "c_attn.base_layer.").replace("c_proj.", "c_proj.base_layer."): v
            for k, v in model.unload().state_dict().items()
        }
    )
    for task, logits in enumerate(expected):
        torch.testing.assert_close(loaded(ids, task_ids=task).logits, logits, atol=1e-4, rtol=1e-3)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.words(x))


BAD = [
    (lambda: library(mlp(), lora()), "a", TypeError, "must be a list of names"),
    (lambda: library(mlp(), lora()), None, TypeError, "`adapters`=None must be a list of names"),
    (lambda: library(mlp(), lora()), ["a", ["a"]], TypeError, r"must have names .*, not \['a'\]"),
    (lambda: library(mlp(), lora()), {"a": 3}, TypeError, "must have names .*, not 3"),
    (lambda: library(mlp(), lora()), [], ValueError, "must name at least one adapter"),
    (lambda: library(mlp(), lora()), ["a", "a"], ValueError, "has a name twice; .*`copy_adapter`"),
    (lambda: library(mlp(), lora(), lora()), {"a": "x", "b": "x"}, ValueError, "has a name twice"),
    (lambda: library(mlp(), lora()), ["z"], ValueError, "Adapter z not found"),
    (lambda: library(mlp(), lora(bias="all")), ["a"], NotImplementedError, "has `bias`='all'"),
    (
        lambda: library(Words(), lora(target_modules=["words", "head"])),
        ["a"],
        TypeError,
        "`words`: Poly adapts linear layers; Embedding",
    ),
    (
        lambda: library(mlp(), PolyConfig(n_tasks=2, target_modules=["0"])),
        ["a"],
        ValueError,
        "task_id should not be None",
    ),
    (mlp, ["a"], TypeError, "the model has no adapters"),
]


@pytest.mark.parametrize(
    ("build", "adapters", "error", "message"), BAD, ids=[case[3][:25] for case in BAD]
)
def test_what_is_refused(build, adapters, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_as_poly(tmp_path / "out", build(), adapters)
    assert not (tmp_path / "out").exists()


WRONG = [
    (name, value)
    for name in ("own_weight", "rank")
    for value in (0, -1, math.nan, 1.5, "1", True, [1])
]


@pytest.mark.parametrize(
    ("option", "value"), [*WRONG, ("own_weight", math.inf), ("own_weight", None)]
)
def test_numbers_that_are_refused(option, value):
    with pytest.raises(
        (TypeError, ValueError), match=re.escape(f"`{option}`={value!r} must be a")
    ) as refusal:
        convert_to_poly(library(mlp(), lora()), ["a"], **{option: value})
    assert isinstance(refusal.value, PeftError)
