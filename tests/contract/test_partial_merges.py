# SPDX-License-Identifier: Apache-2.0
"""A model of which some adapters are merged computes `(W + Σ merged) x + Σ Δ(x)` over those that
are active and not merged.
"""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.methods import METHODS
from helpers.models import mlp
from torch import nn

from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

TARGETS = {"a": ["0", "2"], "b": ["2", "4"], "c": ["0"]}
ACTIVE = [["a"], ["a", "b"], ["c", "a"]]
MERGED = [["a"], ["b"], ["b", "a"], ["c", "b"]]
COLUMNS = {"weight_decompose": True, "wd_on_output": False}
PAIRS = list(itertools.combinations(sorted(METHODS), 2))


def three(first, second, **options):
    base = mlp(torch.float64)
    before = copy.deepcopy(base)
    model = get_peft_model(base, first.config(target_modules=TARGETS["a"]), "a", **options)
    model.add_adapter("b", second.config(target_modules=TARGETS["b"]))
    model.add_adapter("c", first.config(target_modules=TARGETS["c"]))
    return before, model.eval()


def dense(base, model, names, merge, x):
    """The output by the formula: one weight for each layer."""
    for i, module in enumerate(base):
        if not isinstance(module, nn.Linear):
            x = module(x)
            continue
        weight, layer = module.weight, model.base_model.model[i]
        while isinstance(layer, BaseTunerLayer):
            for name in (name for name in names if name in layer.scaling):
                weight = weight + layer.get_delta_weight(name, **merge)
            layer = layer.base_layer
        x = F.linear(x, weight, module.bias)
    return x


def check_all(first, second, **options):
    base, model = three(first, second, **options)
    call, merge = {**first.call, **second.call}, {**first.merge, **second.merge}
    x = torch.randn(5, 8, dtype=torch.float64)
    for active, merged in itertools.product(ACTIVE, MERGED):
        model.set_adapter(active)
        model.merge_adapter(merged, **merge)
        expected = dense(base, model, {*active, *merged}, merge, x)
        torch.testing.assert_close(model(x, **call), expected)
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        torch.testing.assert_close(model(x, **call), expected)
        if set(merged) - set(active):  # what is not active is computed by the weights alone
            assert sorted(model.base_model.merged_adapters) == sorted(merged)
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload(**merge)(x), expected)
        if model.base_model.merged_adapters:
            model.unmerge_adapter()
        torch.testing.assert_close(model(x, **call), dense(base, model, active, merge, x))
    plain = model.unload()
    for name, tensor in base.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)


def test_every_choice_of_active_and_merged(method):
    check_all(method, method)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_choice_for_two_methods(pair):
    check_all(*(METHODS[name] for name in pair), mixed=True)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"weight_decompose": True}, COLUMNS])
def test_decomposed_adapters_compute_the_same_or_are_refused(fields):
    """They apply one after the other: a merge in another order, or around one, would be another
    function.
    """
    method = METHODS["LORA" if "use_dora" in fields else "LOKR"]
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)).double(), method.config(target_modules=["0"], **fields), "a"
    ).eval()
    model.add_adapter("b", method.config(target_modules=["0"]))
    model.add_adapter("c", method.config(target_modules=["0"], **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    layer = model.base_model.model[0]
    x, before, merges = (
        torch.randn(5, 8, dtype=torch.float64),
        layer.get_base_layer().weight.clone(),
        0,
    )
    for active in itertools.permutations("abc"):
        model.set_adapter(list(active))
        expected = model(x)
        for merged in (
            list(names) for n in (1, 2, 3) for names in itertools.permutations("abc", n)
        ):
            try:
                model.merge_adapter(merged)
            except NotImplementedError as error:
                assert "decomposed" in str(error)
                assert not layer.merged
            else:
                merges += 1
                torch.testing.assert_close(model(x), expected)
                model.unmerge_adapter()
            assert torch.equal(layer.get_base_layer().weight, before)
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), expected)
    assert merges >= 6


def test_an_active_decomposed_adapter_beside_an_inactive_merge():
    """As if both were active and the merged one came first."""
    for method, fields in (
        (METHODS["LORA"], {"use_dora": True, "lora_dropout": 0.5}),
        (METHODS["LOKR"], COLUMNS),
    ):
        base = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)).double()
        model = get_peft_model(base, method.config(target_modules=["0"], **fields), "a")
        model.add_adapter("b", method.config(target_modules=["0"]))
        x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
        for training in (False, True):
            model.train(training)
            model.set_adapter(["b", "a"])
            torch.manual_seed(0)
            expected = model(x)
            model.set_adapter("a")
            model.merge_adapter(["b"])
            torch.manual_seed(0)
            torch.testing.assert_close(model(x), expected)
            model.unmerge_adapter()


