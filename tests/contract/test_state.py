# SPDX-License-Identifier: Apache-2.0
"""What an adapter is made of: flags, tensors, names; and that wrappers, copies and files keep all
of it.
"""

import contextlib
import copy
import io
import warnings

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, llama, mlp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import peft
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.base.errors import CheckpointError, PeftTypeError
from peft.tuners.tuners_utils import BaseTunerLayer


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def own(model):
    return {name: p for name, p in model.named_parameters() if model.prefix in name}


@pytest.mark.parametrize("training", [True, False])
def test_all_new_modules_take_the_models_mode(method, training):
    base = mlp().train(training)
    model = get_peft_model(base, method.config(target_modules=TARGETS, modules_to_save=["4"]))
    model.add_adapter("b", method.config(target_modules=["0", "2"]))
    assert [name for name, module in model.named_modules() if module.training != training] == []


def test_a_mixed_mode_is_kept(method):
    """A layer in eval mode inside a model in training stays so, adapter included."""
    base = mlp().train()
    base[0].eval()
    model = get_peft_model(base, method.config(target_modules=TARGETS))
    assert not model.base_model.model[0].training
    assert model.base_model.model[2].training
    assert not any(
        isinstance(m, BaseTunerLayer) and m.training for m in model.base_model.model[0].modules()
    )


def test_the_state_dict_restores_another_model(model, method):
    x = torch.randn(5, 8)
    torch.manual_seed(9)
    other = get_peft_model(mlp(), method.config(target_modules=TARGETS))
    assert not torch.allclose(other(x, **method.call), model(x, **method.call))
    assert other.load_state_dict(copy.deepcopy(model.state_dict())) == ([], [])
    assert torch.equal(other(x, **method.call), model(x, **method.call))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state.keys() == model.state_dict().keys()


def test_names_in_the_model_carry_prefix_and_adapter(model, method):
    """Clients tell an adapter's parameters from the base's by these two."""
    names = own(model)
    assert names.keys() == trainable(model)
    assert all("default" in name.split(".") for name in names)
    base = {
        name.replace(".base_layer", "").removeprefix("base_model.model.")
        for name in model.state_dict()
        if name not in names
    }
    assert base == mlp().state_dict().keys()


def test_no_tensor_is_in_the_state_dict_twice(model):
    tensors = [tensor.data_ptr() for tensor in model.state_dict(keep_vars=True).values()]
    assert len(tensors) == len(set(tensors))


