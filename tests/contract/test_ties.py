# SPDX-License-Identifier: Apache-2.0
"""Tied weights that come apart: a merged model that is saved and loaded by transformers computes
what it did.
"""

import json

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama, t5
from safetensors.torch import load_file, save_file

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

pytestmark = pytest.mark.filterwarnings("ignore:`.*` shares a weight")


def tied_llama():
    base = llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return base


def bert():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 48,
    }
    return BertForMaskedLM(BertConfig(**sizes)).eval()


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in (("layers", 1), ("attention_heads", 2))
    }
    sizes |= {
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "d_model": 16,
        "vocab_size": 48,
        "max_position_embeddings": 32,
    }
    return BartForConditionalGeneration(BartConfig(**sizes)).eval()


def umt5():
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 48,
    }
    return UMT5ForConditionalGeneration(
        UMT5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True)
    ).eval()


CASES = {
    "head": (tied_llama, "lm_head", "q_proj"),
    "embedding": (tied_llama, "embed_tokens", "q_proj"),
    "masked head": (bert, "decoder", "query"),
    "bart head": (bart, "lm_head", "q_proj"),
    "t5 head": (t5, "lm_head", "q"),
    "umt5 head": (umt5, "lm_head", "q"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["modules_to_save", "target_modules"])
@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_is_read_as_it_was(case, how, tmp_path):
    build, place, target = CASES[case]
    method = METHODS["LORA"]
    base = build()
    ids = torch.arange(3, 9).view(1, -1)
    more = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
    fields = (
        {"target_modules": [target], "modules_to_save": [place]}
        if how == "modules_to_save"
        else {"target_modules": [place]}
    )
    if case == "masked head" and how == "target_modules":
        fields = {"target_modules": r".*predictions\.decoder"}
    elif case == "masked head":
        fields["target_modules"] = r".*query"
    model = get_peft_model(base, method.config(**fields)).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = model(ids, **more).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids, **more).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids, **more).logits, expected, atol=1e-4, rtol=1e-4)
    if case in ("head", "embedding", "masked head", "bart head"):
        assert merged.config.tie_word_embeddings is False
        assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.filterwarnings("ignore")
def test_what_is_unloaded_or_trains_nothing_tied_stays_tied():
    base = tied_llama()
    model = get_peft_model(
        base, METHODS["LORA"].config(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    plain = model.unload()
    assert plain.config.tie_word_embeddings is True
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    plain = get_peft_model(
        plain, METHODS["LORA"].config(target_modules=["q_proj"])
    ).merge_and_unload()
    assert plain.config.tie_word_embeddings is True
    assert plain.lm_head.weight is plain.get_input_embeddings().weight


@pytest.mark.parametrize("saved", [None, ["embed_tokens"]])
@pytest.mark.parametrize("load", ["from_pretrained", "load_adapter", "state_dict"])
def test_a_file_that_has_a_tied_weight_under_all_its_names(saved, load, tmp_path):
    """Other writers save the head with the embedding that it shares a weight with, and a module
    that is trained whole under the names of its parts too.
    """
    config = LoraConfig(
        init_lora_weights=False, target_modules=["q_proj"], modules_to_save=saved, r=2
    )
    torch.manual_seed(0)
    state, ids = tied_llama().state_dict(), torch.arange(3, 9)[None]

    def fresh():
        base = tied_llama()
        base.load_state_dict(state)
        return base.eval()

    model = get_peft_model(fresh(), config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    table = "base_model.model.model.embed_tokens"
    head = model.get_base_model().lm_head.weight.detach().clone()
    tensors["base_model.model.lm_head.weight"] = head
    if saved:
        tensors[f"{table}.modules_to_save.weight"] = tensors[f"{table}.weight"].clone()
        tensors[f"{table}.original_module.weight"] = head.clone()
    save_file(tensors, path)

    def loaded():
        if load == "from_pretrained":
            return PeftModel.from_pretrained(fresh(), tmp_path).eval()
        other = get_peft_model(fresh(), config).eval()
        if load == "load_adapter":
            result = other.load_adapter(tmp_path, "default")
        else:
            result = set_peft_model_state_dict(other, load_file(path))
        assert result.unexpected_keys == []
        return other.eval()

    torch.testing.assert_close(loaded()(input_ids=ids).logits, expected)
    if saved is None:
        tensors["base_model.model.lm_head.weight"] += 1
        save_file(tensors, path)
        with pytest.raises(RuntimeError, match="are one tied weight in the model, and differ"):
            loaded()
