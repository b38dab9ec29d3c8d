# SPDX-License-Identifier: Apache-2.0
"""Hotswapping: one adapter's weights in the place of another's, for every method, in plain and in
compiled models.
"""

import copy
import warnings
from contextlib import nullcontext
from threading import Event, Thread

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, llama, mlp
from helpers.states import assert_unchanged, snapshot
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import peft
from peft.base.errors import PeftTypeError, PeftValueError
from peft.checkpoint import hotswap
from peft.checkpoint.rank_padding import RankPadding, Unpadded
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

X = torch.linspace(-1, 1, 24).view(3, 8)


@pytest.fixture(autouse=True)
def _compile_afresh():
    torch._dynamo.reset()


def kind_of(method):
    return method.config().peft_type.value


def base(seed=0):
    torch.manual_seed(seed)
    return mlp()


def made(method, seed, net=base, **fields):
    """A model with the one base there is and an adapter that depends on the seed."""
    net = net()
    torch.manual_seed(seed)
    return peft.get_peft_model(net, method.config(**{"target_modules": TARGETS, **fields})).eval()


@pytest.fixture
def saved(method, tmp_path):
    """Folders of two adapters of the same shape."""
    for seed in (1, 2):
        made(method, seed).save_pretrained(tmp_path / str(seed))
    return tmp_path


def loaded(folder, net=base):
    """The oracle: the adapter as it is loaded the usual way."""
    return peft.PeftModel.from_pretrained(net(), folder).eval()


def same_values(model, folder):
    """Whether a model's adapter is the one in a folder, to the bit."""
    expected, state = (
        load_file(folder / "adapter_model.safetensors"),
        peft.get_peft_model_state_dict(model),
    )
    assert state.keys() == expected.keys()
    return all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_swapped_adapter_is_the_loaded_one(method, saved):
    """In the parameters, the memory and the modules that there are, which compiled code knows."""
    model = loaded(saved / "1")

    def places():
        memory = [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()]
        return memory, [id(module) for module in model.modules()]

    before = places()
    for folder in (saved / "2", saved / "1", saved / "2"):
        hotswap_adapter(model, folder, "default")
        assert same_values(model, folder)
        assert torch.equal(model(X, **method.call), loaded(folder)(X, **method.call))
    assert places() == before


def test_what_is_trainable_stays_so(method, saved):
    model = made(method, 3).train()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    hotswap_adapter(model, saved / "1", "default")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not model.peft_config["default"].inference_mode
    model(X, **method.call).sum().backward()


def test_an_adapter_without_memory_gets_some(method, saved):
    model = peft.get_peft_model(
        base(), method.config(target_modules=TARGETS), low_cpu_mem_usage=True
    ).eval()
    hotswap_adapter(model, saved / "2", "default")
    assert torch.equal(model(X, **method.call), loaded(saved / "2")(X, **method.call))


def test_one_adapter_of_several_is_swapped(method, saved):
    model = loaded(saved / "1")
    model.load_adapter(saved / "1", "other")
    hotswap_adapter(model, saved / "2", "other")
    assert torch.equal(model(X, **method.call), loaded(saved / "1")(X, **method.call))
    model.set_adapter("other")
    assert torch.equal(model(X, **method.call), loaded(saved / "2")(X, **method.call))


def test_injected_adapters_are_swapped(method, saved):
    model = peft.inject_adapter_in_model(method.config(target_modules=TARGETS), base(), "x").eval()
    hotswap_adapter(model, saved / "2", "x")
    assert torch.equal(model(X, **method.call), loaded(saved / "2")(X, **method.call))


def test_an_adapter_among_those_of_other_methods_is_swapped(method, saved):
    other = next(
        METHODS[name]
        for name in sorted(METHODS)
        if name != kind_of(method) and not METHODS[name].call
    )
    model = peft.get_peft_model(
        base(), other.config(target_modules=TARGETS), "below", mixed=True
    ).eval()
    model.add_adapter("x", method.config(target_modules=TARGETS))
    model.set_adapter("x")
    hotswap_adapter(model, saved / "2", "x")
    torch.testing.assert_close(model(X, **method.call), loaded(saved / "2")(X, **method.call))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("injected", [True, False])