def test_adapters_on_different_layers(method, tmp_path):
    x, close = torch.randn(5, 8), torch.testing.assert_close
    model = get_peft_model(mlp(), method.config(target_modules=["0"])).eval()
    model.add_adapter("b", method.config(target_modules=["2", "4"], r=1))
    first = model(x, **method.call)
    model.set_adapter("b")
    second = model(x, **method.call)
    assert all(".0." not in name or "vector_bank" in name for name in trainable(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "b", adapter_name="b")
    close(loaded(x, **method.call), second)
    loaded.load_adapter(tmp_path, "default")
    loaded.set_adapter("default")
    close(loaded(x, **method.call), first)
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        loaded.delete_adapter("default")
    close(loaded(x, **method.call), second)
    assert loaded.merge_and_unload(**method.merge)(x).sub(second).abs().max() < 1e-5


def test_files_hold_contiguous_tensors_of_the_adapter_alone(model, tmp_path):
    model.add_adapter("b", copy.deepcopy(model.peft_config["default"]))
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert sorted(
        p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()
    ) == [
        "README.md",
        "b/adapter_config.json",
        "b/adapter_model.safetensors",
    ]
    state = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.") and "b" not in key.split(".") for key in state)
    assert sum(t.numel() for t in state.values()) == sum(
        p.numel() for n, p in own(model).items() if "b" in n.split(".")
    )
    with safe_open(tmp_path / "b" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_nothing_is_written_by_other_processes(model, tmp_path):
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


def test_the_saved_config_says_frozen_and_the_live_one_does_not(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).inference_mode is True
    assert model.peft_config["default"].inference_mode is False
    assert trainable(model)


def test_a_trained_value_reaches_the_file(model, tmp_path, method):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randn(5, 8), **method.call).square().sum().backward()
    optimiser.step()
    expected = {name: p.detach().clone() for name, p in own(model).items()}
    model.save_pretrained(tmp_path)
    loaded = own(PeftModel.from_pretrained(model.unload(), tmp_path))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_loaded_adapter_waits_unless_trainable(model, method, tmp_path):
    model.save_pretrained(tmp_path)
    first = trainable(model)
    model.load_adapter(tmp_path, "frozen")
    assert trainable(model) == first
    assert model.active_adapters == ["default"]
    assert model.peft_config["frozen"].inference_mode is True
    model.load_adapter(tmp_path, "open", is_trainable=True)
    assert trainable(model) == first | {name.replace("default", "open") for name in first}
    assert model.peft_config["open"].inference_mode is False
    base = mlp().train()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert not loaded.training
    assert not base.training
    assert PeftModel.from_pretrained(mlp().train(), tmp_path, is_trainable=True).training


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_through_a_file(method, tmp_path, autocast, dtype):
    x = torch.randn(5, 8, dtype=dtype)
    model = get_peft_model(
        mlp(dtype), method.config(target_modules=TARGETS), autocast_adapter_dtype=autocast
    ).eval()
    wanted = torch.float32 if autocast else dtype
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {wanted}
    expected = model(x, **method.call)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in own(loaded).values()} == {wanted}
    assert torch.equal(loaded(x, **method.call), expected)
    loaded.load_adapter(tmp_path, "b", autocast_adapter_dtype=not autocast)
    other = dtype if autocast else torch.float32
    assert {p.dtype for n, p in own(loaded).items() if "b" in n.split(".")} == {other}


def test_double_precision_is_kept(method):
    model = get_peft_model(mlp(torch.float64), method.config(target_modules=TARGETS))
    assert {p.dtype for p in own(model).values()} == {torch.float64}
    assert model(torch.randn(3, 8, dtype=torch.float64), **method.call).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_parameters_and_gives_finite_gradients(model, method, dtype):
    x = torch.randn(5, 8)
    expected = model(x, **method.call)
    with torch.autocast("cpu", dtype=dtype):
        output = model(x, **method.call)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)
    output.float().square().sum().backward()
    gradients = {p.grad.dtype for p in own(model).values()}
    assert gradients == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in own(model).values())


def test_a_model_cast_as_a_whole_still_runs(model, method):
    x = torch.randn(5, 8)
    expected = model(x, **method.call)
    model.to(torch.bfloat16)
    output = model(x.bfloat16(), **method.call)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.15, rtol=0.15)


@torch.compiler.set_stance("force_eager")
@pytest.mark.parametrize("where", ["base", "model", "layer"])
def test_compiled_modules_leave_no_trace_in_files(method, tmp_path, where):
    """It is the wrapper that has names of its own; nothing has to be compiled for that."""
    x = torch.randn(5, 8)
    base = mlp()
    if where == "base":
        model = saver = get_peft_model(torch.compile(base), method.config(target_modules=TARGETS))
    else:
        model = saver = get_peft_model(base, method.config(target_modules=TARGETS))
        if where == "model":
            saver = torch.compile(model)
        else:
            base[0] = torch.compile(base[0])
    expected = model.eval()(x, **method.call)
    reference = get_peft_model_state_dict(
        get_peft_model(mlp(), method.config(target_modules=TARGETS))
    )
    saver.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == reference.keys()
    plain = mlp()
    plain.load_state_dict(
        {
            name.replace("_orig_mod.", "")
            .replace("base_layer.", "")
            .removeprefix("base_model.model."): tensor
            for name, tensor in model.state_dict().items()
            if model.prefix not in name
        }
    )
    torch.testing.assert_close(
        PeftModel.from_pretrained(plain, tmp_path)(x, **method.call), expected
    )


