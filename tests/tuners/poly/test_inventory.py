# SPDX-License-Identifier: Apache-2.0
"""Tasks that are added, removed and reordered, and what is refused."""

import copy
import warnings

import pytest
import torch
from helpers.models import mlp
from helpers.poly import config, poly, task_routers, trainable
from helpers.states import assert_unchanged, snapshot
from torch import nn

from peft import PeftModel, convert_to_lora, get_peft_model, save_as_lora


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
    ("set_router_weights", {"nowhere": torch.ones(4, 3)}, ValueError, "not paths of layers"),
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
def test_what_an_engine_has_sharded_is_left_alone(change):
    model = poly().train()
    last = list(task_routers(model).values())[-1].module_logits
    last.ds_numel = last.numel()  # as DeepSpeed marks what it has sharded
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
        r"\['O'\] are not paths .* those are \['0', '2'\]",
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
