# SPDX-License-Identifier: Apache-2.0
"""Routing over experts of every method against the papers' formulas with dense deltas, in float64."""

import copy

import pytest
import torch
from helpers.routed import NAMES, chosen_weights, saved_adapters
from torch import nn

import peft
from peft.base.errors import PeftNotSupportedError
from peft.tuners.routed import products

TARGETS, KINDS = ["0", "2"], ["arrow", "activation", "phatgoose", "input"]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double().eval()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return saved_adapters(mlp(), tmp_path_factory.mktemp("library"), TARGETS)


def routed(library, **options):
    model = peft.get_routed_model(mlp(), library[0], **options).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in model.base_model.tuner_layers():
            kind = layer.routed_options["default"].routing
            if kind in ("activation", "phatgoose", "input"):
                layer.routed_gate["default"].normal_()
                layer.waiting["default"].clear()
    return model


def numbers(*shape):
    torch.manual_seed(3)
    return torch.randn(shape, dtype=torch.float64)


def expected(model, library, x, weigh):
    """The output of the two adapted layers. `weigh(path, x)` gives weights `[..., experts]`."""
    for module, path in zip(mlp(), ("0", None, "2"), strict=True):
        if path is None:
            x = module(x)
            continue
        every = torch.stack([library[1][name][path] for name in NAMES])
        deltas = torch.einsum("...i,eoi->...eo", x, every)
        x = module(x) + (weigh(path, x).unsqueeze(-1) * deltas).sum(-2)
    return x


def by_input(model, library, kind, level, top_k, temperature):
    def weigh(path, x):
        layer = model.get_base_model().get_submodule(path)
        gates = layer.routed_gate["default"].detach()
        deltas = [library[1][name][path] for name in NAMES]
        inputs = x if level == "token" else x.mean(1, keepdim=True).expand_as(x)
        rows = [
            chosen_weights(kind, row, deltas, gates, top_k, temperature)
            for row in inputs.reshape(-1, x.shape[-1])
        ]
        return torch.stack(rows).view(*x.shape[:-1], -1)

    return weigh