def test_a_gathered_state_dict_with_wrappers_names(model, tmp_path):
    """FSDP and DDP hand over a state dict whose names have their own parts."""
    expected = get_peft_model_state_dict(model)
    gathered = {
        f"module.{name}".replace(".model.", ".model._fsdp_wrapped_module."): t
        for name, t in model.state_dict().items()
    }
    model.save_pretrained(tmp_path, state_dict=gathered)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in expected.items())


def test_unloading_leaves_nothing_behind(method):
    base = mlp()
    before = {
        name: (id(m), sorted(vars(m)), list(m._forward_pre_hooks), list(m._forward_hooks))
        for name, m in base.named_modules()
    }
    tensors = {name: t.data_ptr() for name, t in base.state_dict().items()}
    model = get_peft_model(base, method.config(target_modules=TARGETS, modules_to_save=["4"]))
    model(torch.randn(2, 8), **method.call)
    plain = model.unload()
    assert plain is base
    assert {
        name: (id(m), sorted(vars(m)), list(m._forward_pre_hooks), list(m._forward_hooks))
        for name, m in base.named_modules()
    } == before
    assert {name: t.data_ptr() for name, t in base.state_dict().items()} == tensors
    again = get_peft_model(plain, method.config(target_modules=TARGETS))
    assert again.active_adapters == ["default"]


def test_an_exception_inside_disable_adapter_restores_all(model, method):
    x = torch.randn(3, 8)
    expected, flags = model(x, **method.call), trainable(model)
    with contextlib.suppress(KeyError), model.disable_adapter():
        assert trainable(model) == set()
        raise KeyError
    assert trainable(model) == flags
    assert torch.equal(model(x, **method.call), expected)


def test_disabling_keeps_flags_set_by_hand(model, method):
    model.add_adapter("b", method.config(target_modules=TARGETS))
    model.base_model.set_requires_grad(["default", "b"], True)
    flags = trainable(model)
    assert any("b" in name.split(".") for name in flags)
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == flags


def test_disabling_uses_the_original_head(method):
    x = torch.randn(3, 8)
    base = mlp()
    expected = base(x)
    model = get_peft_model(
        base, method.config(target_modules=TARGETS, modules_to_save=["4"])
    ).eval()
    with torch.no_grad():
        model.base_model.model[4].modules_to_save["default"].weight.add_(1)
    flags = trainable(model)
    with model.disable_adapter(), model.disable_adapter():
        assert torch.equal(model(x), expected)
        assert trainable(model) == set()
    assert trainable(model) == flags
    model.add_adapter("plain", method.config(target_modules=["0"]))
    model.set_adapter("plain")
    assert not any("modules_to_save" in name for name in trainable(model))
    head = model.base_model.model[4]
    assert torch.equal(head(torch.ones(1, 16)), head.original_module(torch.ones(1, 16)))


def test_deleting_all_leaves_the_base_function(method):
    x = torch.randn(3, 8)
    base = mlp()
    expected = base(x)
    model = get_peft_model(base, method.config(target_modules=TARGETS))
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert torch.equal(model(x), expected)
    assert not any(model.prefix in name for name, _ in model.named_parameters())
    assert model.unload() is base


def test_deleting_one_of_several_active_keeps_the_others(model, method):
    x = torch.randn(3, 8)
    model.add_adapter("b", method.config(target_modules=TARGETS))
    model.set_adapter("b")
    expected = model(x, **method.call)
    model.set_adapter(["default", "b"])
    model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    assert torch.equal(model(x, **method.call), expected)


