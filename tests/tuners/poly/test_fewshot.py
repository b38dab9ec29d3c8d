# SPDX-License-Identifier: Apache-2.0
"""Training in part, the paper's regimes, and fitting a task's routing."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.models import llama, mlp
from helpers.poly import config, poly, task_routers, trainable
from helpers.states import assert_unchanged, snapshot
from torch import nn

from peft import PolyConfig, get_peft_model
from peft.optimizers import parameter_groups
from peft.tuners.poly import REGIMES
from peft.tuners.poly.layer import PolyLayer

NAN, INF = float("nan"), float("inf")


OPTIMISERS = [
    lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5),
    lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.5),
    lambda ps: torch.optim.Adafactor(ps, lr=0.1, weight_decay=0.5),
]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("skills", [False, True])
def test_only_the_rows_asked_for_move(optimiser, skills):
    """What steps do to the rows is what they do to a table of those rows alone, decay and state
    included.
    """
    model = poly(relaxed_bernoulli=False)
    model.add_tasks(["e", "f"])
    model.train_only(tasks=["e", "f", "b"], skills=skills)
    names = trainable(model)
    assert (
        sum("rows" in name for name in names) == 4
        and sum("lora" in name for name in names) == 4 * skills
    )
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    tasks = [0, 1, 2, 3, 4, 5, 4, 1]  # closed rows are used too
    layers = [m for m in model.modules() if isinstance(m, PolyLayer)]
    before = [layer.poly_router["default"].module_logits.detach().clone() for layer in layers]
    reference = copy.deepcopy(model)
    reference.set_adapter("default")
    alone = [p for n, p in reference.named_parameters() if "module_logits" in n]
    mine = optimiser([p for p in model.parameters() if p.requires_grad and p.dim() == 2])
    for _ in range(3):
        mine.zero_grad()
        model(x, task_ids=tasks).sub(y).square().sum().backward()
        mine.step()
    closed = [0, 2, 3]
    for layer, old in zip(layers, before, strict=True):
        router = layer.poly_router["default"]
        assert torch.equal(router.module_logits[closed], old[closed])
        assert (router.module_logits[[1, 4, 5]] != old[[1, 4, 5]]).any(1).all()
        assert router.module_logits.grad is None
        assert torch.equal(router.table(), router.module_logits)
    assert {id(p) for p in mine.state} == {
        id(row) for layer in layers for row in layer.poly_router["default"].rows
    }
    if skills:
        return
    # The slow way: step the rows as tensors of their own, with gradients of the whole table.
    rows = [[p.detach()[1:2].clone(), p.detach()[4:6].clone()] for p in alone]
    theirs = optimiser([row for pair in rows for row in pair])
    for _ in range(3):
        reference.zero_grad()
        reference(x, task_ids=tasks).sub(y).square().sum().backward()
        for p, (one, two) in zip(alone, rows, strict=True):
            one.grad, two.grad = p.grad[1:2].clone(), p.grad[4:6].clone()
        theirs.step()
        with torch.no_grad():
            for p, (one, two) in zip(alone, rows, strict=True):
                p[1:2], p[4:6] = one, two
    for layer, p in zip(layers, alone, strict=True):
        torch.testing.assert_close(layer.poly_router["default"].module_logits, p)


def test_open_rows_stay_in_the_table_wherever_the_model_goes(tmp_path):
    model = poly(relaxed_bernoulli=False)
    model.train_only(tasks="c")
    x = torch.randn(3, 8)
    for moved in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model).double().float(),
    ):
        assert "base_model.model.0.poly_router.default.rows.0" in trainable(moved)
        optimizer = torch.optim.SGD([p for p in moved.parameters() if p.requires_grad], lr=1.0)
        moved(x, task_ids=2).sum().backward()
        optimizer.step()
        for layer in moved.base_model.tuner_layers():
            router = layer.poly_router["default"]
            assert (
                torch.equal(router.module_logits, router.table())
                and router.rows[0].grad.abs().sum() > 0
            )
        assert not any("rows" in name for name in moved.state_dict())
        output = moved(x, task_ids=2)
        assert not torch.equal(output, model(x, task_ids=2))
        moved.save_pretrained(tmp_path)
        target = copy.deepcopy(model)
        target.load_adapter(tmp_path, "default")
        assert torch.equal(target(x, task_ids=2), output)
        target = copy.deepcopy(model)
        target.load_state_dict(moved.state_dict(), assign=True)
        assert torch.equal(target(x, task_ids=2), output)


def test_open_rows_follow_their_tasks():
    model = poly()
    model.train_only(tasks=["b", "c"])
    model.add_tasks(["e"])
    model.reorder_tasks(["c", "e", "d", "b", "a"])
    routers = list(task_routers(model).values())
    assert [router.opened for router in routers] == [[0, 3]] * 2
    model.remove_tasks("c")
    assert [router.opened for router in routers] == [[2]] * 2
    model.train_only(tasks="all", skills=True)
    everything = trainable(model)
    model.set_adapter("default")
    assert trainable(model) == everything and not any(router.runs for router in routers)


NOTHING_TRAINS = {
    "nothing named": ({}, lambda m: m.train_only()),
    "no companions": ({}, lambda m: m.train_only(companions=True)),
    "fixed": ({"routing": "fixed"}, lambda m: m.train_only(tasks=["a"])),
    "removed": ({}, lambda m: [m.train_only(tasks=["a", "b"]), m.remove_tasks(["b", "a"])]),
    "reordered away": (
        {},
        lambda m: [m.train_only(tasks="all"), m.train_only(tasks="b"), m.remove_tasks("b")],
    ),
}


@pytest.mark.parametrize("case", NOTHING_TRAINS)
def test_we_warn_where_nothing_is_left_that_trains(case):
    fields, change = NOTHING_TRAINS[case]
    model = poly(**fields)
    with pytest.warns(
        UserWarning,
        match="No parameter of the model trains now.*adapter default.*`train_only`.*`set_adapter`",
    ) as caught:
        change(model)
    assert caught[0].filename == __file__
    assert not trainable(model)
    with warnings.catch_warnings(action="error"):  # what was frozen before is no news
        model.remove_tasks("d")
        model.train_only(skills=True)


@pytest.mark.compile
def test_rows_train_in_mixed_batches_checkpoints_and_compiled():
    model = get_peft_model(
        llama(), config(target_modules=["q_proj", "v_proj"], relaxed_bernoulli=False)
    )
    model.add_adapter(
        "other", config(target_modules=["q_proj"], n_tasks=2, relaxed_bernoulli=False)
    )
    model.train_only(tasks=[3], adapter_name="default")
    ids = torch.randint(3, 48, (4, 5))
    call = {
        "input_ids": ids,
        "task_ids": [3, 1, 0, 3],
        "adapter_names": ["default", "other", "default", "__base__"],
    }
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**call).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 4 and all(g.abs().sum() > 0 for g in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    small = poly(relaxed_bernoulli=False, eval_top_k=2)
    small.train_only(tasks=["b", "d"])
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 8)
        for tasks in ([0, 1], [3, 3], [2, 0]):
            torch.testing.assert_close(
                compiled(x, task_ids=torch.tensor(tasks)), small(x, task_ids=tasks)
            )


# Regimes


def test_regimes():
    assert list(REGIMES) == ["Z", "full", "mu-Z", "mu", "random", "shared"]
    expected = {
        "Z": ("rows",),
        "full": ("lora", "rows"),
        "mu-Z": ("lora",),
        "mu": ("lora",),
        "random": ("lora", "rows"),
        "shared": ("lora",),
    }
    x = torch.randn(3, 8)
    for name, regime in REGIMES.items():
        model = poly()
        model.add_tasks(["new"])
        old = model(x, task_ids=["a", "c", "new"])
        chosen = model.begin_regime(name, ["new"] if regime.needs_tasks else None)
        assert chosen is regime
        parts = {
            next(part for part in ("rows", "lora", "module_logits") if part in name)
            for name in trainable(model)
        }
        assert tuple(sorted(parts)) == expected[name]
        active = model.active_adapter
        assert all(f".{active}" in parameter for parameter in trainable(model))
        kwargs = {"task_ids": "new"} if regime.needs_tasks else {}
        groups = parameter_groups(model, weight_decay=0.1)
        assert {group["name"]: group["lr"] for group in groups} == regime.rates
        optimizer = torch.optim.AdamW(groups)
        model.train()
        (model(x, **kwargs) + 1).square().sum().backward()
        optimizer.step()
        model.eval()
        model.set_adapter("default")
        now = model(x, task_ids=["a", "c", "new"])
        assert torch.allclose(now[:2], old[:2], atol=1e-6) == (name not in ("full", "mu-Z"))
    with pytest.raises(ValueError, match="takes no tasks"):
        poly().begin_regime("μ", ["a"])


# Fitting a task


@pytest.mark.parametrize("init", [None, "best", "equal"])
def test_fitting_finds_the_routing_of_a_task(init):
    model = poly()
    x = torch.randn(64, 8)
    y = model(x, task_ids="c").detach()
    model.add_tasks(["copy"], init="mean")
    model.train()
    model.train_only(tasks="a")
    before = snapshot(model)
    untouched = task_routers(model)["0"].module_logits[:4].clone()
    parameters = {id(p) for p in model.parameters()}
    fit = model.fit_task(
        "copy", lambda: (model(x, task_ids="copy") - y).square().mean(), steps=30, init=init
    )
    after = snapshot(model)
    assert {id(p) for p in model.parameters()} == parameters
    for key in ("requires_grad", "modules", "rng"):
        assert torch.equal(after[key], before[key]) if key == "rng" else after[key] == before[key]
    assert torch.equal(task_routers(model)["0"].module_logits[:4], untouched)
    changed = {n for n, t in after["state"].items() if not torch.equal(t, before["state"][n])}
    assert len(fit.losses) == 31 and fit.seconds > 0 and fit.task == 4
    if init == "best":
        assert fit.start == 2 and fit.losses[0] < 1e-10
    else:
        assert min(fit.losses) < fit.losses[0] / 5
    assert all("module_logits" in name for name in changed) and changed
    final = (model.eval()(x, task_ids="copy") - y).square().mean()
    assert abs(float(final.detach()) - min(fit.losses)) <= 1e-6


def test_fitting_with_batches_of_a_language_model():
    model = get_peft_model(
        llama(), config(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 48, (3, 2, 6))]
    model.add_tasks(1)
    fit = model.fit_task(4, batches, steps=9, lr=1.0, init="best")
    assert len(fit.losses) == 10 and sum(fit.losses[6:9]) < sum(fit.losses[:3])
    for bad in (3, [], ["text"]):
        with pytest.raises(TypeError, match="function without arguments, or batches"):
            model.fit_task(4, bad)
    model.add_adapter("idle", config(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="must be active"):
        model.fit_task(0, batches, adapter_name="idle")


WRONG_LOSSES = {
    "a float": (
        lambda y: float(y.detach().square().mean()),
        TypeError,
        "it returned .*, a float. Return the loss itself",
    ),
    "nothing": (lambda y: None, TypeError, "it returned None, a NoneType"),
    "many": (lambda y: y.square(), TypeError, r"it returned a tensor of shape \[3, 8\]"),
    "detached": (
        lambda y: y.detach().square().mean(),
        ValueError,
        "`loss` does not depend on the routing of task 0",
    ),
    "NaN": (
        lambda y: y.sum() * NAN,
        ValueError,
        "`loss` is nan after 0 steps; the routing of task 0 is left.*look for",
    ),
    "infinite": (lambda y: y.sum() * INF, ValueError, "`loss` is -?(inf|nan) after 0 steps"),
    "no gradient": (
        lambda y: (y * 0).abs().sqrt().sum(),
        ValueError,
        "`loss` is 0.0, but has gradients that are NaN",
    ),
}


@pytest.mark.parametrize("kind", WRONG_LOSSES)
@pytest.mark.parametrize("init", [None, "best"])
def test_losses_that_can_not_be_fitted_are_named(kind, init):
    model = poly()
    x = torch.randn(3, 8)
    before = snapshot(model)
    make, error, message = WRONG_LOSSES[kind]
    with pytest.raises(error, match=message):
        model.fit_task(0, lambda: make(model(x, task_ids=0)), init=init)
    assert_unchanged(before, model)


def test_a_loss_that_stops_being_finite_changes_nothing():
    model = poly()
    x, calls = torch.randn(3, 8), iter([1.0, 1.0, NAN])
    before = snapshot(model)
    with pytest.raises(ValueError, match="nan after 2 steps.*use a smaller `lr` than 0.1, or look"):
        model.fit_task("a", lambda: model(x, task_ids="a").square().mean() * next(calls))
    assert_unchanged(before, model)
    lm = get_peft_model(llama(), config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.tensor([[3, 4, 5]])
    before = snapshot(lm)
    with pytest.raises(ValueError, match="nan after 1 steps.*labels that are all left out"):
        lm.fit_task(
            0,
            [{"input_ids": ids, "labels": labels} for labels in (ids, torch.full_like(ids, -100))],
        )
    assert_unchanged(before, lm)


@pytest.mark.parametrize("init", [None, "best"])
def test_a_loss_that_runs_another_task_is_refused(init):
    model = poly()
    x = torch.randn(3, 8)
    before = snapshot(model)
    message = r"never ran the model with task 0 \('a'\), but with 1 \('b'\), 2 \('c'\): have it .* `task_ids=0`"
    with pytest.raises(ValueError, match=message):
        model.fit_task(
            "a", lambda: model(x, task_ids=["b", "c", "b"]).square().mean(), steps=2, init=init
        )
    assert_unchanged(before, model)
    turns = iter(["b", "a", "b"])  # some of the calls may be of other tasks
    fit = model.fit_task("a", lambda: model(x, task_ids=next(turns)).square().mean(), steps=2)
    assert len(fit.losses) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"steps": steps}, f"`steps`={steps!r} must be an integer of at least 0")
            for steps in ("3", 1.5, -1, True, None)
        ),
        *(
            ({"lr": lr}, f"`lr`={lr!r} must be a positive finite number")
            for lr in ("0.1", 0, INF, NAN, True, None)
        ),
        (
            {"init": "Best"},
            "`init`='Best' must be one of None, 'best', 'equal'. Did you mean 'best'",
        ),
        ({"init": ["best"]}, "must be one of"),
    ],
    ids=str,
)
def test_options_of_a_fit_are_checked(options, message):
    model = poly()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.fit_task("a", lambda: model(torch.ones(1, 8), task_ids="a").sum(), **options)
    assert_unchanged(before, model)


def test_no_task_is_fitted_while_adapters_are_merged():
    model = poly()
    model.merge_adapter(task_id="b")
    with pytest.raises(ValueError, match="'default'.* are merged.*`unmerge_adapter`"):
        model.fit_task("a", lambda: model(torch.ones(1, 8), task_ids="a").sum())


def test_no_steps_take_the_best_start():
    model, x = poly(), torch.randn(3, 8)
    y = model(x, task_ids="c").detach()
    fit = model.fit_task(
        "a",
        lambda: (model(x, task_ids="a") - y).square().mean(),
        steps=torch.tensor(0),
        init="best",
    )
    assert fit.start == 2 and fit.losses == [0.0] and torch.equal(model(x, task_ids="a"), y)


def test_batches_need_a_loss():
    model = get_peft_model(llama(), config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="no `loss`; batches need `labels`"):
        model.fit_task(0, [{"input_ids": torch.tensor([[3, 4, 5]])}])


def test_a_fit_that_fails_leaves_the_model_as_it_was():
    model = poly()
    x, calls = torch.randn(3, 8), []
    before = snapshot(model)

    def broken():
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("no data")
        return model(x, task_ids="a").square().mean()

    for init in (None, "best"):
        calls.clear()
        with pytest.raises(RuntimeError, match="no data"):
            model.fit_task("a", broken, init=init)
        assert_unchanged(before, model)


class Sequence(nn.Module):
    """A model with a head that an adapter trains whole."""

    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def test_companions_train_on_request():
    model = get_peft_model(Sequence(), config(target_modules=["body.0"], modules_to_save=["head"]))
    model.train_only(tasks=[1])
    assert not any("head" in name for name in trainable(model))
    model.train_only(tasks=[1], companions=True)
    assert sum("head" in name for name in trainable(model)) == 2


@pytest.mark.parametrize("options", [{"skills": "yes"}, {"skills": 1}, {"companions": None}])
def test_what_trains_is_said_by_true_or_false(options):
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), PolyConfig(n_tasks=2, target_modules=["0"])
    )
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TypeError, match="must be True or False"):
        model.train_only(**options)
    assert [p.requires_grad for p in model.parameters()] == before


def test_one_task_is_fitted_at_a_time():
    model = poly()
    before = snapshot(model)
    with pytest.raises(ValueError, match="names 2 tasks; pass one"):
        model.fit_task([0, 1], lambda: torch.zeros((), requires_grad=True))
    assert_unchanged(before, model)