@pytest.mark.parametrize("level", ["token", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_routing_by_input_is_the_formula_of_the_paper(library, kind, level):
    x = numbers(2, 3, 8)
    for top_k in (1, 2, None):
        options = {"top_k": top_k, "temperature": 0.6, "routing_level": level}
        model = routed(library, routing=kind, **options)
        weigh = by_input(model, library, kind, level, top_k, 0.6)
        assert model.named_experts() == NAMES
        torch.testing.assert_close(model(x), expected(model, library, x, weigh))


@pytest.mark.parametrize("form", ["all", "own", "blocks"])
def test_every_form_of_the_products_is_the_formula(library, form, monkeypatch):
    monkeypatch.setattr(products, "_form", lambda *_: form)
    model, x = routed(library, routing="arrow", top_k=2), numbers(5, 9, 8).requires_grad_()
    weigh = by_input(model, library, "arrow", "token", 2, 1.0)
    found, right = model(x), expected(model, library, x, weigh)
    torch.testing.assert_close(found, right)
    # Without the weights' own gradient, which the oracle's decomposition has no derivative for.
    for _, p in model.named_parameters():
        assert not p.requires_grad
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    step = 1e-6 * numbers(5, 9, 8)
    with torch.no_grad():
        ahead, behind = (model(x + s * step).square().sum() for s in (1, -1))
    torch.testing.assert_close((gradient * step).sum(), (ahead - behind) / 2, rtol=1e-4, atol=1e-9)


def test_forms_are_chosen_by_cost():
    def form(rows, experts, k, samples=None, r=8, wide=512):
        size = experts * r
        factors = products.Factors(
            torch.empty(size, wide, device="meta"),
            torch.empty(size, wide, device="meta"),
            *(torch.empty(n, device="meta") for n in (size, (experts, r))),
        )
        x = torch.empty(rows, wide, device="meta")
        return products._form(x, torch.empty(samples or rows, k, device="meta"), factors)

    assert form(1, 256, 2) == "own" and form(1, 2, 2) == "all"  # decoding
    assert form(2048, 4, 2) == "all" and form(2048, 256, 2) == "blocks"  # a prompt
    assert form(2048, 64, 1, samples=4) == "own"  # an expert for each sample


@pytest.mark.parametrize("task_ids", [["LORA", "POLY.task_1"], torch.tensor([2, 5]), 3])
def test_calls_name_the_expert_of_each_sample(library, task_ids):
    model, x = routed(library, routing="task"), numbers(2, 3, 8)
    numbers_of = [NAMES.index(i) for i in task_ids] if isinstance(task_ids, list) else task_ids
    ids = torch.as_tensor(numbers_of).expand(2)
    one_hot = torch.nn.functional.one_hot(ids, len(NAMES)).double()[:, None].expand(2, 3, -1)
    right = expected(model, library, x, lambda path, x: one_hot)
    torch.testing.assert_close(model(x, task_ids=task_ids), right)
    with pytest.raises(ValueError, match="7 experts"):
        model(x)
    with pytest.raises(ValueError, match="Unknown expert names.*Did you mean 'LORA'"):
        model(x, task_ids="LORAS")


@pytest.mark.parametrize("granularity", ["linear", "model"])
def test_fixed_weights_blend_merge_and_convert(library, granularity):
    options = {"routing": "fixed", "weights_granularity": granularity}
    model, x = routed(library, **options), numbers(2, 3, 8)
    weights = torch.full((len(NAMES),), 1 / len(NAMES), dtype=torch.float64)
    right = expected(model, library, x, lambda path, x: weights.expand(*x.shape[:-1], -1))
    torch.testing.assert_close(model(x), right)  # the mean of all
    model.set_expert_weights({"LOKR": -0.5, 6: 2.0})
    weights[1], weights[6] = -0.5, 2.0
    right = expected(model, library, x, lambda path, x: weights.expand(*x.shape[:-1], -1))
    torch.testing.assert_close(model(x), right)
    model.merge_adapter()
    torch.testing.assert_close(model(x), right)
    with pytest.raises(ValueError, match="merged; call `unmerge_adapter` first"):
        model.set_expert_weights({"LOKR": 5.0})
    model.unmerge_adapter()
    config, state = peft.convert_to_lora(model)
    lora = peft.get_peft_model(mlp(), config).eval()
    peft.set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(x), right)


def test_weights_of_single_layers(library):
    model, x = routed(library, routing="fixed"), numbers(4, 8)
    model.set_expert_weights({"2": {"LOHA": 3.0}})
    found = model.get_expert_weights()
    assert found["2"][0] == 3 and found["0"][0] == 1 / len(NAMES)
    right = expected(model, library, x, lambda path, x: found[path].expand(len(x), -1))
    torch.testing.assert_close(model(x), right)
    before = model.get_expert_weights()
    for wrong in ({"3": {"LOHA": 1.0}}, {"LOHA": float("nan")}, {"no": 1.0}, {}, [1.0]):
        with pytest.raises((ValueError, TypeError)):
            model.set_expert_weights(wrong)
    assert all(torch.equal(before[p], w) for p, w in model.get_expert_weights().items())


def test_a_blend_of_experts_becomes_lora_whatever_the_routing(library):
    model, x = routed(library, routing="arrow", top_k=1), numbers(4, 8)
    config, state = peft.convert_to_lora(model, task_id={"LORA": 0.5, "POLY.task_2": -1.0})
    lora = peft.get_peft_model(mlp(), config).eval()
    peft.set_peft_model_state_dict(lora, state)
    shares = torch.tensor([0, 0, 0.5, 0, 0, 0, -1.0], dtype=torch.float64)
    right = expected(model, library, x, lambda path, x: shares.expand(len(x), -1))
    torch.testing.assert_close(lora(x), right)
    with pytest.raises(PeftNotSupportedError, match="the input chooses"):
        peft.convert_to_lora(model)
    with pytest.raises(PeftNotSupportedError, match="the input chooses"):
        model.merge_adapter()
    assert not model.base_model.merged_adapters


def test_the_general_delta_is_subtracted(library):
    x, general = numbers(2, 3, 8), ["LORA", "LOHA"]
    experts = {name: library[0][name] for name in ("LOKR", "VBLORA")}
    left = {path: sum(library[1][name][path] for name in general) / 2 for path in ("0", "2")}
    less = {n: {p: d - left[p] for p, d in library[1][n].items()} for n in experts}
    for routing in ("arrow", "fixed"):
        model = peft.get_routed_model(
            mlp(),
            experts,
            general_experts={name: library[0][name] for name in general},
            routing=routing,
            top_k=1 if routing == "arrow" else None,
        ).eval()

        def weigh(path, x, routing=routing):
            if routing == "fixed":
                return torch.full((*x.shape[:-1], 2), 0.5, dtype=x.dtype)
            deltas = [less[name][path] for name in experts]
            rows = [chosen_weights("arrow", r, deltas, None, 1, 1.0) for r in x.flatten(0, 1)]
            return torch.stack(rows).view(*x.shape[:-1], 2)

        y = x
        for module, path in zip(mlp(), ("0", None, "2"), strict=True):
            delta = 0
            if path:
                every = torch.stack([less[name][path] for name in experts])
                delta = torch.einsum("...e,...i,eoi->...o", weigh(path, y), y, every)
            y = module(y) + delta
        torch.testing.assert_close(model(x), y)


def test_an_expert_that_leaves_layers_alone(library, tmp_path):
    torch.manual_seed(5)
    config = peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    part = peft.get_peft_model(mlp(), config)
    part.save_pretrained(tmp_path)
    delta = part.get_base_model()[0].get_delta_weight("default").detach()
    experts, x = {"LORA": library[0]["LORA"], "part": tmp_path}, numbers(4, 8)
    dense = library[1]["LORA"]
    model = peft.get_routed_model(mlp(), experts, routing="task").eval()
    base = mlp()
    hidden = torch.tanh(base[0](x) + x @ delta.T)
    torch.testing.assert_close(model(x, task_ids="part"), base[2](hidden))
    model = peft.get_routed_model(mlp(), experts, routing="arrow", top_k=2).eval()
    mixed = torch.stack(
        [chosen_weights("arrow", row, [dense["0"], delta], None, 2, 1.0) for row in x]
    )
    hidden = base[0](x) + mixed[:, :1] * (x @ dense["0"].T) + mixed[:, 1:] * (x @ delta.T)
    hidden = torch.tanh(hidden)
    torch.testing.assert_close(model(x), base[2](hidden) + hidden @ dense["2"].T)  # alone there


def test_gates_train_on_the_expert_of_each_sample(library):
    """PHATGOOSE in training: the own expert's delta times σ(v·x), and nothing else."""
    model, x = routed(library, routing="phatgoose", top_k=2), numbers(3, 4, 8)
    ids = torch.tensor([6, 0, 6])

    def weigh(path, x):
        gate = model.get_base_model().get_submodule(path).routed_gate["default"]
        own = torch.einsum("sti,si->st", x, gate[ids]).sigmoid()
        return own[..., None] * nn.functional.one_hot(ids, len(NAMES))[:, None]

    model.train()
    found, right = model(x, task_ids=ids), expected(model, library, x, weigh)
    torch.testing.assert_close(found, right)
    gates = [layer.routed_gate["default"] for layer in model.base_model.tuner_layers()]
    assert [p for p in model.parameters() if p.requires_grad] == gates
    one, other = (torch.autograd.grad(y.square().sum(), gates) for y in (found, right))
    torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="task_ids"):
        model(x)