def test_a_second_injection_and_its_state(method):
    """Two adapters on a plain model: each can be read, written and told apart; the second is the
    active one.
    """
    x = torch.randn(3, 8)
    base = mlp()
    inject_adapter_in_model(method.config(target_modules=TARGETS), base, "a")
    first = base(x, **method.call)
    inject_adapter_in_model(method.config(target_modules=["2", "4"]), base, "b")
    states = {name: get_peft_model_state_dict(base, adapter_name=name) for name in "ab"}
    assert {name.split(".")[0] for name in states["a"]} - set("024") <= {"vblora_vector_bank"}
    assert not any(name.startswith("0.") and "vector_bank" not in name for name in states["b"])
    for layer in base.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter("a")
    assert torch.equal(base(x, **method.call), first)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in states["a"].items()}
    assert set_peft_model_state_dict(base, zeros, adapter_name="a") == ([], [])
    after = {name: get_peft_model_state_dict(base, adapter_name=name) for name in "ab"}
    assert all(not tensor.any() for tensor in after["a"].values())
    assert all(torch.equal(after["b"][key], tensor) for key, tensor in states["b"].items())


def test_an_adapter_is_filled_on_a_base_that_has_no_memory_yet(model, method, tmp_path):
    """Weights offloaded by device maps stand on the meta device; the adapter's come from the file
    nevertheless.
    """
    model.save_pretrained(tmp_path)
    expected = get_peft_model_state_dict(model)
    loaded = PeftModel.from_pretrained(mlp().to("meta"), tmp_path)
    state = get_peft_model_state_dict(loaded)
    assert state.keys() == expected.keys()
    assert all(
        not tensor.is_meta and torch.equal(tensor, expected[key]) for key, tensor in state.items()
    )


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}])
def test_loading_draws_no_random_numbers(model, tmp_path, options):
    model.save_pretrained(tmp_path)
    base = mlp()
    before = torch.get_rng_state()
    loaded = PeftModel.from_pretrained(base, tmp_path, **options)
    loaded.load_adapter(tmp_path, "b", **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.is_meta for p in loaded.parameters())


def test_an_adapter_added_on_meta_is_filled_by_its_state(model, method):
    state = get_peft_model_state_dict(model)
    x = torch.randn(3, 8)
    expected = model(x, **method.call)
    model.add_adapter("b", method.config(target_modules=TARGETS), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in own(model).items() if "b" in n.split(".")} == {"meta"}
    assert set_peft_model_state_dict(model, state, adapter_name="b", low_cpu_mem_usage=True) == (
        [],
        [],
    )
    model.set_adapter("b")
    assert torch.equal(model(x, **method.call), expected)
    assert {name.replace(".b", ".default") for name in trainable(model)} <= set(model.state_dict())