def test_tensors_in_memory_come_with_or_without_the_adapters_name(method, saved, named, injected):
    source = made(method, 2)
    model = made(method, 1).get_base_model() if injected else made(method, 1)
    if injected:
        model = peft.inject_adapter_in_model(method.config(target_modules=TARGETS), base())
    if named:
        state = {
            key: tensor
            for key, tensor in source.state_dict().items()
            if "default" in key.split(".")
        }
    else:
        state = peft.get_peft_model_state_dict(source)
    if injected:
        state = {
            key.removeprefix("base_model.").removeprefix("model."): tensor
            for key, tensor in state.items()
        }
    hotswap_adapter_from_state_dict(model, state, "default", source.peft_config["default"])
    assert torch.equal(model.eval()(X, **method.call), source(X, **method.call))


def test_whole_modules_and_rows_of_embeddings_are_swapped_too(method, tmp_path):
    fields = {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [3, 5],
    }
    models = [made(method, seed, lambda: _seeded(llama), **fields) for seed in (1, 2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    models[1].save_pretrained(tmp_path)
    hotswap_adapter(models[0], tmp_path, "default")
    ids = torch.tensor([[1, 3, 5, 7]])
    assert torch.equal(models[0](ids, **method.call).logits, models[1](ids, **method.call).logits)


def _seeded(make):
    torch.manual_seed(0)
    return make()


def test_the_new_config_counts_from_then_on(method, tmp_path):
    """Rank, scale and the like come from the file's config, and go back into a file."""
    other = {
        "LOHA": {"alpha": 9},
        "LOKR": {"alpha": 9},
        "LORA": {"lora_alpha": 9, "use_rslora": True},
        "VBLORA": {"topk": 1},
        "POLY": {},
    }
    fields = other[kind_of(method)]
    made(method, 2, **fields).save_pretrained(tmp_path / "2")
    model = made(method, 1)
    hotswap_adapter(model, tmp_path / "2", "default")
    assert torch.equal(model(X, **method.call), loaded(tmp_path / "2")(X, **method.call))
    for name, value in fields.items():
        assert getattr(model.peft_config["default"], name) == value
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(loaded(tmp_path / "again")(X, **method.call), model(X, **method.call))
    before = [dict(layer.scaling) for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    model.base_model.model[0].scale_layer(3)
    model.base_model.model[0].unscale_layer()
    assert [
        dict(layer.scaling) for layer in model.modules() if isinstance(layer, BaseTunerLayer)
    ] == before


ROUTING = [
    {"eval_top_k": 1},
    {"straight_through": True},
    {"n_shared_skills": 1},
    {"router_dropout": 0.5},
    {"relaxed_bernoulli": False},
    {"routing": "fixed"},
]


@pytest.mark.parametrize("fields", ROUTING, ids=lambda fields: next(iter(fields)))
@pytest.mark.parametrize("is_new", [True, False], ids=["set", "unset"])
def test_routing_is_that_of_the_new_config(fields, is_new, tmp_path):
    """In evaluation and in training, and in a file that is written then."""
    method = METHODS["POLY"]
    old, new = ({}, fields) if is_new else (fields, {})
    made(method, 2, n_skills=3, **new).save_pretrained(tmp_path / "2")
    model, expected = made(method, 1, n_skills=3, **old), loaded(tmp_path / "2")
    with torch.no_grad():
        model(X, **method.call)
    hotswap_adapter(model, tmp_path / "2", "default")
    model.save_pretrained(tmp_path / "again")
    for training in (False, True):
        outputs = []
        for each in (model, expected, loaded(tmp_path / "again")):
            torch.manual_seed(3)  # of gates that are drawn, and dropped
            outputs.append(each.train(training)(X, **method.call))
        torch.testing.assert_close(outputs[0], outputs[1])
        torch.testing.assert_close(outputs[0], outputs[2])
    tables = [p.requires_grad for name, p in model.named_parameters() if "module_logits" in name]
    assert tables == [new.get("routing") != "fixed"] * len(tables) != []


def test_a_top_k_file_is_swapped_in(tmp_path):
    method = METHODS["VBLORA"]
    made(method, 2, save_only_topk_weights=True).save_pretrained(tmp_path)
    model = made(method, 1)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(X), made(method, 2)(X))
    with pytest.raises(RuntimeError, match="save_only_topk_weights"):
        model.train()(X)


# --- compiled models
# --------------------------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "training"), [*((name, False) for name in sorted(METHODS)), ("POLY", True)]
)
def test_a_prepared_model_is_compiled_once(name, training, tmp_path):
    """For adapters that come and for other scales; in training, where Poly draws, too."""
    method = METHODS[name]
    for i in (1, 2):
        made(method, i).save_pretrained(tmp_path / str(i))
    model = loaded(tmp_path / "1").train(training)
    expected = model(X, **method.call)
    prepare_model_for_compiled_hotswap(model)
    if not training:
        torch.testing.assert_close(model(X, **method.call), expected)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def call(m):
        torch.manual_seed(0)  # training may draw
        return m(X, **method.call)

    call(compiled)
    assert counter.frame_count == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in ("2", "1"):
            hotswap_adapter(compiled, tmp_path / i, "default")
            torch.testing.assert_close(call(compiled), call(loaded(tmp_path / i).train(training)))
        layer = model.base_model.model[0]
        for change in (
            lambda: layer.set_scale("default", 0.5),
            lambda: layer.scale_layer(3),
            layer.unscale_layer,
        ):
            change()
            assert isinstance(layer.scaling["default"], torch.Tensor)
            torch.testing.assert_close(call(compiled), call(model))
        with peft.helpers.rescale_adapter_scale(model, 0):
            y = call(compiled)
    assert counter.frame_count == 1
    with model.disable_adapter():
        torch.testing.assert_close(y, call(model))
    torch.testing.assert_close(call(model), call(loaded(tmp_path / "1").train(training)))


def test_a_prepared_model_does_all_that_others_do(method, saved, tmp_path):
    model, plain = loaded(saved / "1"), loaded(saved / "1")
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    with torch.inference_mode():  # which leaves no trace
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert not any(tensor.is_inference() for tensor in model.parameters())
    y = plain(X, **method.call)
    torch.testing.assert_close(model(X, **method.call), y)
    torch.testing.assert_close(copy.deepcopy(model)(X, **method.call), y)
    weights = [
        parameter.clone() for name, parameter in model.named_parameters() if "base_layer" in name
    ]
    model.merge_adapter(**method.merge)
    model.base_model.model[0].scale_layer(5)  # what is merged comes off as it went in
    torch.testing.assert_close(model(X, **method.call), y)
    model.unmerge_adapter()
    now = [parameter for name, parameter in model.named_parameters() if "base_layer" in name]
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))
    model.base_model.model[0].unscale_layer()
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(loaded(tmp_path / "out")(X, **method.call), y)
    assert same_values(model, saved / "1")


