# SPDX-License-Identifier: Apache-2.0
"""Few-shot composition: weights of experts fitted to examples, against least squares and the lasso."""

import copy
import json

import pytest
import torch
from helpers.models import llama
from helpers.states import assert_unchanged, snapshot
from torch import nn

from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    VBLoRAConfig,
    get_peft_model,
    get_peft_model_state_dict,
    get_routed_model,
    save_as_lora,
)

NAN, INF = float("nan"), float("inf")
CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    "lokr": LoKrConfig(r=2, target_modules=["0"], init_weights=False),
    "loha": LoHaConfig(r=2, target_modules=["0"], init_weights=False),
    "bank": VBLoRAConfig(
        r=2, num_vectors=6, vector_length=4, init_vector_bank_bound=1.0, target_modules=["0"]
    ),
}


def base(width=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8))


def routed(routing="fixed", **options):
    """A model over experts of four methods; its output is linear in their weights."""
    torch.manual_seed(1)
    experts = {
        name: (config, get_peft_model_state_dict(get_peft_model(base(), config)))
        for name, config in CONFIGS.items()
    }
    return get_routed_model(base(), experts, routing=routing, **options)


def problem(model, noise=0.1):
    """A loss on a few examples, and its parts: `|X w − y|²` over the experts' outputs."""
    torch.manual_seed(2)
    x = torch.randn(24, 12)
    weights = dict(zip(CONFIGS, (0.7, -0.4, 0.0, 1.2), strict=True))
    layer = model.get_base_model()[0]
    outputs = [x @ layer.get_delta_weight("default", task_id={i: 1.0}).T for i in range(4)]
    X = torch.stack([out.flatten() for out in outputs], 1).detach().double()
    y = X @ torch.tensor([*weights.values()]).double() + noise * torch.randn(len(X)).double()
    target = (layer.base_layer(x).flatten() + y.float()).view(24, 8).detach()
    return (lambda: (model(x) - target).square().mean()), X, y


def lasso(X, y, penalty, bound, steps=2000):
    """The weights of least `mean((X w − y)²) + penalty · Σ|w|`, by proximal gradient steps."""
    w, rate = torch.zeros(X.shape[1]).double(), len(y) / (2 * torch.linalg.matrix_norm(X, 2) ** 2)
    for _ in range(steps):
        w = w - rate * 2 * X.T @ (X @ w - y) / len(y)
        w = (w.abs() - rate * penalty).clamp(min=0) * w.sign()
        w = w.clamp(-bound, bound)
    return w


@pytest.mark.parametrize("routing", ["fixed", "learned"])
@pytest.mark.parametrize("method", ["gradient", "search"])
@pytest.mark.parametrize(("penalty", "bound"), [(0.0, 1.5), (0.2, 1.0)])
def test_weights_are_those_of_least_penalized_loss(routing, method, penalty, bound):
    model = routed(routing)
    loss, X, y = problem(model)
    wanted = lasso(X, y, penalty, bound)
    if penalty == 0:
        torch.testing.assert_close(wanted, torch.linalg.lstsq(X, y).solution, rtol=1e-4, atol=1e-5)
    model.train()
    before = snapshot(model)
    fit = model.fit_weights(
        loss, steps=300, lr=0.05, init="zero", method=method, penalty=penalty, bound=bound
    )
    after = snapshot(model)
    changed = {n for n, t in after["state"].items() if not torch.equal(t, before["state"][n])}
    assert changed and all("routed_weights" in name for name in changed)
    for key in ("requires_grad", "modules"):
        assert after[key] == before[key]
    found = torch.tensor([fit.weights[name] for name in CONFIGS]).double()
    if method == "gradient":
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.03)
    assert len(fit.losses) == 301 and fit.seconds > 0 and fit.start is None
    assert fit.losses[0] == pytest.approx(float(y.square().mean()), rel=1e-4)
    least = (X @ wanted - y).square().mean() + penalty * wanted.abs().sum()
    assert -1e-5 < min(fit.losses) - float(least) < 0.01 * (fit.losses[0] - float(least))
    reached = (X @ found - y).square().mean() + penalty * found.abs().sum()
    assert float(reached) == pytest.approx(min(fit.losses), rel=1e-3)
    kept = model.get_expert_weights()["0"]
    torch.testing.assert_close(kept.double(), found, rtol=1e-6, atol=1e-6)


