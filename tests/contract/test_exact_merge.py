# SPDX-License-Identifier: Apache-2.0
"""Merging into one weight: what is kept to undo it, which changes by others are noticed, and what
a cast that fails or a state dict leaves.
"""

import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload
from helpers.methods import METHODS
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.ops import exact_merge
from peft.ops.exact_merge import Written

pytestmark = pytest.mark.quick


def adapted(dtype=torch.float32):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    before = copy.deepcopy(base.state_dict())
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    return get_peft_model(base, config).eval(), before


def assert_base(model, before):
    for i, layer in enumerate(model.base_model.tuner_layers()):
        assert torch.equal(layer.base_layer.weight, before[f"{i}.weight"])
        assert torch.equal(layer.base_layer.bias, before[f"{i}.bias"])


@pytest.mark.parametrize("factor", [None, torch.full((3, 3), 2.0)])
@pytest.mark.parametrize("lost", [0, 1, 3, 4, 9])
def test_few_elements_are_kept_by_position_and_many_as_a_whole(lost, factor):
    """A position takes more memory than a value, so up to a third is kept by position."""
    weight, delta = torch.randn(3, 3), torch.zeros(3, 3)
    merged = weight.clone() if factor is None else weight * factor
    merged.view(-1)[:lost] += 1
    kept = exact_merge.correction(weight, merged, delta, factor)
    assert len(kept.values) == (lost if lost < 4 else 3)
    assert kept.positions is None if lost > 3 else kept.positions.tolist() == list(range(lost))
    assert torch.equal(exact_merge.subtract(merged, delta, kept), weight)


@pytest.mark.parametrize("lost", [0, 2, 40])
def test_a_weight_keeps_its_memory_format(lost):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    merged, delta = weight.clone(), torch.zeros(4, 3, 2, 2)
    merged.permute(0, 2, 3, 1).reshape(-1)[:lost] += 1
    kept = exact_merge.correction(weight, merged, delta)
    again = exact_merge.subtract(merged, delta, kept)
    assert torch.equal(again, weight) and again.stride() == weight.stride()


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
def test_a_change_of_one_element_is_noticed_in_every_dtype(dtype):
    weight = torch.ones(4, 4, dtype=dtype)
    written = Written(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written.look(weight.clone(), ["a"])
        written.look(weight.to(torch.float32 if dtype != torch.float32 else torch.float64), ["a"])
    assert not written.is_changed
    changed = weight.float()
    changed[1, 2] = 2
    with pytest.warns(UserWarning, match="changed while adapters were merged into it: a, b"):
        written.look(changed.to(dtype), ["a", "b"])
    assert written.is_changed and Written(weight, written).is_changed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written.look(changed.to(dtype), ["a"])  # once is enough
        Written(weight, is_final=False).look(changed.to(dtype), ["a"])


def test_a_weight_that_was_unmerged_may_be_changed():
    model, before = adapted()
    model.merge_adapter()
    model.unmerge_adapter()
    for layer in model.base_model.tuner_layers():
        layer.base_layer.weight.data += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
        model.unmerge_adapter()
    assert_base(model, {k: v + 1 if "weight" in k else v for k, v in before.items()})


@pytest.mark.parametrize("when", ["first", "after the weight"])
def test_a_cast_that_fails_leaves_the_merged_weight(when):
    model, before = adapted()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    layer, x = model.base_model.model[0], torch.randn(3, 8)
    merged, output = layer.base_layer.weight.clone(), model(x)

    def failing(tensor):
        if tensor.numel() and (when == "first" or tensor.shape != (8, 8)):
            raise MemoryError
        return tensor.double()

    with pytest.raises(MemoryError):
        layer._apply(failing)
    assert torch.equal(layer.base_layer.weight, merged)
    assert torch.equal(model(x), output)
    model.unmerge_adapter()
    assert_base(model, before)


def test_a_plain_state_of_a_merged_model_has_its_weights():
    """A dictionary has no place for the note of what is merged; torch takes one all the same."""
    model, _ = adapted()
    model.merge_adapter()
    state = model.state_dict(destination={})
    assert torch.equal(
        state["base_model.model.0.base_layer.weight"], model.base_model.model[0].weight
    )


def test_a_state_that_was_merged_with_an_adapter_that_is_missing_here():
    """Its weights are taken, and nothing of the model's own is merged into them."""
    model, _ = adapted()
    other = copy.deepcopy(model)
    other.add_adapter("b", METHODS["LORA"].config(target_modules=["0"]))
    other.merge_adapter(["b"])
    model.load_state_dict(other.state_dict(), strict=False)
    assert model.base_model.merged_adapters == []
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), other(x))
    weight = other.base_model.model[0].base_layer.weight.clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, weight)