def test_preparing_a_model_asks_for_adapters_and_no_compilation(model):
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(mlp())
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="before compiling the model"):
        prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(UserWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    with warnings.catch_warnings(action="error"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")
    with pytest.raises(ValueError, match="must be one of"):
        prepare_model_for_compiled_hotswap(model, check_compiled="maybe")
    model.base_model.model[2].compile(backend="eager")  # in regions
    with pytest.raises(ValueError, match="before compiling the model"):
        prepare_model_for_compiled_hotswap(model)


# --- ranks
# ------------------------------------------------------------------------------------------------------------
#
#


def conv():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(8, 16, 3, groups=2),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.Flatten(),
        nn.Linear(64, 4),
        nn.Embedding(1, 1),
    )
    return nn.Sequential(*layers[:4]).eval()


def conv1d():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(8, 4, 3), nn.Flatten(), nn.Linear(12, 4)).eval()


def embedding():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4)).eval()


NETS = {
    "linear": (base, ["0", "2"], X, {}),
    "bias": (base, ["0", "2"], X, {"lora_bias": True}),
    "dora": (base, ["0", "2"], X, {"use_dora": True}),
    "conv": (conv, ["0", "1", "3"], torch.linspace(-1, 1, 2 * 8 * 49).view(2, 8, 7, 7), {}),
    "conv1d": (conv1d, ["0", "2"], torch.linspace(-1, 1, 2 * 8 * 5).view(2, 8, 5), {}),
    "embedding": (embedding, ["0", "1"], torch.tensor([[1, 2, 8], [0, 0, 3]]), {}),
}


