# SPDX-License-Identifier: Apache-2.0
"""Adapters held in memory as indices and weights, trained on from there; tiles cut to size; gates
that start at zero.
"""

import pytest
import torch
from helpers.models import llama, mlp
from safetensors.torch import load_file
from torch import nn

from peft import (
    PeftModel,
    VBLoRAConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.optimizers import parameter_groups
from peft.tuners.vblora.packed import PackedTensors
from peft.utils.hotswap import hotswap_adapter

pytestmark = pytest.mark.quick
TARGETS = ["0", "2"]


def config(**fields):
    start = {"init_vector_bank_bound": 1.0, "init_logits_std": 1.0}
    return VBLoRAConfig(
        **{
            "r": 3,
            "num_vectors": 10,
            "vector_length": 4,
            "target_modules": TARGETS,
            **start,
            **fields,
        }
    )


def base():
    torch.manual_seed(1)
    return mlp()


def saved(folder, **fields):
    """A compact adapter on disk, an input and its output."""
    model = get_peft_model(base(), config(save_only_topk_weights=True, **fields)).eval()
    x = torch.randn(5, 8)
    model.save_pretrained(folder)
    return x, model(x).detach()


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


# --- running
# ----------------------------------------------------------------------------------------------------------------
#
#


@pytest.mark.parametrize("topk", [1, 2, 3, 10])
def test_a_compact_adapter_runs_from_indices_and_weights(tmp_path, topk):
    x, expected = saved(tmp_path, topk=topk)
    model = PeftModel.from_pretrained(base(), tmp_path)
    layer = model.base_model.model[0]
    assert not any("logits" in name for name, _ in model.named_parameters())
    held = sum(tensor.numel() * tensor.itemsize for tensor in layer.adapter_tensors("default"))
    bank = model.vblora_vector_bank["default"]
    positions = 3 * 2 + 4 * 3
    assert held - bank.numel() * 4 == positions * (topk + 4 * (topk - 1))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    merged = PeftModel.from_pretrained(base(), tmp_path).merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)


def test_no_tensor_as_long_as_the_bank_is_made(tmp_path):
    """Neither loading nor running makes logits: nothing has their number of entries."""
    x, _ = saved(tmp_path, num_vectors=251)
    sizes = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.update(
                t.shape[-1]
                for t in torch.utils._pytree.tree_leaves(result)
                if isinstance(t, torch.Tensor) and t.dim()
            )
            return result

    with Watch():
        model = PeftModel.from_pretrained(base(), tmp_path)
        model(x)
    assert 251 not in sizes
    assert 4 in sizes


def test_a_full_file_under_a_config_that_asks_for_compact(tmp_path):
    x, expected = saved(tmp_path)
    model = get_peft_model(base(), config()).eval()
    expected = model(x)
    model.save_pretrained(tmp_path / "full")
    asked = VBLoRAConfig.from_pretrained(tmp_path / "full", save_only_topk_weights=True)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "full", config=asked)
    assert "default" in loaded.base_model.model[0].vblora_logits_A_topk_weights
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)


def test_new_values_for_a_compact_adapter(tmp_path):
    x, expected = saved(tmp_path / "a")
    torch.manual_seed(5)
    y, other = saved(tmp_path / "b")
    model = PeftModel.from_pretrained(base(), tmp_path / "a")
    model.load_adapter(tmp_path / "b", "default")
    torch.testing.assert_close(model(y), other, rtol=1e-5, atol=1e-5)
    result = set_peft_model_state_dict(model, tensors(tmp_path / "a"))
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    hotswap_adapter(model, tmp_path / "b", "default")
    torch.testing.assert_close(model(y), other, rtol=1e-5, atol=1e-5)
    state = get_peft_model_state_dict(model)
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors(tmp_path / "b").items())


