# SPDX-License-Identifier: Apache-2.0
"""The papers' settings: how gates open, what has a router, fixed routing, top-k, and sizes that
differ by layer.
"""

import copy
import json

import pytest
import torch
from helpers.models import mlp, t5
from helpers.poly import task_routers
from torch import nn

from peft import PeftModel, PolyConfig, convert_to_lora, get_peft_model
from peft.tuners.poly.gating import Gating, keep_top_k, mixing_weights
from peft.tuners.poly.layer import PolyLayer
from peft.tuners.poly.mixing import compact_skills, poly_delta

TARGETS = ["0", "2"]


def config(**fields):
    return PolyConfig(
        **{
            "r": 2,
            "n_tasks": 3,
            "n_skills": 4,
            "n_splits": 2,
            "init_weights": False,
            "target_modules": TARGETS,
            **fields,
        }
    )


def poly(**fields):
    model = get_peft_model(mlp(), config(**fields)).eval()
    with torch.no_grad():
        [p.normal_() for n, p in model.named_parameters() if "module_logits" in n]
    return model


def weights_by_hand(logits, hard=False, always_on=0, top_k=None):
    """One row in float64, gate by gate."""
    gates = [1 / (1 + torch.exp(-logit)) for logit in logits.double()]
    if hard:
        gates = [torch.tensor(float(gate > 0.5)).double() for gate in gates]
    for i in range(always_on):
        gates[len(gates) - 1 - i] = torch.tensor(1.0).double()
    weights = torch.stack(gates) / (sum(gates) + 1e-12)
    if top_k is not None:
        kept = sorted(range(len(weights)), key=lambda i: -float(weights[i]))[:top_k]
        total = sum(weights[i] for i in kept)
        weights = torch.stack(
            [
                weights[i] / total * weights.sum() if i in kept else torch.tensor(0.0).double()
                for i in range(len(weights))
            ]
        )
    return weights


HOW = [{}, {"hard": True}, {"always_on": 2}, {"top_k": 2}, {"always_on": 1, "top_k": 3}]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_weights_of_logits(how):
    logits = torch.randn(5, 2, 6, dtype=torch.float64)
    expected = torch.stack(
        [torch.stack([weights_by_hand(row, **how) for row in sample]) for sample in logits]
    )
    torch.testing.assert_close(
        mixing_weights(logits, Gating(**how), False), expected, atol=1e-11, rtol=1e-9
    )
    calm = Gating(relaxed=False, **{k: v for k, v in how.items() if k != "top_k"})
    assert torch.equal(mixing_weights(logits, calm, True), mixing_weights(logits, calm, False))


def test_straight_through_gradients_are_those_of_soft_gates_in_hard_weights():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    out = mixing_weights(logits, Gating(relaxed=False, hard=True), True)
    direction = torch.randn_like(out)
    (got,) = torch.autograd.grad((out * direction).sum(), logits)
    soft = logits.detach().sigmoid()
    gates = soft.round().requires_grad_()
    ((gates / (gates.sum(-1, keepdim=True) + 1e-12)) * direction).sum().backward()
    torch.testing.assert_close(got, gates.grad * soft * (1 - soft))


def test_shut_gates():
    logits, how = torch.zeros(20000, 1, 4), Gating(relaxed=False, dropout=0.25)
    weights = mixing_weights(logits, how, True)
    assert abs(float((weights == 0).float().mean()) - 0.25) < 0.01
    sums = weights.sum(-1)
    torch.testing.assert_close(sums[sums > 0], torch.ones_like(sums[sums > 0]))
    torch.testing.assert_close(mixing_weights(logits, how, False), torch.full_like(logits, 0.25))
    assert (mixing_weights(logits, how._replace(always_on=1), True)[..., -1] > 0).all()
    assert torch.equal(
        mixing_weights(torch.full((1, 3), -5.0), Gating(hard=True), False), torch.zeros(1, 3)
    )


@pytest.mark.parametrize("shape", [(1, 2, 9), (4, 2, 9), (2, 1, 2, 9), (5, 2, 9)], ids=str)
def test_only_the_skills_that_are_used_are_read(shape):
    A, B = (
        torch.randn(2, 9, 4, 3, dtype=torch.float64),
        torch.randn(2, 9, 3, 5, dtype=torch.float64),
    )
    weights = keep_top_k(torch.rand(shape, dtype=torch.float64), 2)
    x = torch.randn(*shape[:-2], *([7] if len(shape) == 3 else []), 8, dtype=torch.float64)
    small = compact_skills(weights, A, B, 2)
    samples = weights[..., 0, 0].numel()
    assert (
        small[1].shape[1]
        == small[2].shape[1]
        == small[0].shape[-1]
        == (2 * samples if 2 * samples < 9 else 9)
    )
    torch.testing.assert_close(poly_delta(x, *small), poly_delta(x, weights, A, B))