def has_sizes_of_weights(module):
    """Whether a module's attributes, which it prints, are the sizes of its weight."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features) == module.weight.shape
    sizes = (module.out_channels, module.in_channels // module.groups)
    return sizes == module.weight.shape[:2]


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    "how", ["plain", "prepared", pytest.param("compiled", marks=pytest.mark.compile)]
)
def test_ranks_and_scales_may_differ(kind, how, tmp_path):
    net, targets, x, fields = NETS[kind]
    variants = {"4": {"r": 4}, "2": {"r": 2, "lora_alpha": 7}, "8": {"r": 8, "use_rslora": True}}
    variants["pattern"] = {"r": 4, "rank_pattern": {"0": 6}, "alpha_pattern": {"1": 11}}
    for seed, (name, more) in enumerate(variants.items()):
        made(METHODS["LORA"], seed, net, target_modules=targets, **fields, **more).save_pretrained(
            tmp_path / name
        )
    model = caller = loaded(tmp_path / "4", net)
    if how != "plain":
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch.testing.assert_close(model(x), loaded(tmp_path / "4", net)(x))
    if how == "compiled":
        caller = torch.compile(model, backend="eager", fullgraph=True)
        caller(x)
    for name in ("2", "8", "pattern", "4"):
        hotswap_adapter(model, tmp_path / name, "default")
        strict = torch._dynamo.config.patch(error_on_recompile=True)
        with strict if how == "compiled" else nullcontext():
            torch.testing.assert_close(caller(x), loaded(tmp_path / name, net)(x))
        model.save_pretrained(tmp_path / "again")
        assert same_values(model, tmp_path / name)
        assert torch.equal(loaded(tmp_path / "again", net)(x), loaded(tmp_path / name, net)(x))
        factors = [m for n, m in model.named_modules() if n.endswith(("_A.default", "_B.default"))]
        assert len(factors) == 2 * (len(targets) - (kind == "embedding"))
        assert all(map(has_sizes_of_weights, factors))


# Dimension of the rank, blocks, shape, size to pad to.
PADDED = [
    (0, 1, (2, 3), 5), (1, 1, (2, 3), 4), (1, 2, (2, 4), 6), (0, 2, (4, 3, 2), 8), (1, 3, (2, 3, 2, 2), 9),
]  # fmt: skip


@pytest.mark.parametrize(("dim", "blocks", "shape", "size"), PADDED)
def test_padding_puts_zeros_at_the_end_of_each_block(dim, blocks, shape, size):
    padding, tensor = RankPadding(dim, blocks), torch.randn(shape)
    zeros = list(shape)
    zeros[dim] = (size - shape[dim]) // blocks
    parts = [p for block in tensor.chunk(blocks, dim) for p in (block, torch.zeros(zeros))]
    padded = padding.pad(tensor, size)
    assert torch.equal(padded, torch.cat(parts, dim))
    unpadded = Unpadded(padding, shape[dim])
    assert torch.equal(unpadded.cut(padded), tensor) and unpadded.cut(padded).is_contiguous()
    assert torch.equal(unpadded.cut(torch.ones([3] * dim)), torch.ones([3] * dim))  # a bias
    other = list(shape)
    other[-1 if dim == 0 else 0] += 1
    assert padding.differs_in_rank_only(tensor, padded)
    assert not padding.differs_in_rank_only(tensor, torch.ones(other))
    assert not padding.differs_in_rank_only(tensor, torch.ones(*shape, 1))


def test_ranks_that_can_be_split():
    both = RankPadding(1, blocks=2, share=3)
    assert [rank for rank in range(1, 19) if both.allows(rank)] == [6, 12, 18]
    assert (both.size(18), RankPadding(0).size(5)) == (6, 5)


def test_a_target_rank_may_be_the_rank_that_there_is(tmp_path):
    method = METHODS["LORA"]
    made(method, 2).save_pretrained(tmp_path)
    model = made(method, 1)
    prepare_model_for_compiled_hotswap(model, target_rank=2)
    hotswap_adapter(model, tmp_path, "default")
    assert same_values(model, tmp_path)


def test_what_fills_up_a_rank_stays_zero_in_training(tmp_path):
    model = made(METHODS["LORA"], 1)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        model.train()(X).square().sum().backward()
        optimiser.step()
    y = model.eval()(X)
    assert not model.base_model.model[0].lora_A["default"].weight[2:].any()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tmp_path)(X), y)


def test_an_adapter_for_fewer_layers_leaves_the_others_silent(tmp_path):
    method = METHODS["LORA"]
    made(method, 1).save_pretrained(tmp_path / "both")
    made(method, 2, target_modules=["0"]).save_pretrained(tmp_path / "one")
    model = loaded(tmp_path / "both")
    hotswap_adapter(model, tmp_path / "one", "default")
    torch.testing.assert_close(model(X), loaded(tmp_path / "one")(X))
    model.base_model.model[2].unscale_layer()
    torch.testing.assert_close(model(X), loaded(tmp_path / "one")(X))
    model.save_pretrained(tmp_path / "again")
    assert same_values(model, tmp_path / "one")
    hotswap_adapter(model, tmp_path / "both", "default")
    assert torch.equal(model(X), loaded(tmp_path / "both")(X))


def test_an_adapter_that_starts_from_the_weight_is_swapped(tmp_path):
    method = METHODS["LORA"]
    model = made(method, 1, init_lora_weights="pissa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "pissa")
    made(method, 2).save_pretrained(tmp_path / "plain")
    made(method, 2, target_modules=["0"]).save_pretrained(tmp_path / "one")
    with pytest.raises(RuntimeError, match="`2`: the checkpoint has nothing for this layer"):
        hotswap_adapter(model, tmp_path / "one", "default")
    for folder in ("plain", "pissa", "plain"):
        hotswap_adapter(model, tmp_path / folder, "default")
        torch.testing.assert_close(model(X), loaded(tmp_path / folder)(X))


@pytest.mark.parametrize("rank", [1, 0, "4", 2.0])
def test_a_target_rank_that_does_not_fit_changes_nothing(rank):
    model = made(METHODS["LORA"], 1)
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=r"can't be filled up to `target_rank`=.*0.lora_A.weight` has shape \[2, 8\]",
    ):
        prepare_model_for_compiled_hotswap(model, target_rank=rank)
    assert_unchanged(before, model)
    assert model.base_model.model[0].scaling == {"default": 1.5}


# --- what does not fit
# ------------------------------------------------------------------------------------------------

OTHER_SHAPES = {
    "LOHA": (
        {"r": 3},
        r"hada_w1_a`: the checkpoint has shape \[16, 3\], the adapter in the model \[16, 2\]",
    ),
    "LOKR": (
        {"r": 1, "decompose_factor": 2},
        r"lokr_w1`: the checkpoint has shape \[2, 2\], the adapter in the model \[4, 2\]",
    ),
    "VBLORA": (
        {"num_vectors": 10},
        r"logits_A`: the checkpoint has shape \[2, 2, 10\], the adapter in the model \[2, 2, 12\]",
    ),
    "POLY": (
        {"n_tasks": 4},
        r"module_logits`: the checkpoint has shape \[4, 4\], the adapter in the model \[3, 4\]",
    ),
    "LORA": (
        {"use_dora": True},
        "lora_magnitude_vector.weight`: the adapter in the model has no such tensor",
    ),
}


def refused(model, folder, match, error=RuntimeError):
    before, configs = snapshot(model), copy.deepcopy(model.peft_config)
    with pytest.raises(error, match=match):
        hotswap_adapter(model, folder, "default")
    assert_unchanged(before, model)
    assert model.peft_config == configs


def test_other_shapes_are_an_error_that_names_them(method, tmp_path):
    fields, match = OTHER_SHAPES[kind_of(method)]
    made(method, 2, **fields).save_pretrained(tmp_path)
    refused(made(method, 1), tmp_path, f"nothing was changed.*{match}")


def test_one_cause_in_all_layers_is_named_once(tmp_path):
    made(METHODS["POLY"], 2, n_skills=3).save_pretrained(tmp_path)
    match = r"nothing was changed\. The configs differ in `n_skills` \(3, in the model \d\)\. [^;]*;[^;]*; and \d more\.$"
    refused(made(METHODS["POLY"], 1), tmp_path, match)


def test_more_layers_are_an_error(method, saved):
    refused(
        made(method, 1, target_modules=["0"]),
        saved / "1",
        r"`base_model.model.2\..*the adapter in the model has no such tensor",
    )


def test_fewer_layers_are_an_error_where_they_would_go_on_adding(method, tmp_path):
    if kind_of(method) == "LORA":
        return
    made(method, 2, target_modules=["0"]).save_pretrained(tmp_path)
    refused(made(method, 1), tmp_path, "`2`: the checkpoint has nothing for this layer")


def test_another_method_is_an_error(method, tmp_path):
    other = next(METHODS[name] for name in sorted(METHODS) if name != kind_of(method))
    made(other, 2).save_pretrained(tmp_path)
    kinds = [kind_of(m) for m in (method, other)]
    refused(
        made(method, 1),
        tmp_path,
        f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}",
        ValueError,
    )
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        check_hotswap_configs_compatible(method.config(), other.config())
    check_hotswap_configs_compatible(method.config(), method.config(r=1))


def test_tensors_that_belie_their_config_are_an_error(method):
    source, model = made(method, 2), made(method, 1)
    state = peft.get_peft_model_state_dict(source)
    key = next(key for key in state if "vector_bank" not in key)
    before = snapshot(model)
    for broken, match in (
        ({k: v for k, v in state.items() if k != key}, f"`{key}`: the checkpoint lacks it"),
        (
            {**state, key: state[key][..., :1]},
            f"`{key}`: the checkpoint has shape .*, which its config says is",
        ),
        (
            {**state, key: state[key].int()},
            f"`{key}`: the checkpoint has dtype torch.int32, the adapter in the model torch.float32",
        ),
        (
            {**state, "base_model.model.9.weight": torch.ones(1)},
            r"model.9.weight`: the adapter in the model has no such tensor",
        ),
        ({}, "nothing for this layer|lacks it|is empty"),
    ):
        with pytest.raises(RuntimeError, match=match):
            hotswap_adapter_from_state_dict(model, broken, "default", source.peft_config["default"])
        assert_unchanged(before, model)


def test_sizes_that_do_not_fit_the_layers_are_an_error():
    method = METHODS["VBLORA"]
    source, model = made(method, 2), made(method, 1)
    config = method.config(target_modules=TARGETS, vector_length=3)
    with pytest.raises(
        RuntimeError, match="nothing was changed.*must be divisible by `vector_length` 3"
    ):
        hotswap_adapter_from_state_dict(
            model, peft.get_peft_model_state_dict(source), "default", config
        )


def test_a_merged_adapter_is_not_swapped(method, saved):
    model = loaded(saved / "1")
    model.merge_adapter(**method.merge)
    refused(model, saved / "2", "is merged; call `unmerge_adapter`")


def test_unknown_names_folders_and_options_are_errors(model, saved):
    with pytest.raises(ValueError, match="Adapter x not found; this model has default"):
        hotswap_adapter(model, saved / "1", "x")
    with pytest.raises(ValueError, match="adapter_config.json"):
        hotswap_adapter(model, saved / "none", "default")
    with pytest.warns(UserWarning, match="hotswap_adapter got unexpected keyword arguments: rank"):
        hotswap_adapter(model, saved / "1", "default", rank=3)
    with pytest.raises(ValueError, match="this model has none"):
        hotswap_adapter(mlp(), saved / "1", "default")


# --- edges
# ------------------------------------------------------------------------------------------------


def test_all_that_is_trained_beside_comes_with_the_adapters_name_too():
    """As from `state_dict()` of a model, with full modules and rows of embeddings."""
    fields = {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [3, 5],
    }
    method, ids = METHODS["LORA"], torch.tensor([[1, 3, 5, 7]])
    source, model = (made(method, seed, lambda: _seeded(llama), **fields) for seed in (1, 2))
    with torch.no_grad():
        for parameter in (p for p in source.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter))
    state = {k: t.clone() for k, t in source.state_dict().items() if "default" in k.split(".")}
    assert any("modules_to_save.default" in key for key in state)
    hotswap_adapter_from_state_dict(model, state, "default", source.peft_config["default"])
    expected = source(ids).logits
    assert torch.equal(model(ids).logits, expected)
    for tensor in state.values():  # the model has values of its own
        tensor.zero_()
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("named", [True, False])
def test_an_adapter_may_have_the_name_of_a_module(named):
    method = METHODS["LORA"]
    config = method.config(target_modules=TARGETS, r=4)
    models = []
    for seed in (1, 2):
        net = base()
        torch.manual_seed(seed)
        models.append(peft.get_peft_model(net, copy.deepcopy(config), "0").eval())
    model, source = models
    state = peft.get_peft_model_state_dict(source, adapter_name="0")
    if named:
        state = {k: t for k, t in source.state_dict().items() if "lora" in k}
    hotswap_adapter_from_state_dict(model, state, "0", source.peft_config["0"])
    assert torch.equal(model(X), source(X))


def test_larger_tensors_are_copies_too():
    method = METHODS["LORA"]
    source, model = made(method, 2, r=4), made(method, 1)
    state = {key: t.clone() for key, t in peft.get_peft_model_state_dict(source).items()}
    model(X).sum().backward()
    hotswap_adapter_from_state_dict(model, state, "default", source.peft_config["default"])
    assert all(p.grad is None for p in model.parameters() if p.requires_grad)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(model(X), source(X))


def test_modules_stay_unless_their_settings_changed(tmp_path):
    """Compiled code tells modules by their identity."""
    method = METHODS["LORA"]
    for p in (0.0, 0.5, 0.7):
        made(method, 2, lora_dropout=p).save_pretrained(tmp_path / str(p))
    model = made(method, 1, lora_dropout=0.5)
    layer = model.base_model.model[0]
    before = layer.lora_dropout["default"]
    hotswap_adapter(model, tmp_path / "0.5", "default")
    assert layer.lora_dropout["default"] is before
    for p in (0.7, 0.0, 0.5):
        hotswap_adapter(model, tmp_path / str(p), "default")
        assert repr(layer.lora_dropout) == repr(
            loaded(tmp_path / str(p)).base_model.model[0].lora_dropout
        )


def test_embeddings_in_a_file_are_swapped_too(tmp_path):
    method, ids = METHODS["LORA"], torch.tensor([[1, 3, 5, 7]])
    source, model = (
        made(method, i, lambda: _seeded(llama), target_modules=["q_proj"]) for i in (1, 2)
    )
    with torch.no_grad():
        source.get_input_embeddings().weight.normal_()
    source.save_pretrained(tmp_path, save_embedding_layers=True)
    hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(ids).logits, source(ids).logits)


def test_tensors_that_a_config_does_not_speak_of_are_an_error():
    method = METHODS["LORA"]
    source, model = (made(method, seed, use_dora=True) for seed in (1, 2))
    before, config = snapshot(model), copy.deepcopy(source.peft_config["default"])
    config.use_dora = False
    with pytest.raises(
        RuntimeError,
        match=r"lora_magnitude_vector(\.weight)?`: by its config the checkpoint would not have it",
    ):
        hotswap_adapter_from_state_dict(
            model, peft.get_peft_model_state_dict(source), "default", config
        )
    assert_unchanged(before, model)


def test_norms_are_not_silent(tmp_path):
    """With DoRA a layer without an adapter is not one with factors of zero."""
    method = METHODS["LORA"]
    made(method, 2, use_dora=True, target_modules=["0"]).save_pretrained(tmp_path)
    refused(
        made(method, 1, use_dora=True), tmp_path, "`2`: the checkpoint has nothing for this layer"
    )


def test_settings_that_are_long_are_named_alone(tmp_path):
    method = METHODS["LOKR"]
    fields = {"decompose_both": True, "decompose_factor": 2}
    made(method, 2, rank_pattern={"0": 1}, **fields).save_pretrained(tmp_path)
    refused(made(method, 1, **fields), tmp_path, "The configs differ in `rank_pattern`, `")


def test_eight_problems_are_listed():
    def deep():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(10)))

    method, targets = METHODS["LORA"], [str(i) for i in range(10)]
    source, model = (made(method, i, deep, target_modules=targets) for i in (1, 2))
    for wrong, end in ((10, "; and 2 more."), (9, "; and 1 more."), (8, "[8, 2].")):
        state = peft.get_peft_model_state_dict(source)
        for key in [key for key in state if "lora_A" in key][:wrong]:
            state[key] = state[key][:, :3]
        with pytest.raises(RuntimeError) as refusal:
            hotswap_adapter_from_state_dict(model, state, "default", source.peft_config["default"])
        text = str(refusal.value)
        assert text.count("which its config says is") == 8
        assert text.endswith("more.") == (wrong > 8) and (wrong == 8 or text.endswith(end))


def test_a_wrong_config_is_refused(method):
    source, model = made(method, 2), made(method, 1)
    config, before = copy.deepcopy(source.peft_config["default"]), snapshot(model)
    config.r = -1
    with pytest.raises(PeftValueError, match="`r`=-1 must be an integer"):
        hotswap_adapter_from_state_dict(
            model, peft.get_peft_model_state_dict(source), "default", config
        )
    assert_unchanged(before, model)
    for each in (first := peft.LoraConfig(), second := peft.LoraConfig()):
        each.peft_type = "IA3"
    with pytest.raises(PeftValueError, match="'IA3' is not provided"):
        check_hotswap_configs_compatible(first, second)
    with pytest.raises(PeftTypeError, match="must be a torch module|nn.Module"):
        hotswap_adapter("model", "folder", "default")


def test_what_is_wrong_with_the_call_is_said_before_a_file_is_read(method, tmp_path):
    other = next(METHODS[name] for name in sorted(METHODS) if name != kind_of(method))
    made(other, 2).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    model = made(method, 1)
    refused(model, tmp_path, "Incompatible PEFT types found", ValueError)
    with pytest.raises(ValueError, match="Adapter x not found; this model has default"):
        hotswap_adapter(model, "nowhere", "x")


def test_what_can_not_be_swapped_is_refused_while_calls_run(tmp_path):
    """At once: nobody waits for the end of calls, to be told then."""
    model, other = made(METHODS["LORA"], 1), METHODS["LOKR"]
    made(other, 2).save_pretrained(tmp_path)
    running, begun, ended = model.base_model.running_calls, Event(), Event()
    running.patience = 0.0

    def call():
        with running.during(None):
            begun.set()
            assert ended.wait(60)

    thread = Thread(target=call)
    thread.start()
    assert begun.wait(60)
    try:
        refused(model, tmp_path, "Incompatible PEFT types found", ValueError)
        for name, message in (("default", "Incompatible PEFT types"), ("x", "x not found")):
            with pytest.raises(ValueError, match=message):
                hotswap_adapter_from_state_dict(model, {}, name, other.config())
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("change", ["deleted", "another method"])
def test_an_adapter_that_changes_while_the_file_is_read(change, tmp_path, monkeypatch):
    made(METHODS["LORA"], 2).save_pretrained(tmp_path)
    model = peft.get_peft_model(
        base(), METHODS["LOHA"].config(target_modules=["4"]), "other", mixed=True
    )
    model.add_adapter("x", METHODS["LORA"].config(target_modules=TARGETS))
    read = hotswap.load_peft_weights

    def changed(*args, **options):
        model.delete_adapter("x")
        if change == "another method":
            model.add_adapter("x", METHODS["LOKR"].config(target_modules=TARGETS))
        return read(*args, **options)

    monkeypatch.setattr(hotswap, "load_peft_weights", changed)
    message = "Adapter x not found" if change == "deleted" else "Incompatible PEFT types found"
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path, "x")


def test_a_swap_during_a_save_in_a_subfolder_is_of_one_save(tmp_path, monkeypatch):
    """Not the config of one save with the weights of the next."""
    method = METHODS["LORA"]
    made(method, 2, lora_alpha=4).save_pretrained(tmp_path / "sub")
    new, saves, read = made(method, 3, lora_alpha=64), [1], hotswap.load_peft_weights

    def interrupted(*args, **options):
        while saves:
            saves.pop()
            new.save_pretrained(tmp_path / "sub")
        return read(*args, **options)

    monkeypatch.setattr(hotswap, "load_peft_weights", interrupted)
    model = made(method, 1)
    hotswap_adapter(model, tmp_path, "default", subfolder="sub")
    torch.testing.assert_close(model(X), new(X))


def test_an_adapter_inside_wrappers_is_swapped(method, saved):
    model = loaded(saved / "1")
    hotswap_adapter(torch.compile(model, backend="eager"), saved / "2", "default")
    assert same_values(model, saved / "2")
    parallel = nn.DataParallel(model)
    hotswap_adapter(parallel, saved / "1", "default")
    assert same_values(model, saved / "1")
