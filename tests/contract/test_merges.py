# SPDX-License-Identifier: Apache-2.0
"""What is merged stays what it was, and comes off to the bit, whatever becomes of adapters, formats
and modes meanwhile.
"""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.methods import METHODS
from helpers.models import mlp
from torch import nn

import peft
from peft import get_peft_model

pytestmark = pytest.mark.quick
TARGETS = ["0", "2"]
VARIANTS = {
    **{name: (method, {}) for name, method in METHODS.items()},
    "DoRA": (METHODS["LORA"], {"use_dora": True}),
    "lora_bias": (METHODS["LORA"], {"lora_bias": True}),
    "pissa": (METHODS["LORA"], {"init_lora_weights": "pissa"}),
    "LoKr by columns": (
        METHODS["LOKR"],
        {"weight_decompose": True, "wd_on_output": False, "use_scalar": True},
    ),
    "Poly own skills": (METHODS["POLY"], {"task_rank": 1, "n_splits": 1}),
    "VB-LoRA gate": (METHODS["VBLORA"], {"output_gate": True}),
}


@pytest.fixture(params=sorted(VARIANTS))
def variant(request):
    return VARIANTS[request.param]


def adapted(variant, dtype=torch.float32):
    """A model whose adapter does something, and its base's tensors as they were."""
    method, fields = variant
    base = mlp(dtype)
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, method.config(target_modules=TARGETS, **fields)).eval()
    change(model)
    return before, model


@torch.no_grad()
def change(model):
    for name, parameter in model.named_parameters():
        if model.prefix in name and parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter).div_(4).sign_().div_(8))


def assert_base(model, expected):
    plain = {
        name.replace("base_layer.", ""): tensor
        for name, tensor in model.get_base_model().state_dict().items()
    }
    for name, tensor in expected.items():
        assert plain[name].dtype == tensor.dtype
        assert torch.equal(plain[name], tensor), name


def as_a_step(model, method):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter -= 0.5


def as_a_state(model, method):
    model.load_state_dict(
        {
            k: v + 1
            for k, v in model.state_dict().items()
            if model.prefix in k and v.is_floating_point()
        },
        False,
    )


def as_a_reset(model, method):
    if "VBLORA" in str(model.peft_type):  # it has none; logits are drawn as they are made
        as_a_step(model, method)
    for layer in model.base_model.tuner_layers():
        for name in ("reset_lora_parameters", "reset_adapter_parameters", "reset_poly_parameters"):
            if hasattr(layer, name):
                getattr(layer, name)("default", False)


def as_a_scale(model, method):
    for layer in model.base_model.tuner_layers():
        layer.set_scale("default", 3)


@pytest.mark.parametrize("how", [as_a_step, as_a_state, as_a_reset, as_a_scale])
def test_adapters_that_change_while_merged(variant, how):
    """The weights keep what was merged; once it is off, the adapter counts as it is now."""
    method, _ = variant
    before, model = adapted(variant)
    x = torch.randn(5, 8)
    model.merge_adapter(**method.merge)
    merged = model(x, **method.call)
    how(model, method)
    assert torch.equal(model(x, **method.call), merged)
    model.unmerge_adapter()
    assert_base(model, before)
    now = model(x, **method.call)
    assert not torch.allclose(now, merged, atol=1e-3)
    model.merge_adapter(**method.merge)
    torch.testing.assert_close(model(x, **method.call), now, atol=1e-4, rtol=1e-4)