def test_a_subfolder_of_a_hub_repository(method, model, tmp_path, monkeypatch):
    import huggingface_hub

    model.add_adapter("b", method.config(target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    asked = []

    def download(repo, name, subfolder=None, **options):
        asked.append((repo, name, subfolder))
        return str(tmp_path / subfolder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = PeftModel.from_pretrained(mlp(), "someone/something", subfolder="b")
    assert asked == [
        ("someone/something", name, "b")
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    expected = get_peft_model_state_dict(model, adapter_name="b")
    assert all(
        torch.equal(t, expected[key]) for key, t in get_peft_model_state_dict(loaded).items()
    )


def test_the_hubs_legacy_file_is_the_second_choice(method, model, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    model.save_pretrained(tmp_path, safe_serialization=False)
    asked = []

    def download(repo, name, **options):
        asked.append(name)
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = PeftModel.from_pretrained(mlp(), "someone/something")
    assert asked == ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
    expected = get_peft_model_state_dict(model)
    assert all(
        torch.equal(t, expected[key]) for key, t in get_peft_model_state_dict(loaded).items()
    )


def test_a_hub_that_is_away_is_a_clear_error(monkeypatch):
    import huggingface_hub

    def download(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    base = mlp()
    with pytest.raises(
        FileNotFoundError, match=r"adapter_config.json.*someone/something.*no network"
    ):
        PeftModel.from_pretrained(base, "someone/something")
    assert [type(m) for m in base] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_a_head_with_other_classes_is_left_out_on_request(method, tmp_path):
    """`ignore_mismatched_sizes` takes all of a checkpoint but the tensors whose shape differs,
    which stay as they are made.
    """

    def base(classes):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, classes)).eval()

    config = method.config(target_modules=["0"], modules_to_save=["1"])
    saved = get_peft_model(base(3), config)
    saved.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base(5), tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        model = PeftModel.from_pretrained(base(5), tmp_path, ignore_mismatched_sizes=True)
    expected = peft.get_peft_model_state_dict(saved)
    got = peft.get_peft_model_state_dict(model)
    heads = {key for key in expected if ".1." in key}
    assert heads
    assert all(torch.equal(got[key], expected[key]) for key in expected if key not in heads)
    torch.testing.assert_close(got["base_model.model.1.weight"], base(5)[1].weight)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes") as told:
        result = model.load_adapter(tmp_path, "default", ignore_mismatched_sizes=True)
    assert len(told) == 1
    assert len(result.missing_keys) == len(heads)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        model.load_adapter(tmp_path, "b", ignore_mismatched_sizes=True)
    assert torch.isfinite(model.base_model.model[1].modules_to_save["b"].weight).all()


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_embeddings_and_heads_trained_whole(method, names, tmp_path):
    """What an adapter trained of them comes back into its own copies, however it is loaded; the
    base's stay as they are.
    """
    config = {"target_modules": ["q_proj"], "modules_to_save": names}
    base = llama()
    model, ids = (
        get_peft_model(copy.deepcopy(base), method.config(**config)),
        torch.randint(3, 48, (2, 5)),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        expected, plain = model.eval()(ids, **method.call).logits, base(ids).logits
    model.save_pretrained(tmp_path)

    def replaced(again):
        again.load_adapter(tmp_path, "default")
        return again

    def filled(again):
        result = peft.set_peft_model_state_dict(again, peft.load_peft_weights(tmp_path))
        assert result == ([], [])
        return again

    for again in (
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path),
        replaced(get_peft_model(copy.deepcopy(base), method.config(**config))),
        filled(get_peft_model(copy.deepcopy(base), method.config(**config))),
    ):
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(ids, **method.call).logits, expected)
            with again.disable_adapter():
                torch.testing.assert_close(again(ids).logits, plain)


def test_a_resized_vocabulary_is_saved_with_the_adapter(method, tmp_path):
    """The base model's folder tells how many tokens there were; the new embeddings can be had
    nowhere else.
    """
    from transformers import LlamaForCausalLM

    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    base.resize_token_embeddings(50)
    model = get_peft_model(base, method.config(target_modules=["q_proj"])).eval()
    with pytest.warns(UserWarning, match="has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.model.embed_tokens.weight"].shape == (50, 16)
    assert saved["base_model.model.lm_head.weight"].shape == (50, 16)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    again.resize_token_embeddings(50)
    ids = torch.tensor([[3, 49, 48]])
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(
        loaded(input_ids=ids, **method.call).logits, model(input_ids=ids, **method.call).logits
    )
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert not any(
        "embed_tokens" in key
        for key in load_file(tmp_path / "without" / "adapter_model.safetensors")
    )


def test_an_unchanged_vocabulary_is_not_saved(method, tmp_path, recwarn):
    from transformers import LlamaForCausalLM

    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        method.config(target_modules=["q_proj"]),
    )
    assert not any("embed_tokens" in key for key in get_peft_model_state_dict(model))
    assert not any("resized" in str(warning.message) for warning in recwarn)


def test_a_config_passed_to_from_pretrained_is_the_first_adapters(method, tmp_path):
    """As callers of the interface expect, but never that of two adapters."""
    config = method.config(target_modules=["0"])
    saved = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    saved.save_pretrained(tmp_path)
    assert saved.peft_config["default"] is not config and not config.inference_mode
    first, second = (
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), tmp_path, config=config)
        for _ in range(2)
    )
    assert first.peft_config["default"] is config and config.inference_mode
    assert second.peft_config["default"] is not config
    second.peft_config["default"].revision = "other"
    assert config.revision is None
    for free in (copy.deepcopy(config), first.unload() and config):
        again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), tmp_path, config=free)
        assert again.peft_config["default"] is free