def test_turning_the_compact_form_off_saves_logits(tmp_path):
    x, expected = saved(tmp_path / "compact")
    model = PeftModel.from_pretrained(base(), tmp_path / "compact")
    model.peft_config["default"].save_only_topk_weights = False
    model.save_pretrained(tmp_path / "full")
    logits = tensors(tmp_path / "full")["base_model.model.0.vblora_logits_A"]
    assert logits.shape == (3, 2, 10) and torch.isneginf(logits).sum() == 3 * 2 * 8
    again = PeftModel.from_pretrained(base(), tmp_path / "full")
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_half_precision(tmp_path, dtype):
    x, expected = saved(tmp_path / "half", topk_weights_dtype=dtype)
    weights = {
        key: tensor for key, tensor in tensors(tmp_path / "half").items() if key.endswith("weights")
    }
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    model = PeftModel.from_pretrained(base(), tmp_path / "half")
    assert model.base_model.model[0].vblora_logits_A_topk_weights["default"].dtype == getattr(
        torch, dtype
    )
    torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.2)
    model.save_pretrained(tmp_path / "again")
    assert all(
        torch.equal(tensors(tmp_path / "again")[key], tensor)
        for key, tensor in tensors(tmp_path / "half").items()
    )
    with pytest.raises(ValueError, match="`topk_weights_dtype`='int8' must be one of"):
        config(topk_weights_dtype="int8")


def test_what_is_saved_is_counted(tmp_path):
    for fields in (
        {},
        {"save_only_topk_weights": True},
        {"save_only_topk_weights": True, "topk_weights_dtype": "float16"},
    ):
        trained = get_peft_model(base(), config(**fields))
        trained.save_pretrained(tmp_path / "a")
        size = (
            sum(tensor.numel() * tensor.itemsize for tensor in tensors(tmp_path / "a").values()) / 4
        )
        loaded = PeftModel.from_pretrained(base(), tmp_path / "a")
        assert (
            trained.get_nb_savable_parameters()
            == loaded.get_nb_savable_parameters()
            == (int(size), 0)
        )


# --- training on
# ------------------------------------------------------------------------------------------------------------
#
#


def resumed(folder, model=None, **options):
    asked = VBLoRAConfig.from_pretrained(folder, train_topk_weights=True)
    return PeftModel.from_pretrained(
        model or base(), folder, is_trainable=True, config=asked, **options
    )


def test_training_on_keeps_the_choice_and_moves_the_weights(tmp_path):
    x, expected = saved(tmp_path / "a", topk=3)
    model = resumed(tmp_path / "a")
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-5)
    assert model.base_model.model[0].vblora_logits_A["default"].shape == (3, 2, 3)
    optimiser = torch.optim.AdamW(parameter_groups(model, rates={"logits": 0.5}))
    model.train()
    for _ in range(5):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
    model.eval()
    model.save_pretrained(tmp_path / "b")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert {key: (t.shape, t.dtype) for key, t in before.items()} == {
        key: (t.shape, t.dtype) for key, t in after.items()
    }
    moved = 0
    for key in (key for key in before if key.endswith("indices")):
        assert torch.equal(before[key].sort(-1).values, after[key].sort(-1).values)
        moved += int((before[key] != after[key]).sum())
    assert moved > 0  # the best is still first
    weights = after["base_model.model.0.vblora_logits_A_topk_weights"]
    assert not torch.equal(weights, before["base_model.model.0.vblora_logits_A_topk_weights"])
    full = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    assert (full[..., :-1] >= full[..., 1:] - 1e-6).all()
    again = PeftModel.from_pretrained(base(), tmp_path / "b")
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_its_gradient_is_that_of_the_full_logits(tmp_path):
    """Of all logits only the chosen ones have a gradient, and these have the same here."""
    full = get_peft_model(base(), config(save_only_topk_weights=True))
    full.save_pretrained(tmp_path)
    compact = resumed(tmp_path)
    x = torch.randn(5, 8)
    for model in (full, compact):
        model.train()(x).square().sum().backward()
    for name in ("vblora_logits_A", "vblora_logits_B"):
        layer = full.base_model.model[0]
        logits = getattr(layer, name)["default"]
        indices = logits.topk(2).indices
        expected = logits.grad.gather(-1, indices)
        assert torch.equal(logits.grad.scatter(-1, indices, 0.0), torch.zeros_like(logits))
        torch.testing.assert_close(
            getattr(compact.base_model.model[0], name)["default"].grad,
            expected,
            rtol=1e-4,
            atol=1e-4,
        )
    bank, other = (model.vblora_vector_bank["default"].grad for model in (full, compact))
    torch.testing.assert_close(other, bank, rtol=1e-4, atol=1e-4)