def test_a_model_with_few_skills_in_evaluation():
    model, x = poly(n_skills=8, eval_top_k=1), torch.randn(3, 8)
    plain = copy.deepcopy(model)
    for router in task_routers(plain).values():
        kept = keep_top_k(router.task_weights(), 1)
        assert ((kept > 0).sum(-1) == 1).all()
    out = model(x, task_ids=[0, 2, 1])
    for i, task in enumerate([0, 2, 1]):
        torch.testing.assert_close(model(x[i : i + 1], task_ids=task), out[i : i + 1])
    merged = copy.deepcopy(model).merge_and_unload(task_id=2)
    torch.testing.assert_close(merged(x)[1], out[1], atol=1e-5, rtol=1e-4)


def test_alpha_and_drawing():
    model, x = poly(alpha=3.0, relaxed_bernoulli=False), torch.randn(4, 8)
    assert all(layer.scaling["default"] == 1.5 for layer in model.base_model.tuner_layers())
    calm = model(x, task_ids=[1] * 4)
    assert torch.equal(model.train()(x, task_ids=[1] * 4), calm)
    model.set_adapter("default")
    assert not torch.allclose(
        poly().train()(x, task_ids=[1] * 4), poly().eval()(x, task_ids=[1] * 4)
    )


GROUPS = {
    "linear": lambda path: path,
    "layer": lambda path: path.rpartition(".")[0],
    "block": lambda path: ".".join(path.split(".")[:3]),
    "coder": lambda path: path.split(".")[0],
    "model": lambda path: "",
}


@pytest.mark.parametrize("granularity", GROUPS)
def test_what_has_a_router(granularity, tmp_path):
    fields = {
        "router_granularity": granularity,
        "target_modules": ["q", "v", "wo"],
        "task_type": "SEQ_2_SEQ_LM",
    }
    model = get_peft_model(t5(), config(**fields)).eval()
    routers = task_routers(model)
    groups = {}
    for path, router in routers.items():
        groups.setdefault(GROUPS[granularity](path), set()).add(id(router))
    assert all(len(ids) == 1 for ids in groups.values())
    assert len({id(router) for router in routers.values()}) == len(groups)
    with torch.no_grad():
        [router.module_logits.normal_() for router in set(routers.values())]
    ids = torch.randint(3, 48, (3, 5))
    call = {"input_ids": ids, "labels": ids, "task_ids": [2, 0, 1]}
    expected = model(**call).logits
    twin = copy.deepcopy(model)
    assert len({id(router) for router in task_routers(twin).values()}) == len(groups)
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert sum("router" in key for key in file.keys()) == len(groups)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(loaded(**call).logits, expected)
    loaded.add_tasks(2)
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(loaded(**call).logits, expected)
    loaded.delete_adapter("default")
    assert torch.equal(loaded(**call).logits, expected)


def test_fixed_routing(tmp_path):
    model, x = get_peft_model(mlp(), config(routing="fixed", n_splits=1)).train(), torch.randn(3, 8)
    assert not any("router" in name for name, p in model.named_parameters() if p.requires_grad)
    for weights in model.get_router_weights().values():
        torch.testing.assert_close(weights, torch.full((3, 1, 4), 0.25))
    table = torch.tensor([[1.0, 0, 0, 0], [1, 1, 2, 0], [0, 0, 0, 3]])
    model.set_router_weights({"2": table})
    model.set_adapter("default")
    assert not any("router" in name for name, p in model.named_parameters() if p.requires_grad)
    found = model.get_router_weights()
    torch.testing.assert_close(found["2"].squeeze(1), table / table.sum(1, keepdim=True))
    torch.testing.assert_close(found["0"], torch.full((3, 1, 4), 0.25))
    out = model(x, task_ids=[0, 1, 2])
    assert torch.equal(model(x, task_ids=[0, 1, 2]), out)  # nothing is drawn
    model.save_pretrained(tmp_path)
    assert torch.equal(
        PeftModel.from_pretrained(model.unload(), tmp_path)(x, task_ids=[0, 1, 2]), out
    )
    hard = poly(straight_through=True)
    hard.set_router_weights(torch.tensor([[1.0, 0, 0, 2]] * 3))
    torch.testing.assert_close(
        hard.get_router_weights()["0"][0], torch.tensor([[0.5, 0, 0, 0.5]] * 2)
    )
    with pytest.raises(ValueError, match="always on"):
        poly(n_shared_skills=1).set_router_weights(torch.ones(3, 4))


PATTERNS = {
    "rank_pattern": {"body.4": 3},
    "n_skills_pattern": {"^body.0": 6, "body.2": 2},
    "n_splits_pattern": {".*4": 4},
    "routing_pattern": {"body.2": "fixed"},
}


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x)


