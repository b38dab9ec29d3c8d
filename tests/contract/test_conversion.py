# SPDX-License-Identifier: Apache-2.0
"""Every method's adapters as LoRA adapters: exact, at a rank, at a share of energy; in files that
stand for themselves.
"""

import json

import pytest
import torch
from helpers.models import TARGETS, gpt2, llama, mlp
from helpers.states import assert_unchanged, snapshot
from safetensors.torch import load_file
from torch import nn

import peft
from peft import (
    PeftModel,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.core.targets import exactly, pattern_value, patterns, select
from peft.ops.low_rank import LowRank, approximate, cut, dense_svd, kept, product_svd, total_error
from peft.tuners.lora.conversion import save_tasks_as_lora


def logits(model, x, **call):
    output = model(x, **call)
    return getattr(output, "logits", output).detach()


def deltas(model, method, name="default"):
    """Each layer's dense delta as `[out, in · taps]`."""
    layers = {
        path: layer
        for path, layer in model.base_model.named_tuner_layers()
        if name in layer.scaling
    }
    return {
        path: layer.geometry.as_stored(layer.get_delta_weight(name, **method.merge))
        .detach()
        .flatten(1)
        .double()
        for path, layer in layers.items()
    }


def product(state, path, prefix="base_model.model."):
    A, B = (state[f"{prefix}{path}.lora_{end}.weight"].double().flatten(1) for end in "AB")
    return B @ A


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("make", [mlp, llama, gpt2])
def test_an_exact_conversion_computes_the_same(method, tmp_path, make):
    base = make()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    x = torch.randn(5, 8) if make is mlp else torch.randint(1, 48, (2, 6))
    targets = {mlp: TARGETS, llama: ["q_proj", "down_proj"], gpt2: ["c_attn", "c_fc"]}[make]
    model = get_peft_model(base, method.config(target_modules=targets)).eval()
    expected = logits(model, x, **method.call)
    assert model.supports_lora_conversion()
    state = snapshot(model)
    converted = save_as_lora(tmp_path / "lora", model, **method.merge)
    assert_unchanged(state, model)
    assert converted.error < 1e-6 and max(converted.errors.values()) < 1e-6
    plain = make()
    plain.load_state_dict(before)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "lora")
    assert {
        scale for layer in loaded.base_model.tuner_layers() for scale in layer.scaling.values()
    } == {1}
    torch.testing.assert_close(logits(loaded, x), expected, rtol=1e-4, atol=1e-5)
    with loaded.disable_adapter():
        assert not torch.allclose(logits(loaded, x), expected, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_fixed_rank_is_the_best_approximation_and_tells_its_error(model, method, rank):
    converted = convert_to_lora(model, rank, **method.merge)
    config, state = converted
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (
        rank,
        rank,
        {},
        {},
    )
    dense = deltas(model, method)
    assert (
        {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in state}
        == dense.keys()
        == converted.errors.keys()
    )
    lost = []
    for path, delta in dense.items():
        values = torch.linalg.svdvals(delta)
        best = float(values[rank:].norm() / values.norm())
        found = product(state, path)
        assert state[f"base_model.model.{path}.lora_A.weight"].shape[0] == rank
        assert float((found - delta).norm() / values.norm()) == pytest.approx(best, abs=1e-5)
        assert converted.errors[path] == pytest.approx(best, abs=1e-5)
        lost.append(found - delta)
    total = (
        torch.cat([t.flatten() for t in lost]).norm()
        / torch.cat([t.flatten() for t in dense.values()]).norm()
    )
    assert converted.error == pytest.approx(float(total), abs=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_share_of_energy_gives_each_layer_its_rank(model, method, share, tmp_path):
    config, state = converted = save_as_lora(tmp_path, model, share, **method.merge)
    for path, delta in deltas(model, method).items():
        values = torch.linalg.svdvals(delta).square()
        wanted = int((values.cumsum(0) < share * values.sum()).sum()) + 1
        assert state[f"base_model.model.{path}.lora_A.weight"].shape[0] == wanted
        assert (
            pattern_value(config.rank_pattern, path, config.r)
            == wanted
            == pattern_value(config.alpha_pattern, path, config.lora_alpha)
        )
    assert (config.r, config.lora_alpha, len(config.rank_pattern), len(state)) == (
        1,
        1,
        len(state) // 2,
        len(state),
    )
    assert 1 - converted.error**2 >= share - 1e-6
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    assert {
        scale for layer in loaded.base_model.tuner_layers() for scale in layer.scaling.values()
    } == {1}


def test_the_file_is_a_plain_lora_file(model, method, tmp_path):
    model.peft_config["default"].base_model_name_or_path = "someone/something"
    save_as_lora(tmp_path, model, 2, **method.merge)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "LORA"
    assert (content["r"], content["lora_alpha"], content["target_modules"]) == (2, 2, TARGETS)
    assert content["base_model_name_or_path"] == "someone/something"
    assert not content["use_rslora"] and not content["use_dora"] and not content["rank_pattern"]
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(state) == sorted(
        f"base_model.model.{path}.lora_{end}.weight" for path in TARGETS for end in "AB"
    )


def test_whole_modules_and_token_rows_go_along(method, tmp_path):
    base = llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = method.config(
        target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3, 5]
    )
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
        model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta[
            "default"
        ].add_(1)
    x = torch.tensor([[1, 3, 5, 7]])
    expected = logits(model, x, **method.call)
    converted = save_as_lora(tmp_path, model, **method.merge)
    assert converted.config.modules_to_save == ["lm_head"]
    assert converted.config.trainable_token_indices == [3, 5]
    plain = llama()
    plain.load_state_dict(before)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(plain, tmp_path), x), expected, rtol=1e-4, atol=1e-5
    )


