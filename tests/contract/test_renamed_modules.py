# SPDX-License-Identifier: Apache-2.0
"""Adapters written when modules of transformers' models had other names: all ways to load them find
the modules of today.

Each case says by hand what a module was called. The file is one of today with those names put in,
as the earlier version wrote it.
"""

import copy
import json
import re
import sys

import pytest
import torch
from helpers.methods import METHODS
from helpers.states import assert_unchanged, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.checkpoint.renamed_modules import ModuleNames, names_in_files, rules_of
from peft.utils.hotswap import hotswap_adapter

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 48,
}
IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IDS = torch.tensor([[1, 2, 3]])


def llava():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = LlamaConfig(**TEXT, num_key_value_heads=2)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**IMAGE), image_token_index=5)
    )


def qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        **TEXT,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {"embed_dim": 16, "hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


def clip_text():
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**TEXT, eos_token_id=47))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**IMAGE))


def inside():
    """A transformers model in one that is none."""
    model = nn.Module()
    model.encoder = llava()
    model.forward = lambda **inputs: model.encoder(**inputs)
    return model


LLAVA = [
    (r"^(encoder\.|)model\.language_model\.", r"\1language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
    (r"^(encoder\.|)model\.vision_tower\.", r"\1vision_tower.vision_model."),
    (r"^(encoder\.|)model\.multi_modal", r"\1multi_modal"),
]
VIT = [
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (
        r"attention\.(q_proj|v_proj)",
        lambda m: "attention.attention." + {"q_proj": "query", "v_proj": "value"}[m[1]],
    ),
    (r"attention\.o_proj", "attention.output.dense"),
]
# Model, its inputs, what modules were called, a config of today, and the same in the words of then.
CASES = {
    "names": (llava, {"input_ids": IDS}, LLAVA, {"target_modules": ["q_proj", "linear_1"]}, {}),
    "a regular expression": (
        llava,
        {"input_ids": IDS},
        LLAVA,
        {
            "target_modules": r"model\.language_model.*(q_proj|up_proj)",
            "rank_pattern": {r"model.*\.1\..*": 3},
        },
        {
            "target_modules": r"language_model\.model.*(q_proj|up_proj)",
            "rank_pattern": {r"language_model.*\.1\..*": 3},
        },
    ),
    "paths, patterns and a whole module": (
        llava,
        {"input_ids": IDS, "pixel_values": None},
        LLAVA,
        {
            "target_modules": [
                "model.language_model.layers.0.self_attn.q_proj",
                "model.vision_tower.encoder.layers.0.mlp.fc1",
            ],
            "rank_pattern": {"^model.vision_tower": 3},
            "alpha_pattern": {"model.language_model.layers.0.self_attn.q_proj": 5},
            "modules_to_save": ["lm_head", "model.multi_modal_projector"],
        },
        {
            "target_modules": [
                "language_model.model.layers.0.self_attn.q_proj",
                "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
            ],
            "rank_pattern": {"^vision_tower.vision_model.encoder.layers.0.mlp.fc1": 3},
            "alpha_pattern": {"language_model.model.layers.0.self_attn.q_proj": 5},
            "modules_to_save": ["language_model.lm_head", "multi_modal_projector"],
        },
    ),
    "a whole module by the end of a name": (
        llava,
        {"input_ids": IDS},
        LLAVA,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["model.lm_head"]},  # of language_model.lm_head
    ),
    "rows of an embedding": (
        qwen2_vl,
        {"input_ids": IDS},
        [(r"^model\.language_model\.", "model."), (r"^model\.visual", "visual")],
        {
            "target_modules": ["q_proj", "qkv"],
            "trainable_token_indices": {"model.language_model.embed_tokens": [1, 2]},
        },
        {"trainable_token_indices": {"model.embed_tokens": [1, 2]}},
    ),
    "a text tower": (
        clip_text,
        {"input_ids": IDS},
        [(r"^", "text_model.")],
        {"target_modules": ["q_proj", "fc1"]},
        {},
    ),
    "last names": (
        vit,
        {"pixel_values": torch.linspace(-1, 1, 192).view(1, 3, 8, 8)},
        VIT,
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "modules_to_save": ["classifier"]},
        {"target_modules": ["query", "value", "attention.output.dense"]},
    ),
    "inside another model": (
        inside,
        {"input_ids": IDS},
        LLAVA,
        {"target_modules": r"encoder\.model\.language_model.*q_proj"},
        {"target_modules": r"encoder\.language_model.*q_proj"},
    ),
}