def test_sizes_by_layer(tmp_path):
    model = get_peft_model(Body(), config(target_modules=["0", "2", "4"], **PATTERNS)).eval()
    layers = {
        path: layer
        for path, layer in model.base_model.named_tuner_layers()
        if isinstance(layer, PolyLayer)
    }
    shapes = {path: tuple(layer.poly_lora_A["default"].shape) for path, layer in layers.items()}
    assert shapes == {"body.0": (2, 6, 4, 2), "body.2": (2, 2, 8, 2), "body.4": (4, 4, 4, 3)}
    assert [layer.scaling["default"] for layer in layers.values()] == [1 / 2, 1 / 2, 1 / 3]
    assert [layer.poly_router["default"].fixed for layer in layers.values()] == [False, True, False]
    with torch.no_grad():
        [p.normal_() for n, p in model.named_parameters() if "module_logits" in n]
    x = torch.randn(3, 8)
    out = model(x, task_ids=[2, 0, 1])
    merged = copy.deepcopy(model).merge_and_unload(task_id=2)
    torch.testing.assert_close(merged(x)[0], out[0], atol=1e-5, rtol=1e-4)
    lora = convert_to_lora(model, task_id=2)
    assert lora.config.r == 3 and lora.error == 0
    model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "both", "cat")
    model.set_adapter("both")
    torch.testing.assert_close(model(x, task_ids=[2, 0, 1]), out, atol=1e-4, rtol=1e-3)
    model.set_adapter("default")
    model.add_skills(1)
    torch.testing.assert_close(model(x, task_ids=[2, 0, 1]), out, atol=1e-5, rtol=1e-4)
    out = model(x, task_ids=[2, 0, 1])
    model.save_pretrained(tmp_path, selected_adapters=["default", "both"])
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["n_skills_pattern"] == {r"^body.0(\..*)?": 7, "body.2": 3}
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(loaded(x, task_ids=[2, 0, 1]), out)


def test_tasks_in_some_layers_and_inputs_in_others(tmp_path):
    model = get_peft_model(
        Body(), config(target_modules=["0", "2"], routing_pattern={"body.2": "input"})
    ).eval()
    assert list(model.get_router_weights()) == ["body.0"]
    x = torch.randn(3, 8)
    out = model(x, task_ids=[2, 0, 1])
    with pytest.raises(ValueError, match="should not be None"):
        model(x)
    with pytest.raises(NotImplementedError, match="routes by input can't be converted"):
        convert_to_lora(model, task_id=0)
    with pytest.raises(NotImplementedError, match="routes by input can't be merged"):
        model.merge_adapter(task_id=0)
    with pytest.raises(NotImplementedError, match="routing by input"):
        model.add_skills(1)
    model.add_tasks(1)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        PeftModel.from_pretrained(model.unload(), tmp_path)(x, task_ids=[2, 0, 1]), out
    )


def test_a_plain_config_has_no_fields_that_others_do_not_know(tmp_path):
    PolyConfig(target_modules=["q"]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    known = {
        "r",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "init_weights",
        "poly_type",
        "n_tasks",
        "n_skills",
        "n_splits",
    }
    general = {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    }
    assert set(fields) == known | general


BAD = [
    ({"alpha": 0}, "`alpha`=0 must be a positive"),
    ({"relaxed_bernoulli": 1}, "`relaxed_bernoulli`=1 must be True or False"),
    ({"router_dropout": 1.0}, "`router_dropout`=1.0 must be a probability"),
    ({"n_shared_skills": 5}, "`n_shared_skills`=5 is more than there are skills"),
    ({"eval_top_k": 0}, "`eval_top_k`=0 must be an integer of at least 1"),
    ({"router_granularity": "token"}, "must be one of 'linear', 'layer'"),
    ({"routing": "fixed", "poly_type": "mope"}, "does not have"),
    ({"routing_pattern": {"0": "mope"}}, "must be one of 'learned', 'fixed', 'input'"),
    ({"n_skills_pattern": {"0": 0}}, "must be an integer of at least 1"),
    ({"rank_pattern": {"(": 2}}, "not a valid regular expression"),
    (
        {"router_granularity": "model", "n_splits_pattern": {"0": 1}},
        "which `n_splits_pattern` makes different",
    ),
    (
        {"router_granularity": "model", "poly_type": "mope"},
        "which `poly_type`='mope' makes different",
    ),
    ({"n_splits_pattern": {"2": 3}}, "`in_features`=16 is not divisible by `n_splits`=3"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=str)
def test_settings_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(mlp(), config(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"straight_through": True},
        {"n_shared_skills": 1},
        {"eval_top_k": 1},
        {"router_granularity": "model"},
    ],
    ids=str,
)
def test_skills_are_not_added_where_tasks_would_change(fields):
    with pytest.raises(NotImplementedError, match="without a change of what it computes"):
        poly(**fields).add_skills(1)