def test_tasks_of_a_partly_merged_model():
    """Ids have to name the merged task, but where the merged adapter is not active: they are for
    the others then.
    """
    method = METHODS["POLY"]
    base, model = three(method, method)
    layers = list(model.base_model.tuner_layers())
    x = torch.randn(3, 8, dtype=torch.float64)
    model.set_adapter(["a", "b"])
    model.merge_adapter(["b"], task_id=1)  # the first layer does not have it
    for ids in (2, [1, 1, 0], torch.tensor([0, 1, 2])):
        with pytest.raises(ValueError, match="Task 1 is merged"):
            model(x, task_ids=ids)
    with pytest.raises(ValueError, match="task_ids should not be None"):
        model(x)
    torch.testing.assert_close(
        model(x, task_ids=[1, 1, 1]), dense(base, model, "ab", {"task_id": 1}, x)
    )
    model.unmerge_adapter()
    model.set_adapter("a")
    model.merge_adapter(["b"], task_id=1)
    ids = [0, 2, 1]
    expected = []
    for row, task in zip(x, ids, strict=True):
        weights = {f"{i}.weight": m.weight for i, m in enumerate(base) if isinstance(m, nn.Linear)}
        for i, name, task_id in (("0", "a", task), ("2", "a", task), ("2", "b", 1), ("4", "b", 1)):
            delta = model.base_model.model[int(i)].get_delta_weight(name, task_id=task_id)
            weights[f"{i}.weight"] = weights[f"{i}.weight"] + delta
        expected.append(torch.func.functional_call(base, weights, (row,)))
    torch.testing.assert_close(model(x, task_ids=ids), torch.stack(expected))
    model.unmerge_adapter()
    layers[0].merge(adapter_names=["a"], task_id=0)
    layers[1].merge(adapter_names=["a"], task_id=2)
    with pytest.raises(ValueError, match="Task 0 or 2 is merged"):
        model(x, task_ids=0)


def test_names_for_samples_are_refused_while_merged(method):
    _, model = three(method, method)
    model.merge_adapter(["b"], **method.merge)
    with pytest.raises(ValueError, match="merged adapters"):
        model(torch.randn(2, 8, dtype=torch.float64), adapter_names=["a", "b"], **method.call)


def test_merging_while_disabled(method):
    """It takes effect when the adapters are switched on again."""
    base, model = three(method, method)
    x = torch.randn(5, 8, dtype=torch.float64)
    with model.disable_adapter():
        model.merge_adapter(["b"], **method.merge)
        assert torch.equal(model(x), base(x))
    torch.testing.assert_close(model(x, **method.call), dense(base, model, "ab", method.merge, x))
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()
    torch.testing.assert_close(model(x, **method.call), dense(base, model, "a", method.merge, x))


def test_a_merge_in_the_middle_of_generate(method):
    from helpers.models import llama
    from transformers import LogitsProcessor

    class Merging(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == 7:
                model.merge_adapter(**method.merge)
            return scores

    model = get_peft_model(llama(), method.config(target_modules=["q_proj", "v_proj"])).eval()
    ids = torch.randint(3, 48, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, **method.call}
    expected = model.generate(input_ids=ids, **options)
    assert torch.equal(
        model.generate(input_ids=ids, logits_processor=[Merging()], **options), expected
    )
    assert model.base_model.merged_adapters


def test_an_inactive_merged_adapter_is_not_taken_for_an_active_one_of_the_same_config():
    """Ids are for the active adapter, whatever task of another, with equal settings, is merged."""
    config = METHODS["POLY"].config(target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, "a").eval()
    model.add_adapter("b", config)
    layer, x = model.base_model.model[0], torch.randn(3, 8)
    model.set_adapter("b")
    weight = layer.weight + sum(
        layer.get_delta_weight(name, task_id=task) for name, task in (("a", 1), ("b", 2))
    )
    model.merge_adapter(["a"], task_id=1)
    torch.testing.assert_close(model(x, task_ids=2), x @ weight.T + layer.bias)
