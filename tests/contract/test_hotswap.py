# SPDX-License-Identifier: Apache-2.0
"""Hotswapping: one adapter's weights in the place of another's, for every method, in plain and in
compiled models.
"""

import copy

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, llama, mlp
from helpers.states import assert_unchanged, snapshot
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import peft
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
    model = loaded(saved / "1")
    before = [id(parameter) for parameter in model.parameters()]
    for folder in (saved / "2", saved / "1", saved / "2"):
        hotswap_adapter(model, folder, "default")
        assert same_values(model, folder)
        assert torch.equal(model(X, **method.call), loaded(folder)(X, **method.call))
    assert [id(parameter) for parameter in model.parameters()] == before


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


@pytest.mark.compile
def test_preparing_a_model_asks_for_adapters_and_no_compilation(model):
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(mlp())
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="before compiling the model"):
        prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(UserWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
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


def embedding():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4)).eval()


NETS = {
    "linear": (base, ["0", "2"], X, {}),
    "bias": (base, ["0", "2"], X, {"lora_bias": True}),
    "dora": (base, ["0", "2"], X, {"use_dora": True}),
    "conv": (conv, ["0", "1", "3"], torch.linspace(-1, 1, 2 * 8 * 49).view(2, 8, 7, 7), {}),
    "embedding": (embedding, ["0", "1"], torch.tensor([[1, 2, 8], [0, 0, 3]]), {}),
}


@pytest.mark.compile
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("prepared", [True, False])
def test_ranks_and_scales_may_differ(kind, prepared, tmp_path):
    net, targets, x, fields = NETS[kind]
    variants = {"4": {"r": 4}, "2": {"r": 2, "lora_alpha": 7}, "8": {"r": 8, "use_rslora": True}}
    variants["pattern"] = {"r": 4, "rank_pattern": {"0": 6}, "alpha_pattern": {"1": 11}}
    for seed, (name, more) in enumerate(variants.items()):
        made(METHODS["LORA"], seed, net, target_modules=targets, **fields, **more).save_pretrained(
            tmp_path / name
        )
    model = loaded(tmp_path / "4", net)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch.testing.assert_close(model(x), loaded(tmp_path / "4", net)(x))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(x)
    for name in ("2", "8", "pattern", "4"):
        hotswap_adapter(model, tmp_path / name, "default")
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(
                (compiled if prepared else model)(x), loaded(tmp_path / name, net)(x)
            )
        model.save_pretrained(tmp_path / "again")
        assert same_values(model, tmp_path / name)
        assert torch.equal(loaded(tmp_path / "again", net)(x), loaded(tmp_path / name, net)(x))
    first = model.base_model.model[0]
    if kind == "linear":
        a, b = first.lora_A["default"], first.lora_B["default"]
        assert (a.out_features, b.in_features) == (a.weight.shape[0], b.weight.shape[1])


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