def mixed():
    """LoRA's layer and LoKr's around one layer that they share."""
    base = nn.Sequential(nn.Linear(8, 8))
    before = base[0].weight.detach().clone()
    config = METHODS["LORA"].config(target_modules=["0"], lora_bias=True)
    model = get_peft_model(base, config, "a", mixed=True).eval()
    model.add_adapter("b", METHODS["LOKR"].config(target_modules=["0"]))
    model.set_adapter(["a", "b"])
    return model, before


def test_a_cast_of_merges_of_two_methods():
    model, before = mixed()
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    merged = model.base_model.model[0].weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        layer = model.base_model.model[0]
        assert layer.double() is layer and layer.double() is layer
        assert torch.equal(layer.weight, merged.double())
        assert torch.equal(layer.unmerged_weight(), before.double())
    layer.unmerge()
    layer.base_layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, before.double())


@pytest.mark.parametrize("merged", [[], ["a"], ["a", "b"]])
def test_loading_a_state_of_two_methods(merged):
    """Into a model with both merged: all of its merges are forgotten, and those of the state noted.
    Its own state leaves it as it is.
    """
    model, before = mixed()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    third = copy.deepcopy(other)
    with torch.no_grad():
        for parameter in third.parameters():
            parameter.mul_(0.9)
    for one in (other, third) if merged else ():
        one.merge_adapter(merged)
    model.merge_adapter(["a", "b"])
    model.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    copied.unmerge_adapter()
    assert torch.equal(copied.base_model.model[0].get_base_layer().weight, before)
    model.load_state_dict(other.state_dict())
    assert sorted(model.base_model.merged_adapters) == merged
    x = torch.randn(3, 8)
    assert torch.equal(model(x), other(x))
    weight = model.base_model.model[0].get_base_layer().weight.clone()
    if "b" not in merged:
        model.merge_adapter(["b"])
        torch.testing.assert_close(model(x), other(x))
        next(layer for layer in model.base_model.tuner_layers() if "b" in layer.scaling).unmerge()
    assert torch.equal(model.base_model.model[0].get_base_layer().weight, weight)
    if not merged:
        model.merge_adapter(["a"])
        model.unmerge_adapter()
        for name in ("weight", "bias"):
            found, wanted = (getattr(m.base_model.model[0], name) for m in (model, other))
            assert torch.equal(found, wanted)
    for layer in model.base_model.tuner_layers():
        if layer.merged:
            with pytest.raises(RuntimeError, match="merged in the state dict"):
                layer.unmerge()
    model.load_state_dict(third.state_dict())
    names = [layer.merged_adapters for layer in third.base_model.tuner_layers()]
    assert [layer.merged_adapters for layer in model.base_model.tuner_layers()] == names
    assert torch.equal(model(x), third(x))


def test_what_one_layer_can_not_unmerge_keeps_the_others_merged():
    model, _ = adapted()
    other = copy.deepcopy(model)
    other.base_model.model[1].base_layer.weight.data += 1
    other.merge_adapter()
    model.merge_adapter()
    state = other.state_dict()
    for key in [key for key in state if ".0." in key]:
        del state[key]
    model.load_state_dict(state, strict=False)
    before = copy.deepcopy(model.state_dict())
    for verb in (model.base_model.disable_adapter_layers, model.unmerge_adapter):
        with pytest.raises(RuntimeError, match="merged in the state dict that this model loaded"):
            verb()
        for layer in model.base_model.tuner_layers():
            assert layer.merged_adapters == ["default"] and not layer.disable_adapters
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key])


def test_weights_for_a_merged_model_on_the_meta_device():
    """Without numbers nobody can say that they are the same."""
    model, before = adapted()
    other = copy.deepcopy(model)
    model.merge_adapter()
    model.to("meta").load_state_dict(other.state_dict(), assign=True)
    assert model.base_model.merged_adapters == []
    x = torch.randn(3, 8)
    assert torch.equal(model(x), other(x))
    assert_base(model, before)


def test_training_half_of_a_merged_adapter_earns_a_word():
    model, _ = adapted()
    model.merge_adapter()
    for layer in model.train().base_model.tuner_layers():
        layer.lora_A["default"].requires_grad_(False)
    with pytest.warns(UserWarning, match="in training mode while adapters are merged: default"):
        model(torch.randn(3, 8))


