# SPDX-License-Identifier: Apache-2.0
"""Optimisers that give each role of an adapter's parameters a rate of its own, for every method."""

import copy

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, llama, mlp
from torch import nn

import peft
from peft import LoraConfig, get_peft_model
from peft.base.registry import PEFT_TYPE_TO_TUNER_MAPPING
from peft.optimizers import (
    create_loraplus_optimizer,
    create_optimizer,
    parameter_groups,
    trainer_optimizer,
)

COMPANIONS = {"modules_to_save", "tokens", "biases", "base"}


def names_in(model, groups):
    """The names of each group's parameters, by the group's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    result = {}
    for group in groups:
        result.setdefault(group["name"], []).extend(
            names[id(parameter)] for parameter in group["params"]
        )
    return result


def by_name(groups):
    return {group["name"]: group for group in groups}


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_every_trainable_parameter_is_in_one_group_and_has_a_role(method, model):
    groups = parameter_groups(model, 0.3)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in trainable(model))
    roles = PEFT_TYPE_TO_TUNER_MAPPING[model.peft_type].parameter_roles
    assert {group["name"] for group in groups} <= set(roles)
    order = [group["name"] for group in groups]
    assert order == sorted(order, key=list(roles).index)


def test_roles_name_containers_that_there_are():
    for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values():
        holders = {*tuner.tuner_layer_cls.container_names, *tuner.shared_parameter_names}
        named = [
            parameter.partition(".")[0]
            for role in tuner.parameter_roles.values()
            for parameter in role.parameters
        ]
        assert holders == set(named)


PUBLISHED = {"VBLORA": {"bank": 1e-3, "logits": 1e-2}, "POLY": {"router": 0.1, "skills": 1e-3}}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_published_rates_stand_until_the_user_says_otherwise(name):
    model = get_peft_model(mlp(), METHODS[name].config(target_modules=TARGETS))
    published = PUBLISHED.get(name, {})
    for group in parameter_groups(model):
        assert group.get("lr") == published.get(group["name"])
    for group in parameter_groups(model, 0.3):
        assert group["lr"] == published.get(group["name"], 0.3)
    role = parameter_groups(model)[0]["name"]
    groups = by_name(parameter_groups(model, 0.3, rates={role: 0.5}, ratios={role: 4}))
    assert groups[role]["lr"] == 2.0


def test_a_step_moves_each_role_at_its_rate(method, model):
    """With plain gradient descent a step is the rate times the gradient."""
    roles = [group["name"] for group in parameter_groups(model)]
    rates = {role: 0.25 * (i + 1) for i, role in enumerate(roles)}
    optimiser = create_optimizer(model, torch.optim.SGD, lr=7.0, rates=rates)
    model.train()
    model(torch.randn(5, 8), **method.call).square().sum().backward()
    before = {
        name: (p.detach().clone(), p.grad.clone())
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    role_of = {
        name: role
        for role, names in names_in(model, optimiser.param_groups).items()
        for name in names
    }
    assert before.keys() == role_of.keys()
    optimiser.step()
    for name, parameter in model.named_parameters():
        if name in before:
            value, gradient = before[name]
            torch.testing.assert_close(parameter.detach(), value - rates[role_of[name]] * gradient)


def test_what_is_trained_beside_the_adapter_has_roles_too(method):
    base = llama()
    fields = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}
    model = get_peft_model(base, method.config(target_modules=["q_proj"], **fields))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    model.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    found = names_in(model, parameter_groups(model, 0.3, weight_decay=0.1))
    assert COMPANIONS - found.keys() == {"biases"}
    assert all("lm_head" in name for name in found["modules_to_save"])
    assert len(found["tokens"]) == 1 and "trainable_tokens_delta" in found["tokens"][0]
    assert {name.rpartition(".model.")[2] for name in found["base"]} == {
        "norm.weight",
        "layers.0.mlp.up_proj.weight",
    }
    decay = {
        group["weight_decay"]
        for group in parameter_groups(model, 0.3, weight_decay=0.1)
        if group["name"] == "base"
    }
    assert decay == {0.1, 0.0}


def test_biases_do_not_decay():
    model = get_peft_model(
        mlp(), LoraConfig(target_modules=TARGETS, bias="all", lora_bias=True, use_dora=False)
    )
    groups = parameter_groups(model, 0.3, weight_decay=0.1)
    for group in groups:
        names = names_in(model, [group])[group["name"]]
        assert {name.endswith("bias") for name in names} == {group["weight_decay"] == 0.0}
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("A", 0.1),
        ("B", 0.1),
        ("B", 0.0),
        ("biases", 0.0),
    ]


def test_bank_and_logits_do_not_decay():
    model = get_peft_model(mlp(), METHODS["VBLORA"].config(target_modules=TARGETS))
    assert {group["weight_decay"] for group in parameter_groups(model, weight_decay=0.1)} == {0.0}


def test_frozen_adapters_are_left_out(method, model):
    model.add_adapter("other", method.config(target_modules=TARGETS))
    names = [name for names in names_in(model, parameter_groups(model)).values() for name in names]
    assert names and all("default" in name for name in names)
    model.set_adapter("other")
    names = [name for names in names_in(model, parameter_groups(model)).values() for name in names]
    assert names and all("other" in name for name in names)


def test_adapters_of_several_methods():
    model = get_peft_model(
        mlp(), METHODS["LOKR"].config(target_modules=TARGETS, alpha=2), "a", mixed=True
    )
    model.add_adapter("b", METHODS["VBLORA"].config(target_modules=TARGETS))
    model.set_adapter(["a", "b"])
    groups = by_name(parameter_groups(model, 0.3))
    assert {
        name: group["lr"] for name, group in groups.items() if name in ("bank", "logits", "full")
    } == {
        "full": 0.3,
        "bank": 1e-3,
        "logits": 1e-2,
    }


def test_an_injected_model_and_a_wrapped_one(method):
    inner = mlp()
    peft.inject_adapter_in_model(method.config(target_modules=TARGETS), inner)
    wrapped = nn.DataParallel(get_peft_model(mlp(), method.config(target_modules=TARGETS)))
    compiled = torch.compile(get_peft_model(mlp(), method.config(target_modules=TARGETS)))
    shapes = [
        [(g["name"], g.get("lr"), [p.shape for p in g["params"]]) for g in parameter_groups(model)]
        for model in (inner, wrapped, compiled)
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_bad_input(method, model):
    role = parameter_groups(model)[0]["name"]
    for options, message in [
        ({"rates": {"bnak": 1.0}}, f"no role 'bnak'; it has .*'{role}'.*'modules_to_save'"),
        ({"ratios": {"bnak": 1.0}}, "no role 'bnak'"),
        (
            {"rates": {role: -1.0}},
            rf"`rates`\['{role}'\]=-1.0 must be a finite number of at least 0",
        ),
        ({"ratios": {role: "16"}}, rf"`ratios`\['{role}'\]='16' must be"),
        ({"lr": float("inf")}, "`lr`=inf must be"),
        ({"weight_decay": None}, "`weight_decay`=None must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            parameter_groups(model, **options)
    with pytest.raises(TypeError, match="must be a class of torch optimizers"):
        create_optimizer(model, "adamw")
    with pytest.raises(ValueError, match="no adapters; make some with `get_peft_model`"):
        parameter_groups(mlp())
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(ValueError, match="no trainable parameters"):
        parameter_groups(model)


def test_a_ratio_needs_a_rate():
    model = get_peft_model(mlp(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match=r"`ratios`\['B'\] needs a rate to multiply"):
        parameter_groups(model, ratios={"B": 16})


# --- LoRA+
# ------------------------------------------------------------------------------------------------------------------
#
#


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.norm(self.inner(self.embed(ids))))


def test_lora_plus_has_the_groups_of_the_interface():
    config = LoraConfig(
        r=2, target_modules=["embed", "inner"], modules_to_save=["head"], bias="lora_only"
    )
    model = get_peft_model(Tokens(), config)
    model.get_base_model().norm.weight.requires_grad_(True)
    optimiser = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=0.01,
        loraplus_lr_ratio=1.2,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=0.02,
        eps=1e-5,
    )
    assert isinstance(optimiser, torch.optim.AdamW)
    rates = [(group["lr"], group["weight_decay"], group["eps"]) for group in optimiser.param_groups]
    assert rates == [(0.01, 0.1, 1e-5), (0.02, 0.1, 1e-5), (0.012, 0.1, 1e-5), (0.012, 0.0, 1e-5)]
    names = [
        {name.removeprefix("base_model.model.") for name in names_in(model, [group])[group["name"]]}
        for group in optimiser.param_groups
    ]
    assert names == [
        {"inner.lora_A.default.weight", "head.modules_to_save.default.weight"},
        {"embed.lora_embedding_A.default", "embed.lora_embedding_B.default"},
        {"inner.lora_B.default.weight"},
        {"inner.base_layer.bias", "norm.weight", "head.modules_to_save.default.bias"},
    ]


def test_lora_plus_for_low_rank_kronecker_factors():
    config = peft.LoKrConfig(r=1, target_modules=["0"], decompose_both=True, decompose_factor=4)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config)
    optimiser = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8)
    groups = by_name(optimiser.param_groups)
    names = {
        name: [n.split(".")[-2] for n in names]
        for name, names in names_in(model, optimiser.param_groups).items()
    }
    assert names["A"] == ["lokr_w1_b", "lokr_w2_b"] and names["B"] == ["lokr_w1_a", "lokr_w2_a"]
    assert groups["B"]["lr"] == 0.08
    # At the output side of both products: each is [out, r], the other [r, in].
    layer = model.base_model.model[0]
    assert [layer.lokr_w1_a["default"].shape[1], layer.lokr_w2_a["default"].shape[1]] == [1, 1]


def test_lora_plus_needs_an_output_side():
    model = get_peft_model(mlp(), METHODS["POLY"].config(target_modules=TARGETS))
    with pytest.raises(
        ValueError,
        match="No trainable parameter has the role 'B' that LoRA\\+ is about; there are router, skills",
    ):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8)
    model = get_peft_model(mlp(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="`loraplus_lr_ratio`=0 must be positive"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=0)


def test_the_other_optimisers_of_the_interface_say_that_they_are_not_provided():
    for name in ("create_lorafa_optimizer", "create_riemannian_optimizer"):
        with pytest.raises(NotImplementedError, match=f"{name} is not provided"):
            getattr(peft.optimizers, name)(model=None)


# --- transformers' Trainer
# ---------------------------------------------------------------------------------------------------
#
#


def test_the_trainer_trains_with_the_groups(method, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers.utils.logging.set_verbosity_error()
    model = get_peft_model(llama(), method.config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.randint(3, 48, (8, 6)).tolist()
    tasks = {"task_ids": 1} if method.call else {}
    data = [{"input_ids": row, "labels": row, **tasks} for row in ids]
    expected = copy.deepcopy(parameter_groups(model, 0.01))
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        lr_scheduler_type="linear",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model,
        args,
        train_dataset=data,
        optimizer_cls_and_kwargs=trainer_optimizer(lr=0.01, betas=(0.9, 0.99)),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert [(g["name"], g["initial_lr"], g["weight_decay"], g["betas"]) for g in groups] == [
        (g["name"], g["lr"], g["weight_decay"], (0.9, 0.99)) for g in expected
    ]
    assert all(
        not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before
    )


def test_a_trainer_that_does_not_show_the_model_is_refused():
    factory, options = trainer_optimizer(lr=0.01)
    with pytest.raises(NotImplementedError, match="pass `optimizers="):
        factory([{"params": []}], **options)