def test_skills_that_are_added_while_merged():
    base = mlp()
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, METHODS["POLY"].config(target_modules=TARGETS)).eval()
    x = torch.randn(5, 8)
    model.merge_adapter(task_id=1)
    merged = model(x, task_ids=1)
    model.add_skills(2)
    assert torch.equal(model(x, task_ids=1), merged)
    model.unmerge_adapter()
    assert_base(model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_casting_a_merged_model(variant, dtype):
    """It computes what it did, and gives back the base weights cast so."""
    method, _ = variant
    before, model = adapted(variant)
    x = torch.randn(5, 8)
    model.merge_adapter(**method.merge)
    weights = {
        name: layer.get_base_layer().weight.clone()
        for name, layer in model.base_model.named_tuner_layers()
    }
    model.to(dtype)
    for name, layer in model.base_model.named_tuner_layers():
        assert torch.equal(layer.get_base_layer().weight, weights[name].to(dtype)), name
    model(x.to(dtype), **method.call)
    model.unmerge_adapter()
    assert_base(model, {name: tensor.to(dtype) for name, tensor in before.items()})


def test_casting_there_and_back_with_two_adapters():
    before, model = adapted((METHODS["LORA"], {}), torch.float64)
    model.add_adapter("b", METHODS["LORA"].config(target_modules=TARGETS))
    change(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    model.bfloat16()
    model.float()
    model.unmerge_adapter()
    assert_base(model, {name: tensor.bfloat16().float() for name, tensor in before.items()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casting_behind_the_layers_back(dtype):
    """Wider is exact; in narrower numbers nothing but rounding is lost."""
    before, model = adapted((METHODS["LORA"], {}))
    model.merge_adapter()
    for layer in model.base_model.tuner_layers():
        layer.base_layer.to(dtype)
    model.unmerge_adapter()
    for name, layer in zip(TARGETS, model.base_model.tuner_layers(), strict=True):
        weight, expected = layer.base_layer.weight, before[f"{name}.weight"].to(dtype)
        torch.testing.assert_close(
            weight, expected, rtol=0, atol=0 if dtype == torch.float64 else 2**-7
        )


def test_moving_to_the_meta_device_and_sharing_memory_leave_a_merged_model_whole(method):
    before, model = adapted((method, {}))
    model.merge_adapter(**method.merge)
    model.share_memory()
    model.unmerge_adapter()
    assert_base(model, before)
    model.merge_adapter(**method.merge)
    model.to("meta")
    model.unmerge_adapter()
    assert all(layer.get_base_layer().weight.is_meta for layer in model.base_model.tuner_layers())


@pytest.mark.parametrize("when", ["merge", "unmerge", "both"])
def test_inference_mode_leaves_weights_that_can_be_trained(variant, when):
    method, _ = variant
    before, model = adapted(variant)
    with torch.inference_mode(when in ("merge", "both")):
        model.merge_adapter(**method.merge)
    for layer in model.base_model.tuner_layers():
        layer.get_base_layer().requires_grad_(True)
    model(torch.randn(5, 8), **method.call).sum().backward()
    with torch.inference_mode(when in ("unmerge", "both")):
        model.unmerge_adapter()
    model(torch.randn(5, 8), **method.call).sum().backward()
    assert all(
        layer.get_base_layer().weight.grad is not None for layer in model.base_model.tuner_layers()
    )
    assert_base(model, before)
    with torch.inference_mode():
        plain = model.merge_and_unload(**method.merge)
    plain(torch.randn(5, 8)).sum().backward()


def test_autocast_has_no_part_in_a_merge(variant):
    method, _ = variant
    before, model = adapted(variant)
    other = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter(**method.merge)
    other.merge_adapter(**method.merge)
    for one, two in zip(
        model.base_model.tuner_layers(), other.base_model.tuner_layers(), strict=True
    ):
        torch.testing.assert_close(
            one.get_base_layer().weight, two.get_base_layer().weight, rtol=1e-6, atol=1e-6
        )
    with torch.autocast("cpu", torch.bfloat16):
        other.unmerge_adapter()
    model.unmerge_adapter()
    assert_base(model, before)
    assert_base(other, before)


def test_a_merged_model_can_be_pickled(variant):
    method, _ = variant
    before, model = adapted(variant)
    x = torch.randn(5, 8)
    model.merge_adapter(**method.merge)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x, **method.call), model(x, **method.call))
    change(again)
    again.unmerge_adapter()
    assert_base(again, before)
    assert model.base_model.merged_adapters == ["default"]


@torch.no_grad()
def another(model):
    """A model of other numbers, base included."""
    other = copy.deepcopy(model)
    change(other)
    for layer in other.base_model.tuner_layers():
        layer.get_base_layer().weight.mul_(1.5)
    return other


def saved(model, note):
    """A state dict as it comes from a file; `note` is what torch's own keep beside the tensors."""
    file = io.BytesIO()
    torch.save(model.state_dict() if note else dict(model.state_dict()), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("note", [True, False])
def test_loading_an_unmerged_state_into_a_merged_model(variant, note):
    """The outputs are those of the loaded state, of which nothing is merged."""
    method, _ = variant
    before, model = adapted(variant)
    other = another(model)
    x = torch.randn(5, 8)
    model.merge_adapter(**method.merge)
    model.load_state_dict(saved(other, note))
    assert model.base_model.merged_adapters == []
    assert torch.equal(model(x, **method.call), other(x, **method.call))
    expected = {
        name.replace("base_layer.", ""): tensor
        for name, tensor in other.get_base_model().state_dict().items()
    }
    assert_base(model, {name: expected[name] for name in before})
    model.merge_adapter(**method.merge)
    model.unmerge_adapter()
    assert_base(model, {name: expected[name] for name in before})


@pytest.mark.parametrize("note", [True, False])
def test_loading_a_merged_models_own_state(variant, note):
    """It stays merged, and comes off exactly."""
    method, _ = variant
    before, model = adapted(variant)
    x = torch.randn(5, 8)
    model.merge_adapter(**method.merge)
    merged, state = model(x, **method.call), saved(model, note)
    change(model)
    model.load_state_dict(state)
    assert torch.equal(model(x, **method.call), merged)
    assert model.base_model.merged_adapters == ["default"]
    model.unmerge_adapter()
    assert_base(model, before)


@pytest.mark.parametrize("is_merged", [True, False])
def test_loading_the_state_of_another_merged_model(variant, is_merged):
    """What is in the weight is not added again, nor can it be taken off."""
    method, _ = variant
    _, model = adapted(variant)
    other = another(model)
    x = torch.randn(5, 8)
    other.merge_adapter(**method.merge)
    if is_merged:
        model.merge_adapter(**method.merge)
    model.load_state_dict(saved(other, True))
    assert torch.equal(model(x, **method.call), other(x, **method.call))
    assert model.base_model.merged_adapters == ["default"]
    for verb in (model.unmerge_adapter, model.unload, model.base_model.disable_adapter_layers):
        with pytest.raises(
            RuntimeError, match="default was merged in the state dict that this model loaded"
        ):
            verb()
    assert torch.equal(model(x, **method.call), other(x, **method.call))
    cast = copy.deepcopy(model).half().float()
    torch.testing.assert_close(
        cast.merge_and_unload()(x), model(x, **method.call), atol=0.02, rtol=0.02
    )
    other.unmerge_adapter()
    model.load_state_dict(saved(other, True))
    assert torch.equal(model(x, **method.call), other(x, **method.call))


def test_an_interrupted_merge_leaves_all_layers_as_they_were(variant, monkeypatch):
    method, fields = variant
    before, model = adapted(variant)
    if not fields.get("weight_decompose"):
        model.add_adapter("b", method.config(target_modules=TARGETS, **fields))
        model.merge_adapter(["b"], **method.merge)
    weights = [layer.get_base_layer().weight.clone() for layer in model.base_model.tuner_layers()]
    merged = model.base_model.merged_adapters
    last = list(model.base_model.tuner_layers())[-1]

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "delta_recipe", interrupted)
    for verb in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(KeyboardInterrupt):
            getattr(model, verb)(["default"] if verb == "merge_adapter" else False, **method.merge)
        assert model.base_model.merged_adapters == merged
        for layer, weight in zip(model.base_model.tuner_layers(), weights, strict=True):
            assert torch.equal(layer.get_base_layer().weight, weight)
            assert layer.merged_adapters == merged
    monkeypatch.undo()
    if merged:
        model.unmerge_adapter()
    assert_base(model, before)


def warnings_of(function, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **kwargs)
    return [str(warning.message) for warning in caught]


def test_merging_twice_warns_once(method):
    before, model = adapted((method, {}))
    x = torch.randn(5, 8)
    assert warnings_of(model.merge_adapter, ["default", "default"], **method.merge) == []
    once = model(x, **method.call)
    assert warnings_of(model.merge_adapter, **method.merge) == [
        "All adapters are already merged, nothing to do."
    ]
    assert torch.equal(model(x, **method.call), once)
    assert warnings_of(model.unmerge_adapter) == []
    assert warnings_of(model.unmerge_adapter) == ["Already unmerged. Nothing to do."]
    assert_base(model, before)


def test_a_merge_into_a_layer_with_further_arguments_warns(method):
    """Merged, they act on the delta too."""

    class Gated(nn.Linear):
        def forward(self, x, gate=1.0):
            return super().forward(x) * gate

    base = nn.Sequential(Gated(8, 8), nn.Linear(8, 8))
    model = get_peft_model(base, method.config(target_modules=["0", "1"])).eval()
    (text,) = warnings_of(model.merge_adapter, **method.merge)
    assert text.startswith("`forward` takes further arguments in `0` (gate). ")
    assert warnings_of(model.unmerge_adapter) == []


class Activated(nn.Linear):
    def forward(self, x):
        return F.gelu(super().forward(x))


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


class Lowered(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.85


class Normalized(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1), self.bias)


class Masked(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", (torch.arange(sizes[0]) % 2).float())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Residual(nn.Linear):
    """Further parts beside the product do not act on a delta, nor does dropout in evaluation."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.side, self.calls = nn.Sequential(nn.Linear(*sizes), nn.Tanh()), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen.add_(1)
        x = F.dropout(x, 0.5, self.training)
        return x + F.linear(x, self.weight) + self.bias + self.side(x)


class Counting(nn.Linear):
    """A forward that can't be run by itself."""

    def forward(self, x):
        if x.shape[1:] != (7, 8):
            raise RuntimeError("unexpected shape")
        return super().forward(x)


class Bound(nn.Linear):
    """A method that is chosen once; copies of the layer call the same, with its weight."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.chosen = self.multiply

    def multiply(self, x):
        return F.linear(x, self.weight, self.bias)

    def forward(self, x):
        return self.chosen(x)


class Coarse(nn.Linear):
    """A weight that is rounded to eight bits."""

    def forward(self, x):
        return F.linear(x, (self.weight * 64).round().clamp(-127, 127) / 64, self.bias)


@pytest.mark.parametrize(
    "kind",
    [Activated, Scaled, Lowered, Normalized, Masked, Residual, Counting, Bound, Coarse, nn.Linear],
    ids=lambda kind: kind.__name__,
)
def test_a_merge_warns_of_layers_that_would_compute_something_else(kind):
    """By the outputs before and after the merge. The layer is as it was, but for its weight."""
    base = kind(8, 8)
    model = get_peft_model(nn.Sequential(base), METHODS["LOKR"].config(target_modules=["0"])).eval()
    change(model)
    x = torch.randn(5, 7, 8)
    with model.disable_adapter():
        plain = model(x)
    before = model(x)
    base.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    state = copy.deepcopy({**vars(base), "_parameters": {}, "_forward_hooks": {}})
    drawn = torch.random.get_rng_state()
    found = warnings_of(model.merge_adapter)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    base._forward_hooks.clear()
    now = {**vars(base), "_parameters": {}, "_forward_hooks": {}}
    assert str(now) == str(state)
    differs = (model(x) - before).norm() > 0.12 * (before - plain).norm()
    kinds = [text.rpartition("`0` ")[2].partition(",")[0] for text in found]
    assert kinds == ([f"({kind.__name__})"] if differs else [])
    assert differs == (kind in (Activated, Scaled, Lowered, Normalized, Masked))


class Merging(nn.Linear):
    """Adds a product to its weight in evaluation, as layers of LoRA's first library do."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.product, self.merged = torch.ones(sizes[1], sizes[0]), False

    def train(self, mode=True):
        if self.merged == mode:
            self.weight.data += -self.product if mode else self.product
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        weight = self.weight if self.merged else self.weight + self.product
        return F.linear(x, weight, self.bias)


class Noisy(nn.Linear):
    """Counts calls in a list and a parameter, and adds random numbers."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.calls, self.count = [], nn.Parameter(torch.zeros(()))

    def forward(self, x):
        self.calls.append(x.shape)
        self.count.data.add_(1)
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x) + 5 * torch.randn(len(x), 1)


@pytest.mark.parametrize("kind", [Merging, Noisy], ids=lambda kind: kind.__name__)
def test_neither_a_new_adapter_nor_a_merge_changes_what_a_forward_would(kind):
    model = nn.Sequential(kind(8, 8))
    if kind is Noisy:
        model[0].weight.data.clamp_(-0.1, 0.1)
    before = copy.deepcopy(model.state_dict())
    peft_model = get_peft_model(model, METHODS["LORA"].config(target_modules=["0"]))
    assert_base(peft_model, before)
    drawn = torch.random.get_rng_state()
    assert warnings_of(peft_model.merge_adapter) == []
    assert torch.equal(torch.random.get_rng_state(), drawn)
    peft_model.unmerge_adapter()
    assert_base(peft_model, before)
    assert not getattr(peft_model.base_model.model[0].get_base_layer(), "calls", False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_merge_warns_under_another_default_dtype(dtype):
    model = get_peft_model(nn.Sequential(Scaled(8, 8)), METHODS["LORA"].config(target_modules="0"))
    torch.set_default_dtype(dtype)
    try:
        found = warnings_of(model.merge_adapter)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ["`0` (Scaled)" in text for text in found] == [True]


def test_a_layer_that_has_not_what_others_have_merged_is_merged_too(method):
    before, model = adapted((method, {}))
    first, second = model.base_model.tuner_layers()
    first.merge(**method.merge)
    weight = first.get_base_layer().weight.clone()
    assert warnings_of(model.merge_adapter, **method.merge) == []
    assert second.merged_adapters == ["default"]
    assert torch.equal(first.get_base_layer().weight, weight)
    model.unmerge_adapter()
    assert_base(model, before)


def test_another_task_of_a_merged_adapter_is_refused():
    before, model = adapted((METHODS["POLY"], {}))
    model.merge_adapter(task_id=1)
    assert warnings_of(model.merge_adapter, task_id=1) == [
        "All adapters are already merged, nothing to do."
    ]
    with pytest.raises(
        ValueError,
        match=r"default is merged with task_id=1; call `unmerge_adapter` before .* task_id=2",
    ):
        model.merge_adapter(task_id=2)
    for change_ids in (lambda: model.remove_tasks([0]), lambda: model.reorder_tasks([2, 1, 0])):
        with pytest.raises(ValueError, match="default is merged for one of its tasks"):
            change_ids()
    with pytest.raises(ValueError, match="default is merged with task_id=1"):
        next(model.base_model.tuner_layers()).merge(task_id=2)
    x = torch.randn(5, 8)
    model.unmerge_adapter()
    assert_base(model, before)
    wanted = model(x, task_ids=2)
    model.merge_adapter(task_id=1)
    torch.testing.assert_close(model.merge_and_unload(task_id=2)(x), wanted, atol=1e-4, rtol=1e-4)


def test_unmerging_in_any_order_of_methods():
    """Layers around one base layer share its weight; each takes its own part off, whichever lies on
    top.
    """
    base = nn.Sequential(nn.Linear(8, 8))
    before = base[0].weight.clone()
    model = get_peft_model(base, METHODS["LORA"].config(target_modules=["0"]), "a", mixed=True)
    model.add_adapter("b", METHODS["LOKR"].config(target_modules=["0"]))
    model.add_adapter("c", METHODS["LORA"].config(target_modules=["0"]))
    outer, inner = model.base_model.model[0], model.base_model.model[0].base_layer
    deltas = {
        name: layer.get_delta_weight(name).detach()
        for layer in (outer, inner)
        for name in layer.scaling
    }
    for name in "abc":
        (outer if name in outer.scaling else inner).merge(adapter_names=[name])
    assert (outer.merged_adapters, inner.merged_adapters) == (["b"], ["a", "c"])
    inner.unmerge()
    torch.testing.assert_close(outer.get_base_layer().weight, before + deltas["b"])
    assert (outer.merged_adapters, inner.merged_adapters) == (["b"], [])
    model.half()
    outer.unmerge()
    assert torch.equal(outer.get_base_layer().weight, before.half())


def test_a_merge_keeps_little(variant):
    """Of a layer of 64 times 64 numbers less than a fifth as many more."""
    method, fields = variant
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(64, 64))
    config = method.config(**{"target_modules": ["0"], **fields, "r": 2})
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(0.1)
    model.merge_adapter(**method.merge)
    merge = model.base_model.model[0]._merges.entries[0]
    if (
        merge.factor is None
    ):  # lengths change all of a weight, much of which undoing does not give to the bit
        kept = [merge.correction.values, *(tensor for tensor in tensors(merge.delta.arguments))]
        assert sum(tensor.numel() for tensor in kept) < 64 * 64 / 5


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)


def test_files_of_a_merged_model_have_the_weights_without_what_is_merged(tmp_path):
    """An adapter of an embedding is saved with the embedding's own weight, which would count the
    delta twice.
    """
    base = nn.ModuleDict({"embed_tokens": nn.Embedding(10, 8), "head": nn.Linear(8, 8)})
    fresh, ids = copy.deepcopy(base), torch.arange(10)
    config = METHODS["LORA"].config(target_modules=["embed_tokens"])
    model = get_peft_model(base, config)
    expected = model.embed_tokens(ids)
    weight = model.embed_tokens.base_layer.weight.clone()
    model.merge_adapter()
    merged = model.embed_tokens.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    assert torch.equal(peft.get_base_model_state_dict(model)["embed_tokens.weight"], weight)
    assert torch.equal(model.embed_tokens.base_layer.weight, merged)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(loaded.embed_tokens(ids), expected)
    state = peft.get_base_model_state_dict(loaded)
    with pytest.raises(
        RuntimeError,
        match=r"`base_model.model.embed_tokens`: default is merged .* call `unmerge_adapter`",
    ):
        peft.set_base_model_state_dict(model, state)
    model.unmerge_adapter()
    assert torch.equal(model.embed_tokens.base_layer.weight, weight)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)


class Causal(nn.Conv2d):
    """Outputs of the size that its settings give, of an input that is padded on one side."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (2, 0, 2, 0)), self.weight, self.bias, groups=self.groups)


class Halved(nn.Conv2d):
    """One half of the samples after the other, which changes nothing."""

    def forward(self, x):
        return torch.cat([super(Halved, self).forward(half) for half in x.chunk(2)])


@pytest.mark.parametrize(
    ("kind", "groups"),
    [(Standardized, 1), (Causal, 1), (Causal, 4), (Halved, 1), (Halved, 2), (Halved, 4)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_merge_warns_of_convolutions_that_would_compute_something_else(kind, groups):
    """By the outputs before and after the merge."""
    base = kind(4, 8, 3, padding=1, groups=groups)
    model = get_peft_model(nn.Sequential(base), METHODS["LOKR"].config(target_modules=["0"])).eval()
    change(model)
    x = torch.randn(4, 4, 6, 6)
    before = model(x)
    found = warnings_of(model.merge_adapter)
    differs = not torch.allclose(model(x), before, atol=1e-4)
    assert differs == (kind is not Halved)
    assert [f"`0` ({kind.__name__})" in text for text in found] == ([True] if differs else [])