def test_embeddings_of_a_resized_vocabulary_go_along(method, tmp_path):
    """As `save_pretrained` writes them, so that the file says all of what the model computes."""
    llama().save_pretrained(tmp_path / "base")
    base = llama()
    base.resize_token_embeddings(52, mean_resizing=False)
    model = get_peft_model(base, method.config(target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        state = convert_to_lora(model, **method.merge).state_dict
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(
            state[f"base_model.model.{name}.weight"], base.get_submodule(name).weight
        )


@pytest.mark.parametrize("biases", ["all", "only"])
def test_trained_biases_go_along(biases, tmp_path):
    torch.manual_seed(0)
    base = mlp()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = peft.VBLoRAConfig(
        r=2,
        num_vectors=8,
        vector_length=4,
        target_modules=["0"],
        bias={"only": "vblora_only"}.get(biases, biases),
    )
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(1)
    x = torch.randn(3, 8)
    converted = save_as_lora(tmp_path, model)
    assert converted.config.bias == {"only": "lora_only"}.get(biases, biases)
    plain = mlp()
    plain.load_state_dict(before)
    torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path)(x), model(x))


def test_what_is_converted_is_a_copy(method):
    model = get_peft_model(mlp(), method.config(target_modules=["0"], modules_to_save=["4"]))
    state = convert_to_lora(model, **method.merge).state_dict
    before = snapshot(model)
    for tensor in state.values():
        assert not tensor.requires_grad
        tensor.fill_(7)
    assert_unchanged(before, model)


def test_an_injected_adapter(method):
    x = torch.randn(4, 8)
    base = mlp()
    inject_adapter_in_model(method.config(target_modules=TARGETS), base, "some")
    expected = base(x, **method.call)
    config, state = convert_to_lora(base, adapter_name="some", **method.merge)
    assert all(key.split(".")[0] in TARGETS for key in state)
    plain = mlp()
    plain.load_state_dict(
        {
            k.replace("base_layer.", ""): t
            for k, t in base.state_dict().items()
            if k.replace("base_layer.", "") in plain.state_dict()
        }
    )
    inject_adapter_in_model(config, plain)
    assert set_peft_model_state_dict(plain, state) == ([], [])
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