def test_fitting_gates_one_by_one(library):
    model, x = routed(library, routing="phatgoose", top_k=2), numbers(3, 4, 8)
    before = model.get_base_model()[0].routed_gate["default"].detach().clone()
    losses = model.fit_gates(
        {"LORA": lambda: model(x, task_ids="LORA").square().mean()}, steps=4, lr=0.05
    )
    after = model.get_base_model()[0].routed_gate["default"].detach()
    changed = (before != after).any(1).tolist()
    assert changed == [name == "LORA" for name in NAMES] and min(losses["LORA"]) < losses["LORA"][0]
    assert not model.training and not any(m.training for m in model.modules())
    with pytest.raises(TypeError, match="for each expert"):
        model.fit_gates(lambda: 0)
    with pytest.raises(PeftNotSupportedError, match="nothing to train"):
        routed(library, routing="arrow").fit_gates({})


def test_prototypes_are_mean_inputs(library):
    model = peft.get_routed_model(mlp(), library[0], routing="activation").eval()
    x = numbers(2, 3, 8)
    with pytest.raises(ValueError, match=r"\['LOHA'.*have no prototypes.*collect_prototypes"):
        model(x)
    examples = {name: [x + i, 2 * x] for i, name in enumerate(NAMES)}
    modes = {name: m.training for name, m in model.named_modules()}
    model.collect_prototypes(examples)
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert not any(m._forward_pre_hooks for m in model.modules())
    layers = model.get_base_model()
    for i, name in enumerate(NAMES):
        batch = torch.cat([x + i, 2 * x])
        torch.testing.assert_close(layers[0].routed_gate["default"][i].data, batch.mean((0, 1)))
        hidden = torch.tanh(mlp()[0](batch) + batch @ library[1][name]["0"].T)
        torch.testing.assert_close(layers[2].routed_gate["default"][i].data, hidden.mean((0, 1)))
    assert model(x).isfinite().all()
    model.collect_prototypes({"LORA": x}, with_expert=False)
    hidden = torch.tanh(mlp()[0](x)).mean((0, 1))
    torch.testing.assert_close(layers[2].routed_gate["default"][2].data, hidden)
    with pytest.raises(ValueError, match="NaN"):
        model.collect_prototypes({"LORA": x * float("nan")})
    assert layers[0].routed_gate["default"].isfinite().all()