def fresh(make):
    torch.manual_seed(0)
    return make().eval()


def output(model, inputs):
    return model(**inputs)[0].detach()


def as_it_was(folder, renamings, fields):
    """Put the names of then into a file of today."""

    def old(key):
        root, path = "base_model.model.", key.removeprefix("base_model.model.")
        for pattern, replacement in renamings if key.startswith(root) else ():
            path = re.sub(pattern, replacement, path)
        return root + path if key.startswith(root) else key

    file = folder / "adapter_model.safetensors"
    state = {old(key): tensor for key, tensor in load_file(file).items()}
    save_file(state, file)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    return state


@pytest.mark.parametrize("case", CASES)
def test_all_ways_to_load_an_adapter(case, tmp_path):
    make, inputs, renamings, today, then = CASES[case]
    writer = get_peft_model(fresh(make), LoraConfig(r=2, init_lora_weights=False, **today)).eval()
    with torch.no_grad():
        for name, p in writer.named_parameters():
            if p.requires_grad and "lora_" not in name:
                p.add_(0.1)
    writer.save_pretrained(tmp_path)
    expected, names = output(writer, inputs), set(load_file(tmp_path / "adapter_model.safetensors"))
    assert not names & set(as_it_was(tmp_path, renamings, then)) or case == "last names"

    model = PeftModel.from_pretrained(fresh(make), tmp_path)
    torch.testing.assert_close(output(model, inputs), expected)
    model.save_pretrained(tmp_path / "again")  # under the names that the modules have
    assert set(load_file(tmp_path / "again" / "adapter_model.safetensors")) == names
    torch.testing.assert_close(
        output(PeftModel.from_pretrained(fresh(make), tmp_path / "again"), inputs), expected
    )

    model = get_peft_model(fresh(make), LoraConfig(target_modules=["k_proj"]), "other").eval()
    model.load_adapter(tmp_path, "old")
    model.set_adapter("old")
    torch.testing.assert_close(output(model, inputs), expected)
    for load in (
        lambda: model.load_adapter(tmp_path, "old"),
        lambda: hotswap_adapter(model, tmp_path, "old"),
    ):
        with torch.no_grad():
            [p.zero_() for name, p in model.named_parameters() if "lora_B.old" in name]
        load()
        torch.testing.assert_close(output(model, inputs), expected)

    model = get_peft_model(fresh(make), PeftConfig.from_pretrained(tmp_path)).eval()
    assert set_peft_model_state_dict(model, load_peft_weights(tmp_path)) == ([], [])
    torch.testing.assert_close(output(model, inputs), expected)
    plain, state = fresh(make), load_peft_weights(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    inject_adapter_in_model(config, plain, state_dict=state)
    assert set_peft_model_state_dict(plain, state) == ([], [])
    torch.testing.assert_close(output(plain, inputs), expected)
    if case != "inside another model":
        plain = fresh(make)
        plain.load_adapter(str(tmp_path))  # by transformers
        torch.testing.assert_close(output(plain, inputs), expected)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "LORA"])
def test_all_methods(method, tmp_path):
    method = METHODS[method]
    config = method.config(target_modules=r"model\.language_model.*(q_proj|o_proj)")
    writer = get_peft_model(fresh(llava), config).eval()
    writer.save_pretrained(tmp_path)
    as_it_was(tmp_path, LLAVA, {"target_modules": r"language_model\.model.*(q_proj|o_proj)"})
    model = PeftModel.from_pretrained(fresh(llava), tmp_path)
    inputs = {"input_ids": IDS, **method.call}
    torch.testing.assert_close(output(model, inputs), output(writer, inputs))


def test_experts_that_are_one_tensor_now(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    def make():
        return MixtralForCausalLM(MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=2))

    get_peft_model(
        fresh(make), LoKrConfig(r=2, target_modules=["q_proj", "o_proj"])
    ).save_pretrained(tmp_path)
    expert = (r"self_attn.o_proj", "block_sparse_moe.experts.0.w1")
    as_it_was(tmp_path, [expert], {"target_modules": ["q_proj", "w1"]})
    model = get_peft_model(fresh(make), LoKrConfig(r=2, target_modules=["q_proj", "o_proj"]))
    base = fresh(make)
    before = snapshot(model)
    for load in (
        lambda: PeftModel.from_pretrained(base, tmp_path),
        lambda: model.load_adapter(tmp_path, "new"),
        lambda: set_peft_model_state_dict(model, load_peft_weights(tmp_path)),
        lambda: hotswap_adapter(model, tmp_path, "default"),
    ):
        with pytest.raises(
            RuntimeError,
            match=r"`model.layers.0.block_sparse_moe.experts.0.w1` is a part of .*gate_up_proj.*can't be used",
        ):
            load()
    assert_unchanged(before, model)
    assert list(model.peft_config) == ["default"]
    assert not any("lokr" in name for name, _ in base.named_modules())


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 8)