def test_a_scaled_and_merged_adapter_is_converted_as_it_is(model, method):
    for layer in model.base_model.tuner_layers():
        layer.set_scale("default", 0.5)
    expected = deltas(model, method)
    model.merge_adapter(**method.merge)
    state = convert_to_lora(model, **method.merge).state_dict
    for path, delta in expected.items():
        torch.testing.assert_close(product(state, path), delta, rtol=1e-4, atol=1e-5)


def test_one_of_several_adapters_on_layers_of_its_own(model, method):
    model.add_adapter("b", method.config(target_modules=["4"]))
    config, state = convert_to_lora(model, 3, "b", **method.merge)
    assert config.target_modules == {"4"}
    assert {key.split(".")[2] for key in state} == {"4"}
    torch.testing.assert_close(
        product(state, "4"), product(convert_to_lora(model, 3, "b", **method.merge).state_dict, "4")
    )


@pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0, -0.5, True, "4", float("nan")])
def test_ranks_that_are_none(model, method, rank):
    with pytest.raises(ValueError, match="`rank`="):
        convert_to_lora(model, rank, **method.merge)


def test_a_rank_above_the_weights_names_the_layer(model, method, tmp_path):
    with pytest.raises(
        ValueError, match=r"`0`: The chosen rank 9 is larger than the weight shape \(8\)"
    ):
        save_as_lora(tmp_path / "x", model, 9, **method.merge)
    assert not (tmp_path / "x").exists()


def test_an_unknown_adapter_and_a_model_without(model, method):
    with pytest.raises(ValueError, match=r"Adapter other not found; this model has default\."):
        convert_to_lora(model, 2, "other", **method.merge)
    with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
        convert_to_lora(mlp(), 2)


@pytest.mark.parametrize("rank", [None, 1, 0.5])
def test_values_that_are_not_finite(model, method, rank):
    with torch.no_grad():
        for parameter in model.base_model.model[2].adapter_parameters("default"):
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"`\d`: The adapter has values that are NaN or infinite"):
        convert_to_lora(model, rank, **method.merge)


def test_an_adapter_without_values(method):
    model = get_peft_model(mlp(), method.config(target_modules=TARGETS), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="`0`: the adapter is on the meta device"):
        convert_to_lora(model, 1, **method.merge)


def test_a_task_is_for_methods_with_tasks(model, method):
    if method.merge:
        with pytest.raises(ValueError, match="Only 3 tasks available"):
            convert_to_lora(model, task_id=3)
        with pytest.raises(ValueError, match="task"):
            convert_to_lora(model)
        return
    with pytest.raises(TypeError, match="`task_id` is for another method"):
        convert_to_lora(model, task_id=1)
    with pytest.raises(NotImplementedError, match="has one delta and no tasks; use `save_as_lora`"):
        save_tasks_as_lora(model, "nowhere")


# --- what conversion is made of
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5, 3), (4, 9, 6), (3, 3, 8)])
def test_singular_values_of_a_product_from_its_factors(shape):
    m, n, r = shape
    B, A = torch.randn(m, r, dtype=torch.float64), torch.randn(r, n, dtype=torch.float64)
    U, S, V = product_svd(B, A)
    torch.testing.assert_close(S, torch.linalg.svdvals(B @ A)[: len(S)])
    torch.testing.assert_close((U * S) @ V.mT, B @ A)
    for Q in (U, V):
        torch.testing.assert_close(Q.mT @ Q, torch.eye(len(S), dtype=torch.float64))
    found = approximate(B, A, 2)
    best = cut(dense_svd(B @ A), 2, torch.float64)
    torch.testing.assert_close(found.B @ found.A, best.B @ best.A)
    assert found.error == pytest.approx(best.error) and found.norm == pytest.approx(
        float((B @ A).norm())
    )
    whole = approximate(B, A)
    assert (
        whole.A is A
        and whole.B is B
        and whole.error == 0
        and whole.norm == pytest.approx(found.norm)
    )


