# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA on models: the shared bank, the two forms of its file, biases."""

import copy
import warnings

import pytest
import torch
from helpers.models import gpt2, llama, mlp
from safetensors.torch import load_file, save_file
from torch import nn

from peft import PeftModel, VBLoRAConfig, get_peft_model

pytestmark = pytest.mark.quick


def config(**fields):
    return VBLoRAConfig(
        **{"r": 3, "num_vectors": 10, "vector_length": 4, "target_modules": ["0", "2"], **fields}
    )


def by_hand(logits, bank, topk):
    """A position's tile in float64: softmax over its `topk` largest logits, weighted sum of those
    vectors.
    """
    order = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:topk]
    powers = [torch.exp(logits[i].double()) for i in order]
    return sum(
        power / sum(powers) * bank[i].double() for i, power in zip(order, powers, strict=True)
    )


@pytest.mark.parametrize("topk", [1, 2, 10])
def test_a_layer_against_the_formula(topk):
    model = get_peft_model(
        mlp(), config(topk=topk, init_vector_bank_bound=1.0, init_logits_std=1.0)
    ).eval()
    bank = model.vblora_vector_bank["default"]
    layer = model.base_model.model[0]
    a, b = layer.vblora_logits_A["default"], layer.vblora_logits_B["default"]
    A = torch.stack([torch.cat([by_hand(position, bank, topk) for position in row]) for row in a])
    B = torch.cat(
        [torch.stack([by_hand(position, bank, topk) for position in tile], dim=1) for tile in b]
    )
    x = torch.randn(5, 8)
    expected = x.double() @ A.T @ B.T
    torch.testing.assert_close(
        layer(x) - layer.base_layer(x), expected.float(), atol=1e-5, rtol=1e-4
    )


def test_the_documented_sizes():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096))
    model = get_peft_model(
        base,
        VBLoRAConfig(r=4, num_vectors=60, vector_length=256, topk=2, target_modules=["0", "1"]),
    )
    assert model.get_nb_trainable_parameters()[0] == 2 * 7_680 + 15_360


def test_one_bank_for_all_layers():
    model = get_peft_model(llama(), config(target_modules=["q_proj", "v_proj"]))
    bank = model.vblora_vector_bank["default"]
    layers = list(model.base_model.tuner_layers())
    assert len(layers) == 4
    assert all(layer.vblora_vector_bank["default"] is bank for layer in layers)
    assert [name for name, _ in model.named_parameters() if "bank" in name] == [
        "base_model.vblora_vector_bank.default"
    ]
    assert [name for name in model.state_dict() if "bank" in name] == [
        "base_model.vblora_vector_bank.default"
    ]
    model.add_adapter("b", config(target_modules=["q_proj"]))
    assert model.vblora_vector_bank["b"] is not bank
    for other in (copy.deepcopy(model), copy.deepcopy(model).double()):
        assert all(
            layer.vblora_vector_bank["default"] is other.vblora_vector_bank["default"]
            for layer in other.base_model.tuner_layers()
        )
    model.delete_adapter("default") if model.active_adapters == ["b"] else model.delete_adapter("b")
    assert list(model.vblora_vector_bank) == ["default"]


@pytest.mark.parametrize(
    ("num_vectors", "dtype"), [(10, torch.uint8), (255, torch.uint8), (256, torch.int16)]
)
@pytest.mark.parametrize("topk", [1, 2, 3])
def test_the_compact_file(tmp_path, num_vectors, dtype, topk):
    fields = config(
        num_vectors=num_vectors, topk=topk, init_vector_bank_bound=1.0, init_logits_std=1.0
    )
    model = get_peft_model(mlp(), fields).eval()
    x = torch.randn(5, 8)
    expected = model(x)
    model.save_pretrained(tmp_path / "full")
    model.peft_config[
        "default"
    ].save_only_topk_weights = True  # turned on later, as the documentation has it
    model.save_pretrained(tmp_path / "compact")
    state = load_file(tmp_path / "compact" / "adapter_model.safetensors")
    indices = state["base_model.model.0.vblora_logits_A_topk_indices"]
    weights = state["base_model.model.0.vblora_logits_A_topk_weights"]
    assert (indices.shape, indices.dtype) == ((3, 2, topk), dtype)
    assert (weights.shape, weights.dtype) == ((3, 2, topk - 1), torch.float32)
    assert "base_model.model.0.vblora_logits_A" not in state
    base = model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "compact", is_trainable=True)
    torch.testing.assert_close(loaded.eval()(x), expected, atol=1e-5, rtol=1e-5)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(x), expected, atol=1e-5, rtol=1e-5)
    loaded.unmerge_adapter()
    loaded.train()
    with pytest.raises(RuntimeError, match="Found infinity values in VB-LoRA logits"):
        loaded(x)
    # The guard sees a plain load_state_dict too, and full logits lift it.
    full = PeftModel.from_pretrained(loaded.unload(), tmp_path / "full", is_trainable=True).train()
    full(x).sum().backward()


def test_compact_files_of_half_precision_load(tmp_path):
    model = get_peft_model(
        mlp(), config(save_only_topk_weights=True, init_vector_bank_bound=1.0)
    ).eval()
    x = torch.randn(5, 8)
    expected = model(x)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        {k: t.bfloat16() if t.is_floating_point() else t for k, t in load_file(path).items()}, path
    )
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    torch.testing.assert_close(loaded(x), expected, atol=0.05, rtol=0.05)


