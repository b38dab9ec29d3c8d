# SPDX-License-Identifier: Apache-2.0
"""Adapters of modules that share a weight are one, with `ensure_weight_tying`."""

import pytest
import torch
from helpers.models import llama, t5
from helpers.states import assert_unchanged, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    set_peft_model_state_dict,
)

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


def base():
    torch.manual_seed(0)
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model.double().eval()


def made(**fields):
    torch.manual_seed(1)
    config = LoraConfig(r=3, ensure_weight_tying=True, init_lora_weights=False, **fields)
    return get_peft_model(base(), config).eval()


def changed_by_hand(model):
    """A base model whose embedding and head both have `W + s·(B·A)ᵀ`."""
    layer = model.base_model.model.model.embed_tokens
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    result = base()
    with torch.no_grad():
        result.model.embed_tokens.weight += layer.scaling["default"] * (B @ A).T
    return result


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_an_embedding_and_its_head_have_one_adapter(targets, tmp_path):
    model = made(target_modules=targets).double()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"embed_tokens"} and len(trained) == 2
    expected = changed_by_hand(model)
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, base()(IDS).logits)
    assert model.get_model_status().active_adapters == ["default"]
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.double()
    mixed = model(IDS, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed[:1], expected(IDS[:1]).logits)
    model.set_adapter("other")
    torch.testing.assert_close(mixed[1:], model(IDS[1:]).logits)
    model.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(base(), tmp_path).double()
    torch.testing.assert_close(again(IDS).logits, expected(IDS).logits, **CLOSE)
    again.load_adapter(tmp_path, "default")
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        converted = convert_to_lora(model, adapter_name="default")
    other = get_peft_model(base(), converted.config)
    set_peft_model_state_dict(other, converted.state_dict)
    torch.testing.assert_close(other(IDS).logits, expected(IDS).logits, **CLOSE)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(IDS).logits, expected(IDS).logits)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings and type(plain.lm_head) is nn.Linear


def test_gradients_of_a_tied_adapter_add_up():
    """As those of the two places where an equal pair of factors would be."""
    model = made(target_modules=["embed_tokens"]).double().train()
    layer = model.base_model.model.model.embed_tokens
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    model(IDS, labels=IDS).loss.backward()
    weight = base().model.embed_tokens.weight.detach()
    factors = [t.detach().clone().requires_grad_() for t in (A, B)]
    slow = base()
    replaced = weight + layer.scaling["default"] * (factors[1] @ factors[0]).T
    names = {"model.embed_tokens.weight": replaced, "lm_head.weight": replaced}
    torch.func.functional_call(slow, names, (), {"input_ids": IDS, "labels": IDS}).loss.backward()
    torch.testing.assert_close(A.grad, factors[0].grad)
    torch.testing.assert_close(B.grad, factors[1].grad)


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]])
def test_copies_of_tied_modules_are_tied(names, tmp_path):
    model = made(target_modules=["q_proj"], modules_to_save=names)
    inner = model.base_model.model
    copies = [
        module.modules_to_save["default"] for module in (inner.lm_head, inner.model.embed_tokens)
    ]
    assert copies[0].weight is copies[1].weight
    assert copies[0].weight is not inner.lm_head.original_module.weight
    with torch.no_grad():
        copies[0].weight.mul_(1.1)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} < {
        *state
    }
    again = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(again(IDS).logits, expected, **CLOSE)
    again.load_adapter(tmp_path, "default")
    plain = again.merge_and_unload()
    torch.testing.assert_close(plain(IDS).logits, expected, **CLOSE)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_rows_of_tied_modules_are_the_same(tmp_path):
    both = {"embed_tokens": [1, 4], "lm_head": [1, 4]}
    model = made(target_modules=["q_proj"], trainable_token_indices=both)
    rows = [name for name, p in model.named_parameters() if "trainable_tokens" in name]
    assert [name.split(".token_adapter")[0] for name in rows] == [
        "base_model.model.model.embed_tokens"
    ]
    before = snapshot(plain := base())
    config = LoraConfig(
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [1], "lm_head": [2]},
        ensure_weight_tying=True,
    )
    with pytest.raises(ValueError, match="`lm_head` and `model.embed_tokens` share a weight"):
        get_peft_model(plain, config)
    with pytest.raises(NotImplementedError, match="`use_dora` is not supported for `lm_head`"):
        get_peft_model(
            plain, LoraConfig(target_modules=["lm_head"], use_dora=True, ensure_weight_tying=True)
        )
    assert_unchanged(before, plain)


def test_embeddings_of_an_encoder_and_a_decoder():
    """All layers with the weight follow the first; a file without the followers' factors is read."""
    torch.manual_seed(0)
    model = t5()
    weight = model.shared.weight
    call = {"input_ids": IDS, "decoder_input_ids": IDS}
    tied = [m for m in model.modules() if getattr(m, "weight", None) is weight]
    config = LoraConfig(
        target_modules=["shared"], ensure_weight_tying=True, init_lora_weights=False
    )
    model = get_peft_model(model.double().eval(), config).double()
    layer = model.base_model.model.shared
    output = model(**call).logits
    delta = layer.get_delta_weight("default").detach()
    plain = model.unload()
    assert len(tied) > 1
    with torch.no_grad():
        plain.shared.weight += delta
    torch.testing.assert_close(output, plain(**call).logits)


def test_files_with_and_without_the_followers_factors(tmp_path):
    model = made(target_modules=["embed_tokens"])
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    own = {key for key in state if "lm_head.lora_" in key}
    assert len(own) == 2
    save_file({key: value for key, value in state.items() if key not in own}, file)
    again = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(again(IDS).logits, expected, **CLOSE)