def test_experts_come_and_go(library):
    model, x = routed(library, routing="phatgoose", top_k=3), numbers(2, 3, 8)
    before = model(x)
    model.add_experts({"again": library[0]["LOKR"]})
    assert model.named_experts() == [*NAMES, "again"] and model.active_adapter == "default"
    model.remove_experts("again")
    torch.testing.assert_close(model(x), before)
    model.remove_experts([name for name in NAMES if name not in ("LORA", "LOHA")])
    gates = model.get_base_model()[0].routed_gate["default"]
    assert gates.requires_grad and gates.shape == (2, 8)
    with pytest.raises(ValueError, match="No expert would be left"):
        model.remove_experts(["LORA", "LOHA"])
    with pytest.raises(ValueError, match="already"):
        model.add_experts({"LORA": library[0]["LOKR"]})
    with pytest.raises(FileNotFoundError, match="'new'"):
        model.add_experts({"new": "/nowhere/at/all"})
    assert model.named_experts() == ["LOHA", "LORA"]


def test_other_adapters_beside_a_routed_one(library):
    """Two routed adapters: switched, copied, mixed by sample, deleted."""
    model, x = routed(library, routing="arrow", top_k=2), numbers(3, 4, 8)
    one = model(x)
    model.copy_adapter("default", "twin")
    model.add_adapter("named", peft.RoutedConfig(experts={"a": library[0]["LORA"]}, routing="task"))
    model.set_adapter("twin")
    torch.testing.assert_close(model(x), one)
    model.set_adapter("named")
    lora = expected(
        model, library, x, lambda path, x: nn.functional.one_hot(torch.tensor(2), 7).double()
    )
    torch.testing.assert_close(model(x), lora)
    found = model(x, adapter_names=["default", "named", "__base__"])
    torch.testing.assert_close(found, torch.stack([one[0], lora[1], mlp()(x)[2]]))
    with model.disable_adapter():
        torch.testing.assert_close(model(x), mlp()(x))
    model.delete_adapter("named")
    model.set_adapter("default")
    torch.testing.assert_close(model(x), one)
    torch.testing.assert_close(model.unload()(x), mlp()(x))


def test_a_copied_and_pickled_model(library):
    model, x = routed(library, routing="input", top_k=2), numbers(3, 4, 8)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