def test_starts(tmp_path):
    model = routed()
    loss, X, y = problem(model, noise=0.0)

    def at(*weights):
        w = torch.tensor(weights).double()
        return float((X @ w - y).square().mean())

    alone = [at(*row) for row in torch.eye(4).tolist()]
    starts = {"zero": at(0.0, 0, 0, 0), "equal": at(*[0.25] * 4), "best": min(alone)}
    for init, wanted in starts.items():
        model.set_expert_weights(dict.fromkeys(CONFIGS, 0.9))
        fit = model.fit_weights(loss, steps=0, init=init, penalty=0.0)
        assert fit.losses == [pytest.approx(wanted, rel=1e-4)]
        assert fit.start == ([*CONFIGS][alone.index(min(alone))] if init == "best" else None)
    model.set_expert_weights({"lora": 0.5, "lokr": -9.0, "loha": 0.0, "bank": 0.0})
    fit = model.fit_weights(loss, steps=0, penalty=0.0, method="search")
    assert fit.weights == {"lora": 0.5, "lokr": -1.5, "loha": 0.0, "bank": 0.0}
    lines = str(fit).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["expert", "weight"],
        ["lokr", "-1.500"],
        ["lora", "0.500"],
    ]
    fit.save_json(tmp_path / "fit.json")
    assert json.loads((tmp_path / "fit.json").read_text())["weights"] == fit.weights


def test_each_layer_can_have_weights_of_its_own():
    torch.manual_seed(0)
    two = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    experts = {
        name: (config, get_peft_model_state_dict(get_peft_model(copy.deepcopy(two), config)))
        for name in ("a", "b")
    }
    model = get_routed_model(two, experts, routing="fixed")
    wanted = {"0": {"a": 1.0, "b": 0.0}, "1": {"a": -0.5, "b": 0.8}}
    model.set_expert_weights(wanted)
    x = torch.randn(40, 6)
    y = model(x).detach()
    loss = lambda: (model(x) - y).square().mean()  # noqa: E731
    model.set_expert_weights({"a": 0.5, "b": 0.5})
    shared = model.fit_weights(loss, steps=150, penalty=0.0)
    fit = model.fit_weights(loss, steps=400, lr=0.05, penalty=0.0, by_layer=True)
    assert not shared.by_layer and min(fit.losses) < 1e-3 < min(shared.losses)
    for path, own in wanted.items():
        assert fit.by_layer[path] == pytest.approx(own, abs=0.05)
    assert fit.weights["a"] == pytest.approx((fit.by_layer["0"]["a"] + fit.by_layer["1"]["a"]) / 2)
    with pytest.raises(ValueError, match="use `method`='gradient'"):
        model.fit_weights(loss, by_layer=True, method="search")
    whole = get_routed_model(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)),
        experts,
        routing="fixed",
        weights_granularity="model",
    )
    fit = whole.fit_weights(lambda: whole(x).square().mean(), steps=5)
    assert fit.weights == pytest.approx(
        {n: float(v) for n, v in zip("ab", whole.get_expert_weights()["1"], strict=True)}
    )
    with pytest.raises(ValueError, match="`weights_granularity`='model'"):
        whole.fit_weights(loss, by_layer=True)


def test_a_search_takes_losses_without_gradients_and_passes_over_those_that_are_not_finite():
    model = routed()
    loss, _, _ = problem(model)

    def rounded():  # steps, no gradient; infinite for large weights
        value = float(loss().detach())
        return round(value, 2) if value < 3 * start else INF

    start = float(loss().detach())
    fit = model.fit_weights(rounded, steps=150, method="search", penalty=0.0)
    assert min(fit.losses) < 0.3 * fit.losses[0]
    again = routed()
    other, _, _ = problem(again)
    same = again.fit_weights(
        lambda: round(v, 2) if (v := float(other().detach())) < 3 * start else INF,
        steps=150,
        method="search",
        penalty=0.0,
    )
    assert same.weights == pytest.approx(fit.weights)  # of one seed


def test_the_fitted_blend_is_saved_exported_and_merged(tmp_path):
    model = routed("learned")
    loss, _, _ = problem(model)
    model.fit_weights(loss, steps=60)
    x = torch.randn(5, 12)
    y = model(x).detach()
    model.save_pretrained(tmp_path / "routed")
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path / "routed")(x), y)
    save_as_lora(tmp_path / "lora", model)
    torch.testing.assert_close(
        PeftModel.from_pretrained(base(), tmp_path / "lora")(x), y, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-4, atol=1e-5)