def test_a_permanent_merge_without_a_task_keeps_the_merged_one():
    """Another task is merged instead; if that fails, the first is merged as before."""
    base = nn.Sequential(nn.Linear(8, 8))
    weight, bias = base[0].weight.detach().clone(), base[0].bias.detach().clone()
    config = METHODS["POLY"].config(target_modules=["0"])
    model = get_peft_model(base, config).eval()
    model.add_adapter("broken", config)
    layer = model.base_model.model[0]
    layer.poly_lora_B["broken"].data[:] = torch.nan
    model.merge_adapter(["default"], task_id=1)
    merged = layer.weight.clone()
    with pytest.raises(ValueError, match="adapter broken seems to be broken"):
        model.merge_and_unload(adapter_names=["default", "broken"], safe_merge=True, task_id=2)
    assert layer.merged_adapters == ["default"] and torch.equal(layer.weight, merged)
    one, two = (layer.get_delta_weight("default", task_id=task) for task in (1, 2))
    x = torch.randn(3, 8)
    other = copy.deepcopy(model).merge_and_unload(task_id=2)
    torch.testing.assert_close(other(x), x @ (weight + two).T + bias)
    torch.testing.assert_close(model.merge_and_unload()(x), x @ (weight + one).T + bias)


def test_norms_of_columns_are_taken_outside_of_autocast():
    """`W + Δa + ΔW(m, W + Δb)`, where b's norms are those of its own sum."""
    lokr = METHODS["LOKR"]
    base = nn.Sequential(nn.Linear(32, 32))
    model = get_peft_model(base, lokr.config(target_modules=["0"]), "a").eval()
    columns = {"weight_decompose": True, "wd_on_output": False}
    model.add_adapter("b", lokr.config(target_modules=["0"], **columns))
    model.set_adapter(["a", "b"])
    layer, x = model.base_model.model[0], torch.randn(3, 32)
    layer.lokr_magnitude["b"].data *= 1.5
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter(["a", "b"])
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.other = nn.Linear(8, 8)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.other(self.embed(ids)))


@pytest.mark.filterwarnings("ignore:`head` shares")
def test_a_permanent_merge_of_another_adapter_parts_a_merged_weight():
    """The embedding keeps its numbers, unless nobody can say which these were."""
    ids = torch.arange(8)
    model = get_peft_model(Tied(), METHODS["LORA"].config(target_modules=["head"])).eval()
    model.add_adapter("b", METHODS["LORA"].config(target_modules=["other"]))
    loaded, embedding = copy.deepcopy(model), model.embed.weight.clone()
    model.merge_adapter(["default"])
    loaded.load_state_dict(model.state_dict())
    head = model.head.weight.clone()
    other = model.other.weight + model.other.get_delta_weight("b")
    expected = (embedding @ other.T + model.other.bias) @ head.T
    plain = model.merge_and_unload(adapter_names=["b"])
    assert torch.equal(plain.embed.weight, embedding)
    torch.testing.assert_close(plain(ids), expected)
    loaded.add_adapter("c", METHODS["LORA"].config(target_modules=["head"]))
    delta = loaded.head.get_delta_weight("c")
    loaded.merge_adapter(["c"])
    plain = loaded.merge_and_unload(adapter_names=["b"])
    embedding, head = head + delta, head + delta
    torch.testing.assert_close(plain(ids), (embedding @ other.T + model.other.bias) @ head.T)


def test_an_adapter_without_values_is_not_merged():
    model, before = adapted()
    for layer in model.base_model.tuner_layers():
        layer.lora_A["default"].to("meta")
    with pytest.raises(NotImplementedError, match="Adapter default is on the meta device"):
        model.merge_adapter()
    assert model.base_model.merged_adapters == []
    assert_base(model, before)
    model.to("meta").merge_adapter()


def test_merges_of_an_offloaded_model_and_those_that_fail():
    """Weights come for each step and go again; what failed has changed nothing."""
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = METHODS["POLY"].config(target_modules=["0", "1"])
    model = get_peft_model(base, config).eval()
    model.add_adapter("broken", METHODS["POLY"].config(target_modules=["0"]))
    model.base_model.model[0].poly_lora_B["broken"].data[:] = torch.nan
    x = torch.randn(3, 8)
    one, two = (model(x, task_ids=task).detach() for task in (1, 2))
    with model.disable_adapter():
        plain = model(x).detach()
    cpu_offload(model, torch.device("cpu"))
    both = {"adapter_names": ["default", "broken"], "safe_merge": True}
    with pytest.raises(ValueError, match="adapter broken seems to be broken"):
        model.merge_adapter(**both, task_id=1)
    assert not model.base_model.merged_adapters
    torch.testing.assert_close(model(x, task_ids=2), two)
    model.merge_adapter(task_id=1)
    torch.testing.assert_close(model(x), one)
    with pytest.raises(ValueError, match="adapter broken seems to be broken"):
        model.merge_and_unload(**both, task_id=2)
    torch.testing.assert_close(model(x), one)
    model.set_requires_grad("default", False)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain)
        model.merge_adapter(["default"], task_id=2)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x, task_ids=1), one)
    model.merge_adapter(task_id=1)
    torch.testing.assert_close(model.merge_and_unload(task_id=2)(x), two)