def tower(inner):
    """A text encoder as it was in earlier versions, with a module around its parts, or as it is."""
    model, parts = nn.Module(), nn.Module()
    parts.encoder = nn.ModuleList([Layer()])
    if inner:
        model.text_model = parts
    holder = model if inner else parts
    holder.forward = lambda x: parts.encoder[0].fc1(x)
    return holder


@pytest.mark.parametrize("inner", [False, True])
def test_a_tower_of_another_version(inner, tmp_path):
    """Whichever of the two wrote the file, the other reads it."""
    writer = get_peft_model(
        fresh(lambda: tower(inner)),
        LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False),
    )
    writer.save_pretrained(tmp_path)
    reader = PeftModel.from_pretrained(fresh(lambda: tower(not inner)), tmp_path)
    x = torch.randn(2, 8)
    torch.testing.assert_close(reader(x), writer(x))
    both = nn.ModuleDict(
        {"text_model": copy.deepcopy(tower(False)), "vision_model": copy.deepcopy(tower(False))}
    )
    if not inner:  # it can mean either of two
        with pytest.raises(RuntimeError, match="does not hold this adapter's weights"):
            PeftModel.from_pretrained(both, tmp_path)


def test_a_config_of_today_is_left_alone():
    """Names that mean nothing are an error in a config that is no file's."""
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(fresh(vit), LoraConfig(target_modules=["query"]))
    model = fresh(vit)
    config = LoraConfig(target_modules=["q_proj"])
    inject_adapter_in_model(config, model)
    assert config.target_modules == {"q_proj"}


def test_rules_are_those_of_the_outermost_models(monkeypatch):
    model = nn.ModuleDict({"a": clip_text(), "b": llava(), "c": nn.ModuleDict({"d": vit()})})
    rules = list(rules_of(model))
    assert [rule.root for rule in rules] == ["a.", "b.", "c.d."]
    (alone,) = rules_of(
        get_peft_model(llava(), LoraConfig(target_modules=["q_proj"])).base_model.model
    )
    assert alone.root == "" and alone.prefix == rules[1].prefix == "model"
    assert alone.names == rules[1].names
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert name in alone.names and "model.language_model.weight" not in alone.names
    assert list(rules_of(tower(True))) == []
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)  # of version 4
    assert list(rules_of(model)) == []


def test_former_names_of_modules():
    """By hand; files of other programs have those of encoders that lost a part of their path."""
    today = "model.language_model.layers.1.self_attn.q_proj"
    for root in ("", "encoder."):
        names = ModuleNames(inside() if root else llava())
        before = names.before()
        assert before[root + today] == f"{root}language_model.model.layers.1.self_attn.q_proj"
        assert names.now(before[root + today]) == names.now(root + today) == root + today
        assert names.now("model.none") is None
    text = clip_text()
    paths = [path for path, module in text.named_modules() if path and module._parameters]
    found = names_in_files(text)
    assert {path: found[path] for path in paths} == {path: f"text_model.{path}" for path in paths}
    assert names_in_files(llava()) == {}


def test_a_name_of_before_that_chose_nothing_chooses_nothing_when_it_is_loaded(tmp_path):
    """A new adapter may name modules by what an earlier version called them, as old examples do:
    they match nothing, and its file has nothing for them.
    """
    from transformers import ViTConfig, ViTModel

    def made():
        torch.manual_seed(0)
        return ViTModel(ViTConfig(**IMAGE, num_channels=1)).eval()

    config = LoraConfig(r=2, target_modules=["query", "fc1"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="no such module; it adapts 'fc1' only"):
        model = get_peft_model(made(), config).eval()
    assert all("fc1" in path for path in model.targeted_module_names)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(made(), tmp_path)
    pixels = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(
        loaded(pixels).last_hidden_state, model(pixels).last_hidden_state, rtol=0, atol=1e-6
    )
    assert loaded.targeted_module_names == model.targeted_module_names