def test_a_load_that_fails_leaves_the_config_that_it_is_given(method, tmp_path):
    saved = get_peft_model(nn.Sequential(nn.Linear(8, 8)), method.config(target_modules=["0"]))
    saved.save_pretrained(tmp_path)
    config = method.config(target_modules=["0"])
    before = copy.deepcopy(vars(config))
    with pytest.raises(RuntimeError, match="0"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(16, 24)), tmp_path, config=config)
    assert vars(config) == before


def test_the_base_models_weights_are_exchanged_below_adapters(method, tmp_path):
    """The oracle loads the adapter on the other weights."""
    torch.manual_seed(0)
    config = method.config(target_modules=TARGETS, modules_to_save=["4"])
    model, other, x = get_peft_model(mlp(), config).eval(), mlp(), torch.randn(3, 8)
    model.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    expected = PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)(x, **method.call)
    assert not torch.allclose(model(x, **method.call), expected)
    assert peft.set_base_model_state_dict(model, state) == ([], [])
    torch.testing.assert_close(model(x, **method.call), expected)
    found = peft.get_base_model_state_dict(model)
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    for tensor in state.values():  # the model has values of its own
        tensor.zero_()
    torch.testing.assert_close(model(x, **method.call), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), other(x))


def test_weights_of_another_base_model_are_refused(method):
    model = get_peft_model(mlp(), method.config(target_modules=TARGETS))
    state, before = mlp().state_dict(), copy.deepcopy(model.state_dict())
    part = {name: state[name] for name in ("0.weight", "0.bias")}
    calls = {
        "Missing keys: .*2.weight": part,
        "Unexpected keys: more": state | {"more": torch.ones(1)},
        "size mismatch for 0.weight: found shape .2, 2. in": state | {"0.weight": torch.ones(2, 2)},
    }
    for message, given in calls.items():
        with pytest.raises(CheckpointError, match=message) as refusal:
            peft.set_base_model_state_dict(model, given)
        assert "'state_dict' does not hold" in str(refusal.value) or "size" in message
    for given, message in (
        ([], "`state_dict` must be a dictionary of tensors, got <class 'list'>"),
        ({"0.weight": [1.0]}, r"`0.weight` must be a tensor, not \[1.0\]; nothing was changed"),
    ):
        with pytest.raises(PeftTypeError, match=message):
            peft.set_base_model_state_dict(model, given)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    result = peft.set_base_model_state_dict(model, part | {"more": torch.ones(1)}, strict=False)
    assert set(result.missing_keys) == state.keys() - part.keys()
    assert result.unexpected_keys == ["more"]
    found = peft.get_base_model_state_dict(model)
    assert {name for name in state if torch.equal(found[name], state[name])} == part.keys()


def test_what_is_no_state_of_an_adapter(model):
    with pytest.raises(
        PeftTypeError,
        match="`peft_model_state_dict` must be a dictionary .*`load_peft_weights` reads",
    ):
        set_peft_model_state_dict(model, [1])
    plain = {f"{name}.weight": torch.ones(1) for name in "abcd"}
    with pytest.raises(
        CheckpointError,
        match=r"no tensors of adapter default; it holds `a.*`, `b.*`, `c.weight`, …$",
    ):
        get_peft_model_state_dict(model, state_dict=plain)
    assert get_peft_model_state_dict(model, state_dict={}) == {}  # of a process that has nothing


def test_an_adapter_without_memory_is_filled_whole_or_not_at_all(method):
    source = get_peft_model(mlp(), method.config(target_modules=TARGETS))
    model = get_peft_model(mlp(), method.config(target_modules=TARGETS), low_cpu_mem_usage=True)
    state = {key: t.clone() for key, t in get_peft_model_state_dict(source).items()}
    first = next(key for key in state if "vector_bank" not in key)
    with pytest.raises(CheckpointError, match="would stay on the meta device.*Missing: .*0."):
        set_peft_model_state_dict(model, {k: t for k, t in state.items() if k != first})
    assert all(p.is_meta for p in own(model).values())
    assert set_peft_model_state_dict(model, state) == ([], [])
    for tensor in state.values():
        tensor.zero_()
    found, expected = get_peft_model_state_dict(model), get_peft_model_state_dict(source)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert trainable(model) == trainable(source)