def test_batches_of_a_language_model():
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    experts = {
        name: (config, get_peft_model_state_dict(get_peft_model(llama(), config)))
        for name in ("a", "b", "c")
    }
    model = get_routed_model(llama(), experts, routing="fixed", task_type="CAUSAL_LM")
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 48, (2, 2, 6))]
    with model.disable_adapter(), torch.no_grad():
        plain = [float(model(**batch).loss) for batch in batches]
    fit = model.fit_weights(batches, steps=3, init="zero", penalty=0.0)
    assert fit.losses[0] == pytest.approx(plain[0], rel=1e-5) and len(fit.losses) == 4
    fit = model.fit_weights(batches, steps=3, init="zero", penalty=0.0, method="search")
    assert fit.losses[0] == pytest.approx(sum(plain) / 2, rel=1e-5)
    model.set_expert_weights(fit.weights)
    now = sum(float(model(**batch).loss.detach()) for batch in batches) / 2
    assert now == pytest.approx(min(fit.losses), rel=1e-5)
    with pytest.raises(TypeError, match="no `loss`; batches need `labels`"):
        model.fit_weights([{"input_ids": torch.tensor([[3, 4, 5]])}])


WRONG_LOSSES = {
    "a float": (lambda y: float(y.detach().sum()), TypeError, "a float. Return the loss itself"),
    "nothing": (lambda y: None, TypeError, "it returned None"),
    "many": (lambda y: y.square(), TypeError, r"a tensor of shape \[3, 8\]"),
    "detached": (lambda y: y.detach().sum(), ValueError, "does not depend on the expert weights"),
    "NaN": (lambda y: y.sum() * NAN, ValueError, "`loss` is nan after 0 steps; the expert weights"),
    "no gradient": (lambda y: (y * 0).abs().sqrt().sum(), ValueError, "gradients that are NaN"),
}


@pytest.mark.parametrize("kind", WRONG_LOSSES)
def test_losses_that_can_not_be_fitted_are_named_and_nothing_changes(kind):
    model = routed()
    make, error, message = WRONG_LOSSES[kind]
    before = snapshot(model)
    with pytest.raises(error, match=message):
        model.fit_weights(lambda: make(model(torch.ones(3, 12))), init="zero")
    assert_unchanged(before, model)
    if kind in ("nothing", "many", "NaN"):
        with pytest.raises(error, match=message.replace("tensor of one number that gradients", "")):
            model.fit_weights(lambda: make(model(torch.ones(3, 12))), init="best", method="search")
        assert_unchanged(before, model)


def test_an_error_in_the_middle_changes_nothing():
    for method in ("gradient", "search"):
        model, calls = routed(), []
        before = snapshot(model)

        def broken(model=model, calls=calls):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("no data")
            return model(torch.ones(3, 12)).square().mean()

        with pytest.raises(RuntimeError, match="no data"):
            model.fit_weights(broken, method=method)
        assert_unchanged(before, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "`steps`=-1 must be an integer of at least 0"),
        ({"lr": 0}, "`lr`=0 must be a positive finite number"),
        ({"init": "zeros"}, "must be one of None, 'zero', 'equal', 'best'. Did you mean 'zero'"),
        ({"method": "gradients"}, "Did you mean 'gradient'"),
        ({"penalty": -1}, "`penalty`=-1 must be at least 0"),
        ({"bound": NAN}, "`bound`=nan must be a positive finite number"),
        ({"seed": 0.5}, "`seed`=0.5 must be an integer"),
    ],
    ids=str,
)
def test_options_are_checked(options, message):
    model = routed()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.fit_weights(lambda: model(torch.ones(1, 12)).sum(), **options)
    assert_unchanged(before, model)


def test_what_can_not_be_fitted_is_refused():
    arrow = routed("arrow")
    with pytest.raises(
        NotImplementedError, match="`routing`='arrow' has no weights for all inputs"
    ):
        arrow.fit_weights(lambda: arrow(torch.ones(1, 12)).sum())
    model = routed()
    other = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="never ran the routed layers of adapter default"):
        model.fit_weights(lambda: other(torch.ones(1, 3)).sum().detach(), method="search")
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged into the weights; call `unmerge_adapter`"):
        model.fit_weights(lambda: model(torch.ones(1, 12)).sum())