def test_training_on_what_was_loaded_in_inference_mode(tmp_path):
    x, expected = saved(tmp_path)
    plain = base()
    with torch.inference_mode():
        model = resumed(tmp_path, plain)
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-5)
    other = resumed(tmp_path)
    for each in (model, other):
        each.train()(x).square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_the_guard_stands_without_the_option(tmp_path):
    x, _ = saved(tmp_path)
    remedy = r"is_trainable=True.*VBLoRAConfig.from_pretrained\(folder, train_topk_weights=True\)"
    for trainable in (True, False):
        if trainable:
            with pytest.warns(
                UserWarning, match=f"first forward in training will fail. .*{remedy}"
            ):
                model = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).train()
            with pytest.warns(
                UserWarning, match="Adapter second is trainable but was loaded from a compact file"
            ):
                model.load_adapter(tmp_path, "second", is_trainable=True)
        else:
            model = PeftModel.from_pretrained(base(), tmp_path).train()
        with pytest.raises(
            RuntimeError, match=f"Found infinity values in VB-LoRA logits. .*{remedy}"
        ):
            model(x)
    with pytest.raises(RuntimeError, match="Found infinity values in VB-LoRA logits"):
        model(x, adapter_names=["default"] * 5)


# --- sizes that vectors do not divide
# ---------------------------------------------------------------------------------------


def odd():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 8)).eval()


def test_the_last_tile_is_cut_to_size(tmp_path):
    model = get_peft_model(odd(), config(pad_last_tile=True)).eval()
    layer = model.base_model.model[0]
    assert layer.vblora_logits_A["default"].shape == (3, 3, 10)
    assert layer.vblora_logits_B["default"].shape == (2, 3, 10)
    bank = model.vblora_vector_bank["default"].double()

    def row(positions):
        tiles = []
        for logits in positions.double():
            weights, indices = logits.topk(2)
            tiles.append((weights.softmax(0).unsqueeze(1) * bank[indices]).sum(0))
        return torch.cat(tiles)

    A = torch.stack([row(positions)[:10] for positions in layer.vblora_logits_A["default"]])
    B = torch.stack(
        [row(positions)[:7] for positions in layer.vblora_logits_B["default"].transpose(0, 1)],
        dim=1,
    )
    x = torch.randn(5, 10)
    torch.testing.assert_close(
        (layer(x) - layer.base_layer(x)).double(), x.double() @ A.T @ B.T, rtol=1e-4, atol=1e-4
    )
    expected = model(x)
    for fields in ({}, {"save_only_topk_weights": True}):
        model.peft_config["default"].save_only_topk_weights = bool(fields)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(odd(), tmp_path)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)
    model.train()(x).sum().backward()
    model.add_weighted_adapter(["default"], [2.0], "twice", "cat")
    torch.testing.assert_close(
        layer.get_delta_weight("twice"), 2 * layer.get_delta_weight("default"), rtol=1e-4, atol=1e-4
    )


def test_grouped_query_attention():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=30))
    fields = {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "vector_length": 16}
    with pytest.raises(ValueError, match="Lengths that divide all targeted sizes are 1, 2"):
        get_peft_model(model, config(**fields))
    model = get_peft_model(model, config(**fields, pad_last_tile=True))
    model(input_ids=torch.randint(0, 30, (2, 4))).logits.sum().backward()


def test_padding_changes_nothing_where_lengths_divide():
    torch.manual_seed(2)
    plain = get_peft_model(base(), config())
    torch.manual_seed(2)
    padded = get_peft_model(base(), config(pad_last_tile=True))
    x = torch.randn(3, 8)
    assert torch.equal(plain(x), padded(x))


# --- the gate
# ---------------------------------------------------------------------------------------------------------------
#
#