def test_biases_of_a_file_go_to_an_adapter_that_trains_none():
    x = torch.randn(3, 8)
    torch.manual_seed(0)
    base = mlp()
    source = get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["0"], bias="all"))
    with torch.no_grad():
        for parameter in (p for p in source.parameters() if p.requires_grad):
            parameter.normal_()
    model = get_peft_model(base, peft.LoraConfig(target_modules=["0"])).eval()
    state = get_peft_model_state_dict(source)
    assert set_peft_model_state_dict(model, state | {"4.bias": torch.ones(8)}) == ([], ["4.bias"])
    torch.testing.assert_close(model(x), source.eval()(x))


def test_copies_of_a_full_module_are_passed_over(method):
    """Other writers save such a module under the names of its parts too, and all biases of all."""
    source = get_peft_model(mlp(), method.config(target_modules=["0"], modules_to_save=["4"]))
    model = get_peft_model(mlp(), method.config(target_modules=["0"], modules_to_save=["4"]))
    state = {key: t.clone() for key, t in get_peft_model_state_dict(source).items()}
    head = "base_model.model.4"
    copies = {
        f"{head}.{part}.{name}": torch.zeros_like(state[f"{head}.{name}"])
        for part in ("original_module", "modules_to_save")
        for name in ("weight", "bias")
    }
    assert set_peft_model_state_dict(model, state | copies) == ([], [])
    found = get_peft_model_state_dict(model)
    assert all(torch.equal(found[key], state[key]) for key in state)
    plain = get_peft_model(mlp(), method.config(target_modules=["0"]))
    left = {key: tensor for key, tensor in state.items() if not key.startswith(head)}
    assert set_peft_model_state_dict(plain, left | copies) == (
        [], [f"{head}.{part}.weight" for part in ("original_module", "modules_to_save")]
    )  # fmt: skip


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapted_embedding_is_saved_with_its_adapter(target, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", target], init_lora_weights=False)
    model = get_peft_model(llama(), config)
    with pytest.warns(UserWarning, match="`True` as embedding layers found in `target_modules`"):
        state = get_peft_model_state_dict(model)
    (key,) = (key for key in state if "lora_" not in key)
    assert key.startswith("base_model.model.") and key.endswith(f"{target}.base_layer.weight")
    assert torch.equal(state[key], model.state_dict()[key])
    assert not any("base_layer" in key for key in get_peft_model_state_dict(
        model, save_embedding_layers=False
    ))  # fmt: skip


def test_a_layer_inside_a_head_is_no_embedding():
    """The head of ESM's models is a stack of layers, `lm_head.decoder` the last."""
    model = nn.ModuleDict({"lm_head": nn.ModuleDict({"decoder": nn.Linear(4, 8)})})
    config = peft.LoraConfig(r=2, target_modules=r"lm_head\.decoder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = get_peft_model_state_dict(get_peft_model(model, config))
    assert {key.rsplit(".", 2)[1] for key in state} == {"lora_A", "lora_B"}


def test_a_compact_state_is_for_inference(tmp_path):
    """VB-LoRA's largest logits alone can't be trained; it is said when they are loaded."""
    config = METHODS["VBLORA"].config(target_modules=TARGETS, save_only_topk_weights=True)
    get_peft_model(mlp(), config).save_pretrained(tmp_path)
    model = get_peft_model(mlp(), config)
    with pytest.warns(UserWarning, match="trainable but was loaded from a compact file"):
        set_peft_model_state_dict(model, peft.load_peft_weights(tmp_path))
    with pytest.raises(RuntimeError, match="save_only_topk_weights"):
        model.train()(torch.randn(3, 8))