def test_how_many_singular_values_are_kept():
    values = torch.tensor(
        [4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64
    )  # energies 16, 9, 4, 1 of 30
    assert [kept(values, share) for share in (0.53, 0.54, 0.83, 0.84, 0.96, 0.97, 1.0)] == [
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
    assert [kept(values, rank) for rank in (1, 4, 5, 9, None)] == [1, 4, 5, 5, 4]
    assert [kept(values * 0, rank) for rank in (None, 0.5, 1.0)] == [1, 1, 1]


def test_the_total_weighs_layers_by_their_size():
    A = torch.zeros(1, 1)
    assert total_error([LowRank(A, A, 0.5, 3.0), LowRank(A, A, 0.0, 4.0)]) == pytest.approx(0.3)
    assert total_error([LowRank(A, A, 0.0, 0.0)]) == 0


@pytest.mark.parametrize(
    ("chosen", "names", "excluded"),
    [
        (["a.q", "b.q"], ["q"], None),
        (["a.q"], ["a.q"], None),
        (["q"], ["q"], r"a\.q|b\.q"),
        (["a.q", "b.q", "a.k"], ["a.k", "q"], None),
    ],
)
def test_targets_mean_exactly_the_chosen(chosen, names, excluded):
    paths = ["a", "b", "a.k", "a.q", "b.k", "b.q", *(["q"] if "q" in chosen else [])]
    assert exactly(chosen, paths) == (names, excluded)
    assert sorted(select(paths, names, excluded)) == sorted(chosen)


@pytest.mark.parametrize(
    "values", [{"a.q": 1, "b.q": 2, "c": 3}, {"q": 1, "a.q": 2, "b.a.q": 3}, {"a+b.q": 1, "x": 2}]
)
def test_patterns_give_each_path_its_value(values):
    for default in (1, 2):
        found = patterns(values, default)
        assert {path: pattern_value(found, path, default) for path in values} == values


def test_only_some_of_modules_of_one_name(method):
    """Layers 0 and 2 of a list in which other numbers have children of the same names."""
    base = nn.Sequential(
        nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)
    ).eval()
    model = get_peft_model(base, method.config(target_modules=r"0|1\.1"))
    config, state = convert_to_lora(model, 1, **method.merge)
    again = get_peft_model(
        nn.Sequential(
            nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)
        ),
        config,
    )
    assert [path for path, _ in again.base_model.named_tuner_layers()] == ["0", "1.1"]
    assert set_peft_model_state_dict(again, state) == ([], [])


def test_the_only_adapter_is_converted(method, tmp_path):
    fields = {"target_modules": TARGETS, "init_weights": False}
    fields = {
        name: value
        for name, value in fields.items()
        if name in method.config_cls.__dataclass_fields__
    }
    model = get_peft_model(mlp(), method.config(**fields), "a")
    model.add_adapter("b", method.config(**fields))
    options = {"task_id": 1} if method.merge else {}
    for active in ("a", "b"):
        model.set_adapter(active)
        by_default = save_as_lora(tmp_path, model, **options)
        named = convert_to_lora(model, adapter_name=active, **options)
        assert all(
            torch.equal(tensor, named.state_dict[key])
            for key, tensor in by_default.state_dict.items()
        )
        assert model.supports_lora_conversion()
    model.base_model.set_adapter(["a", "b"])
    for call in (
        convert_to_lora,
        lambda model, **options: save_as_lora(tmp_path / "new", model, **options),
    ):
        with pytest.raises(
            ValueError,
            match="no adapter 'default', and several could be meant; pass `adapter_name`.* a, b",
        ):
            call(model, **options)
    assert not (tmp_path / "new").exists()