def test_the_last_weight_is_never_negative(tmp_path):
    model = get_peft_model(mlp(), config(topk=3, save_only_topk_weights=True))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    for key, tensor in state.items():
        if key.endswith("weights"):
            tensor.copy_(torch.tensor([0.7, 0.3000001]).expand_as(tensor))
    save_file(state, path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.isfinite(loaded(torch.randn(2, 8))).all()
    loaded.save_pretrained(tmp_path)
    again = load_file(path)
    assert all(
        (1 - t.sum(-1) >= -1e-6).all() and t.isfinite().all()
        for k, t in again.items()
        if k.endswith("weights")
    )


@pytest.mark.parametrize("spoil", ["beyond", "negative", "no weights", "other number"])
def test_compact_files_that_make_no_sense(tmp_path, spoil):
    model = get_peft_model(mlp(), config(save_only_topk_weights=True))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state, key = load_file(path), "base_model.model.0.vblora_logits_A_topk_indices"
    if spoil == "beyond":
        state[key][0, 0, 0] = 10
    elif spoil == "negative":
        state[key] = state[key].long() - 20
    elif spoil == "no weights":
        del state[key.replace("indices", "weights")]
    else:
        state[key.replace("indices", "weights")] = torch.zeros(3, 2, 4)
    save_file(state, path)
    base = mlp()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(RuntimeError, match=key):
        PeftModel.from_pretrained(base, tmp_path)
    assert base.state_dict().keys() == before.keys()


def test_full_logits_through_load_state_dict(tmp_path):
    model = get_peft_model(mlp(), config()).train()
    full = copy.deepcopy(model.state_dict())
    compact = copy.deepcopy(full)
    for name, tensor in compact.items():
        if "logits" in name:
            tensor[..., 2:] = -torch.inf
    model.load_state_dict(compact)
    with pytest.raises(RuntimeError, match="infinity"):
        model(torch.randn(2, 8))
    model.load_state_dict(full)
    model(torch.randn(2, 8)).sum().backward()
    model.load_state_dict(compact)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(
            full[name]
        )  # as averages of weights are swapped in, which nobody is told of
    model(torch.randn(2, 8)).sum().backward()


@pytest.mark.parametrize(
    ("bias", "expected"), [("none", []), ("vblora_only", ["0", "2"]), ("all", ["0", "2", "4"])]
)
def test_biases(bias, expected, tmp_path):
    base = mlp()
    model = get_peft_model(base, config(bias=bias))
    trained = [
        name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")
    ]
    assert [name.split(".")[2] for name in trained] == expected
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).fill_(2.0)
    x = torch.randn(3, 8)
    output = model(x)
    model.save_pretrained(tmp_path)
    keys = [
        key for key in load_file(tmp_path / "adapter_model.safetensors") if key.endswith("bias")
    ]
    assert sorted(keys) == sorted(
        f"base_model.model.{n}.base_layer.bias" if n != "4" else "base_model.model.4.bias"
        for n in expected
    )
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded(x), output)
    if bias != "none":
        with (
            pytest.warns(UserWarning, match=f"bias configured to be '{bias}'"),
            loaded.disable_adapter(),
        ):
            pass
        with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
            model.add_adapter("b", config(bias=bias))


def test_conv1d_and_its_orientation():
    with pytest.warns(
        UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`"
    ):
        model = get_peft_model(gpt2(), config(target_modules=["c_attn"])).eval()
    assert model.peft_config["default"].fan_in_fan_out is True
    with pytest.warns(
        UserWarning,
        match="fan_in_fan_out is set to True but the target module is `torch.nn.Linear`",
    ):
        get_peft_model(mlp(), config(fan_in_fan_out=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(gpt2(), config(target_modules=["c_attn"], fan_in_fan_out=True))
    ids = torch.randint(3, 48, (2, 5))
    expected = model(input_ids=ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_some_layers_only():
    model = get_peft_model(
        llama(),
        config(
            target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers"
        ),
    )
    assert [name for name, _ in model.base_model.named_tuner_layers()] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


@pytest.mark.parametrize(
    ("fields", "expected"), [({}, 3 * 10 * 14 + 40), ({"save_only_topk_weights": True}, 105)]
)
def test_savable_parameters(fields, expected, capsys):
    # Two layers of 8 → 16 and 16 → 16 with r=3: 3·(2+4) + 3·(4+4) = 42 positions of 10 logits, and
    # a bank of 10·4.
    model = get_peft_model(mlp(), config(modules_to_save=["4"], **fields))
    positions = 42
    full = positions * 10 + 40
    compact = int(positions * (1 + 2 * 0.25)) + 40
    own, other = model.get_nb_savable_parameters()
    assert own == (compact if fields else full)
    assert other == 16 * 8 + 8
    model.print_savable_parameters()
    assert capsys.readouterr().out.startswith(
        f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params"
    )
    assert model.get_nb_savable_parameters("default") == (own, other)
    with pytest.raises(ValueError, match="Adapter b not found"):
        model.get_nb_savable_parameters("b")
    model.add_adapter("b", config())
    assert model.get_nb_savable_parameters("default") == (own, other)


def test_dropout_is_for_training():
    model = get_peft_model(mlp(), config(vblora_dropout=0.5, init_vector_bank_bound=1.0)).eval()
    x = torch.randn(64, 8)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_the_bank_is_initialized_again_by_the_interfaces_name():
    config = VBLoRAConfig(r=2, num_vectors=6, vector_length=4, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    before = model.base_model.vblora_vector_bank["default"].detach().clone()
    config.init_vector_bank_bound = 0.5
    model._init_vblora_vector_bank(config, "default")
    bank = model.base_model.vblora_vector_bank["default"]
    assert 0.02 < bank.abs().max() <= 0.5 and not torch.equal(bank, before)