def test_a_gate_starts_closed_and_opens_by_training(tmp_path):
    plain = base()
    x = torch.randn(6, 8)
    expected = plain(x)
    model = get_peft_model(plain, config(output_gate=True))
    torch.testing.assert_close(model.eval()(x), expected)
    layer = model.base_model.model[0]
    optimiser = torch.optim.SGD(
        [group["params"][0] for group in parameter_groups(model) if group["name"] == "gate"],
        lr=0.01,
    )
    model.train()(x).square().sum().backward()
    assert float(layer.vblora_gate["default"].grad.abs()) > 0
    assert not layer.vblora_logits_A["default"].grad.any()
    optimiser.step()
    gate = layer.vblora_gate["default"].detach().clone()
    A, B = layer.factors("default")
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ A.T @ B.T)
    layer.vblora_gate["default"].data.fill_(1.0)
    torch.testing.assert_close(layer.factors("default")[1] * gate, B)
    layer.vblora_gate["default"].data.copy_(gate)
    expected = model.eval()(x)
    for compact in (False, True):
        model.peft_config["default"].save_only_topk_weights = compact
        model.save_pretrained(tmp_path)
        assert tensors(tmp_path)["base_model.vblora_vector_bank"].shape == (1, 10, 4)
        loaded = PeftModel.from_pretrained(base(), tmp_path)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Adapters with an output gate"):
        model.add_weighted_adapter(["default"], [2.0], "twice", "cat")


# --- what is written without additions is what it was
# -----------------------------------------------------------------------


def test_a_config_without_additions_has_no_new_fields():
    names = {
        "bank",
        "bank_sha256",
        "train_topk_weights",
        "topk_weights_dtype",
        "pad_last_tile",
        "output_gate",
    }
    assert not names & config().to_dict().keys()
    assert (
        names
        <= config(
            bank="a",
            bank_sha256="b",
            train_topk_weights=True,
            topk_weights_dtype="float16",
            pad_last_tile=True,
            output_gate=True,
        )
        .to_dict()
        .keys()
    )
    for name in names - {"bank", "bank_sha256", "topk_weights_dtype"}:
        with pytest.raises(ValueError, match=f"`{name}`=1 must be True or False"):
            config(**{name: 1})
    with pytest.raises(ValueError, match="`bank`=1 must be a string or None"):
        config(bank=1)


# --- tensors side by side
# ---------------------------------------------------------------------------------------------------
#
#


def test_packed_tensors_keep_what_they_are_given():
    packed, known = PackedTensors(), {}
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        name = f"n{step % 7}"
        if step % 5 == 4 and name in known:
            del packed[name], known[name]
            continue
        shape = (2, 3) if step % 3 else (1,)
        dtype = torch.uint8 if step % 2 else torch.float32
        known[name] = torch.randint(0, 200, shape, generator=generator).to(dtype)
        packed[name] = known[name]
        assert (
            list(packed) == list(packed._locations)
            and set(packed) == set(known)
            and len(packed) == len(known)
        )
        for other, tensor in known.items():
            assert torch.equal(packed[other], tensor) and packed[other].dtype == tensor.dtype
    assert packed.state_dict().keys() == known.keys()
    fresh = PackedTensors()
    for name, tensor in known.items():
        fresh[name] = torch.zeros_like(tensor)
    fresh.load_state_dict(packed.state_dict())
    assert all(torch.equal(fresh[name], tensor) for name, tensor in known.items())
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key.*more"):
        fresh.load_state_dict({**packed.state_dict(), "more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict({name: torch.zeros(9) for name in known})
    for name in list(known):
        del packed[name]
    assert not list(packed.buffers()) and not list(packed)


def test_packed_tensors_are_few_however_many_adapters():
    packed = PackedTensors()
    for i in range(100):
        packed[str(i)] = torch.full((2,), i)
    assert [tuple(buffer.shape) for buffer in packed.buffers()] == [(128, 2)]
    assert packed.double().to(torch.float64)("7").tolist() == [7, 7]


def test_native_loading_is_as_before(tmp_path):
    """transformers reads a compact file into full logits."""
    model = get_peft_model(
        llama(),
        config(target_modules=["q_proj"], save_only_topk_weights=True, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path)
    plain = llama()
    plain.load_state_dict(
        {
            k.replace(".base_layer", ""): v
            for k, v in model.get_base_model().state_dict().items()
            if "vblora" not in k
        }
    )
    plain.load_adapter(str(tmp_path))
    ids = torch.randint(3, 48, (2, 5))
    torch.testing.assert_close(
        plain(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
    assert any("vblora_logits_A.default" in name for name, _ in plain.named_parameters())
