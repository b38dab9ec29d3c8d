# SPDX-License-Identifier: Apache-2.0
"""Tasks that come and go, training in part, the paper's regimes, and fitting a task's routing."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.models import llama, mlp
from helpers.states import assert_unchanged, snapshot
from torch import nn

from peft import PeftModel, PolyConfig, convert_to_lora, get_peft_model, save_as_lora
from peft.optimizers import parameter_groups
from peft.tuners.poly import REGIMES, adapter, tables
from peft.tuners.poly.layer import PolyLayer

TARGETS = ["0", "2"]
NAN, INF = float("nan"), float("inf")


def task_routers(model):
    layers = model.base_model.named_tuner_layers()
    return {path: layer.router("default") for path, layer in layers}


def config(**fields):
    return PolyConfig(
        **{
            "r": 2,
            "n_tasks": 4,
            "n_skills": 3,
            "n_splits": 2,
            "init_weights": False,
            "target_modules": TARGETS,
            **fields,
        }
    )


def poly(**fields):
    model = get_peft_model(mlp(), config(task_names=["a", "b", "c", "d"], **fields)).eval()
    with torch.no_grad():
        [p.normal_() for n, p in model.named_parameters() if "module_logits" in n]
    return model


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("granularity", ["linear", "model"])
def test_removing_and_reordering_moves_no_other_task(granularity, tmp_path):
    model = poly(router_granularity=granularity)
    x = torch.randn(4, 8)
    before, of_two = (
        model(x, task_ids=["a", "b", "c", "d"]),
        model(x, task_ids=["c", "d", "d", "c"]),
    )
    model.reorder_tasks(["d", 0, "c", "b"])
    assert model.peft_config["default"].task_names == ["d", "a", "c", "b"]
    assert torch.equal(model(x, task_ids=["a", "b", "c", "d"]), before)
    assert torch.equal(model(x, task_ids=[1, 3, 2, 0]), before)
    model.remove_tasks(["a", 3])
    assert model.peft_config["default"].task_names == ["d", "c"]
    assert torch.equal(model(x, task_ids=["c", "d", "d", "c"]), of_two)
    assert all(w.shape == (2, 2, 3) for w in model.get_router_weights().values())
    with pytest.raises(ValueError, match="Unknown task names"):
        model(x, task_ids="a")
    model.add_tasks(["e"], init="d")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(loaded(x, task_ids=["c", "d", "e", "c"]), of_two)


BAD = [
    ("remove_tasks", ["a", "nobody"], ValueError, "Unknown task names"),
    ("remove_tasks", ["a", "b", "c", "d"], ValueError, "needs a task"),
    ("remove_tasks", [4], ValueError, "Only 4 tasks"),
    (
        "remove_tasks",
        ["A"],
        ValueError,
        r"the adapter's are \['a', 'b', 'c', 'd'\]. Did you mean 'a'\?",
    ),
    ("remove_tasks", [1.5], TypeError, "integers"),
    ("remove_tasks", {"a"}, TypeError, "not set; ids or names go in a list"),
    ("remove_tasks", [], ValueError, "`tasks` names no task; pass at least one"),
    ("remove_tasks", torch.tensor([], dtype=torch.long), ValueError, "`tasks` names no task"),
    ("reorder_tasks", (), ValueError, "`order` names no task"),
    ("reorder_tasks", ["a", "b", "c"], ValueError, "each of the adapter's 4 tasks once"),
    ("reorder_tasks", ["a", "a", "c", "d"], ValueError, "each of the adapter's 4 tasks once"),
    (
        "set_router_weights",
        [[1.0, 2.0]],
        ValueError,
        r"shape \[1, 2\] must be \[4, 3\] or \[4, 2, 3\]",
    ),
    (
        "set_router_weights",
        [["a"] * 3] * 4,
        TypeError,
        "`0`: weights must be a table of numbers, not list",
    ),
    ("set_router_weights", None, TypeError, "must be a table of numbers, not NoneType"),
    (
        "set_router_weights",
        torch.ones(4, 3) * 1j,
        TypeError,
        "must be real numbers, not torch.complex64",
    ),
    ("set_router_weights", -torch.ones(4, 3), ValueError, "not negative"),
    ("set_router_weights", {"nowhere": torch.ones(4, 3)}, ValueError, "no paths of layers"),
    ("begin_regime", "Y", ValueError, "must be one of 'Z'"),
    ("begin_regime", "Z", ValueError, "takes the new tasks"),
    ("extract_tasks", "default", TypeError, "required positional"),
    (lambda m: m.train_only(tasks=[]), None, ValueError, "`tasks` names no task"),
    (
        lambda m: m.base_model.model[0].get_delta_weight("default", task_id="a"),
        None,
        TypeError,
        "`task_id`='a' must be an integer",
    ),
    (
        lambda m: m.base_model.model[0].low_rank_factors("default", task_id={}),
        None,
        ValueError,
        "`task_id`={} names no task",
    ),
    (lambda m: m.extract_tasks("new", []), None, ValueError, "`tasks` names no task"),
    (
        lambda m: m.merge_adapter(task_id=["a", "b"]),
        None,
        ValueError,
        r"`task_id`=\['a', 'b'\] names 2 tasks; pass one",
    ),
    (
        lambda m: m.merge_adapter(task_id={"a": 1.0}),
        None,
        TypeError,
        "must be one task.*`extract_tasks`",
    ),
]


@pytest.mark.parametrize("renamed", [["c", "a", "b"], None], ids=["other order", "no names"])
def test_values_loaded_into_an_adapter_come_with_the_names_of_their_tasks(renamed, tmp_path):
    """Trainers resume so. Each name then means what it means after loading into a new model."""
    fields = {"n_tasks": 3, "target_modules": ["0"]}
    torch.manual_seed(1)
    base, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    saved = get_peft_model(copy.deepcopy(base), config(task_names=["a", "b", "c"], **fields)).eval()
    with torch.no_grad():
        for router in task_routers(saved).values():
            router.module_logits.normal_()
    saved.save_pretrained(tmp_path)
    model = get_peft_model(copy.deepcopy(base), config(task_names=renamed, **fields)).eval()
    model.load_adapter(tmp_path, "default")
    fresh = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for name in "abc":
        torch.testing.assert_close(model(x, task_ids=name), fresh(x, task_ids=name))
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    torch.testing.assert_close(again(x, task_ids="c"), fresh(x, task_ids="c"))


@pytest.mark.parametrize(
    ("method", "argument", "error", "message"), BAD, ids=lambda value: str(value)[:20]
)
def test_what_cannot_be_done_changes_nothing(method, argument, error, message):
    model = poly()
    before, fields = snapshot(model), vars(model.peft_config["default"]).copy()
    with pytest.raises(error, match=message):
        method(model) if callable(method) else getattr(model, method)(argument)
    assert_unchanged(before, model)
    assert vars(model.peft_config["default"]) == fields


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


HELD = [
    lambda m: m.train_only(tasks=["a"]),
    lambda m: m.fit_task("a", lambda: torch.zeros(())),
    lambda m: m.add_tasks(["e"]),
    lambda m: m.remove_tasks("a"),
    lambda m: m.reorder_tasks(list("badc")),
    lambda m: m.add_skills(1),
    lambda m: m.begin_regime("mu-Z", ["a"]),
]


@pytest.mark.parametrize("change", HELD)
def test_what_an_engine_has_sharded_is_left_alone(change, monkeypatch):
    model = poly().train()
    last = list(task_routers(model).values())[-1].module_logits
    for module in (tables, adapter):
        monkeypatch.setattr(module, "is_managed", lambda p: p is last)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="ngine has sharded (the )?adapter.*before"):
        change(model)
    assert_unchanged(before, model)
    assert len(model.peft_config["default"].task_names) == 4


START = lambda m, init: m.add_tasks(["new"], init=init)  # noqa: E731
WORDS = [
    ("mean", 0, START),
    ("uniform", 1, START),
    ("all", 2, lambda m, tasks: m.train_only(tasks=tasks)),
]


@pytest.mark.parametrize(("word", "task", "change"), WORDS, ids=["mean", "uniform", "all"])
def test_a_word_goes_before_a_task_of_its_name_and_a_list_has_names(word, task, change):
    def outcome(names, value):
        torch.manual_seed(0)
        model = poly()
        model.peft_config["default"].task_names = names
        change(model, value)
        return sorted(trainable(model)), [
            weights.tolist() for weights in model.get_router_weights().values()
        ]

    words, others = ["mean", "uniform", "all", "d"], ["a", "b", "c", "d"]
    with pytest.warns(
        UserWarning,
        match=rf"='{word}' is not the task of that name: pass \['{word}'\] for the task",
    ):
        assert outcome(words, word) == outcome(others, word)
    with warnings.catch_warnings(action="error"):
        assert outcome(words, [word]) == outcome(others, task) != outcome(others, word)


BAD_NEW = [
    (
        lambda m: m.add_tasks("new"),
        TypeError,
        r"must be a number or a list of names. Did you mean \['new'\]",
    ),
    *(
        (lambda m, t=t: m.add_tasks(t), TypeError, "must be a number or a list")
        for t in (None, True, 1.5, [None], b"n")
    ),
    (lambda m: m.add_tasks([]), ValueError, "it names none"),
    (lambda m: m.add_tasks([" "]), ValueError, "' ' is blank"),
    (lambda m: m.add_tasks(["new", "a"]), ValueError, "'a' comes twice"),
    (
        lambda m: m.add_tasks(["new"], init=None),
        ValueError,
        "`init`=None must be 'mean', 'uniform', or the id or name of a task",
    ),
    (lambda m: m.add_tasks(["new"], init="men"), ValueError, "Did you mean 'mean'"),
    (lambda m: m.add_tasks(["new"], init=["a", "b"]), ValueError, "names 2 tasks; pass one"),
    (lambda m: m.begin_regime("z", ["a"]), ValueError, "Did you mean 'Z'"),
    (
        lambda m: m.begin_regime("Z"),
        ValueError,
        "takes the new tasks: pass `tasks=`.*adapter's 4; `add_tasks` adds",
    ),
    (lambda m: m.begin_regime(["Z"], ["a"]), ValueError, "must be one of"),
    (
        lambda m: m.begin_regime("Z", ["a"], new_adapter="b"),
        ValueError,
        "makes no adapter: leave out `new_adapter`='b'",
    ),
    (
        lambda m: m.set_router_weights({"O": torch.ones(4, 3)}),
        ValueError,
        r"\['O'\] are no paths .* those are \['0', '2'\]",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_NEW)
def test_bad_new_tasks_change_nothing(change, error, message):
    model = poly()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        change(model)
    assert_unchanged(before, model)
    assert model.peft_config["default"].task_names == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "", "c", "d"], "'' is blank"),
        (["a", "b", "a", "d"], "'a' comes twice"),
        (["a"], "there are 1"),
        ({"a", "b", "c", "d"}, "must be a list: a name's place"),
        (["a", ["b"], "c", "d"], "must be a list of strings"),
    ],
    ids=["blank", "twice", "too few", "set", "no string"],
)
def test_names_of_tasks_are_checked(names, message):
    with pytest.raises(ValueError, match=message):
        config(task_names=names)


def test_new_tasks_come_in_any_collection():
    model = get_peft_model(mlp(), config())
    model.add_tasks(torch.tensor(2))
    model.add_tasks(name for name in ("x", "y"))
    assert model.peft_config["default"].task_names == ["0", "1", "2", "3", "4", "5", "x", "y"]


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


def test_the_mean_of_all_skills():
    model = poly(alpha=3.0)
    model.average_skills("mean")
    for layer in model.base_model.tuner_layers():
        A, B = layer.poly_lora_A["default"].double(), layer.poly_lora_B["default"].double()
        left = torch.cat([sum(A[q, s] for s in range(3)) / 3 for q in range(2)], 0)
        right = torch.cat([sum(B[q, s] for s in range(3)) / 3 for q in range(2)], 1)
        torch.testing.assert_close(
            layer.get_delta_weight("mean").double(), (left @ right * 1.5).T, atol=1e-6, rtol=1e-5
        )
    new = model.peft_config["mean"]
    assert (new.n_tasks, new.n_skills, new.n_splits, new.r, new.alpha, new.task_names) == (
        1,
        1,
        1,
        2,
        3.0,
        None,
    )


@pytest.mark.parametrize("granularity", ["linear", "layer"])
def test_extracting_tasks(granularity, tmp_path):
    model = poly(router_granularity=granularity, rank_pattern={"2": 3})
    x = torch.randn(2, 8)
    expected = model(x, task_ids=["d", "b"])
    model.extract_tasks("few", ["d", "b"])
    model.extract_tasks("one", {"b": 1.0})
    model.extract_tasks("blend", {"d": 0.25, "b": 0.75})
    model.set_adapter("few")
    assert model.peft_config["few"].task_names == ["d", "b"] and torch.equal(
        model(x, task_ids=[0, 1]), expected
    )
    model.set_adapter("one")
    torch.testing.assert_close(model(x[1:]), expected[1:])
    for layer in model.base_model.tuner_layers():
        low = layer.low_rank_factors("default", task_id={3: 0.25, 1: 0.75})
        torch.testing.assert_close(layer.get_delta_weight("blend"), low.B @ low.A)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "few")
    assert torch.equal(loaded(x, task_ids=["d", "b"]), expected)
    with pytest.raises(ValueError, match="a task twice"):
        poly().extract_tasks("x", ["a", "a"])
    with pytest.raises(ValueError, match="already exists"):
        poly().extract_tasks("default", ["a"])


BAD_SHARES = [
    ({}, "names no task; pass a share for each"),
    ({"A": 1.0}, "Did you mean 'a'"),
    ({("a", "b"): 1.0}, "names 2 tasks; pass one"),
    *(
        ({"b": 1.0, "a": share}, r"\['a'\]`=.* must be a finite number")
        for share in (NAN, INF, "1", None, True, [1.0])
    ),
]


@pytest.mark.parametrize(("shares", "message"), BAD_SHARES, ids=str)
def test_shares_of_a_blend_are_checked(shares, message, tmp_path):
    model = poly()
    before = snapshot(model)
    for blend in (
        lambda: model.extract_tasks("blend", shares),
        lambda: save_as_lora(tmp_path / "lora", model, task_id=shares),
    ):
        with pytest.raises(ValueError, match=message):
            blend()
    assert_unchanged(before, model)
    assert list(model.peft_config) == ["default"] and not (tmp_path / "lora").exists()


def test_shares_are_numbers_of_any_kind_and_add_up():
    model = poly()
    model.extract_tasks("blend", {"a": torch.tensor(0.75), 0: -0.25, "b": 0})
    for layer in model.base_model.tuner_layers():
        # Both factors have the share: it is their weights that are blended.
        expected = 0.5**2 * layer.get_delta_weight("default", task_id=0).double()
        torch.testing.assert_close(layer.get_delta_weight("blend").double(), expected)


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


def test_messages_name_the_argument_that_the_caller_passed(tmp_path):
    model = poly()
    for call in (
        lambda **task: save_as_lora(tmp_path / "lora", model, **task),
        lambda **task: convert_to_lora(model, **task),
    ):
        with pytest.raises(
            ValueError,
            match="^task_id should not be None: the adapter has 4 tasks; pass one of them, by id or name",
        ):
            call()
        with pytest.raises(TypeError, match="`task_id` must be integers, not torch.float32"):
            call(task_id=0.5)
    assert not (tmp_path / "lora").exists()
    with pytest.raises(TypeError, match="`task_id` must be"):
        model.merge_adapter(task_id=0.5)
    for method, argument in (
        ("fit_task", "task"),
        ("remove_tasks", "tasks"),
        ("reorder_tasks", "order"),
    ):
        with pytest.raises(TypeError, match=f"`{argument}` must be integers"):
            getattr(model, method)(*(0.5, None)[: 2 if method == "fit_task" else 1])
    with pytest.raises(TypeError, match="`init` must be integers"):
        model.add_tasks(["new"], init=0.5)


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
