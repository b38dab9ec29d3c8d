# SPDX-License-Identifier: Apache-2.0
"""LoRA's config and files: the fields and keys that the interface has, and refusals of what is not
here.
"""

import dataclasses
import json
import warnings

import pytest
import torch
from helpers.models import llama
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    EvaConfig,
    LoraConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")

# The fields of Hugging Face PEFT 0.21.2 with their defaults, as its `adapter_config.json` has them.
FIELDS = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def test_the_fields_of_the_interface(tmp_path):
    config = LoraConfig()
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.pop("peft_version") == config.peft_version
    assert written == FIELDS
    assert {field.name for field in dataclasses.fields(LoraConfig)} == {
        *FIELDS,
        "peft_version",
        "runtime_config",
        "start",
    }
    assert config.runtime_config == LoraRuntimeConfig(ephemeral_gpu_offload=False)


def test_a_file_of_another_implementation_is_read_without_remark(tmp_path):
    fields = {
        **FIELDS,
        "target_modules": ["q_proj", "v_proj"],
        "r": 4,
        "rank_pattern": None,
        "peft_version": "0.21.2",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.rank_pattern, config.target_modules) == (4, {}, {"q_proj", "v_proj"})
    eva = {"rho": 2.0, "tau": 0.99}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**fields, "init_lora_weights": "eva", "eva_config": eva})
    )
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.init_lora_weights, config.eva_config) == ("eva", EvaConfig(rho=2.0, tau=0.99))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("megatron_config", {"a": 1}),
        ("use_qalora", True),
    ],
)
def test_features_that_are_not_provided(name, value):
    with pytest.raises(
        NotImplementedError,
        match=rf"LoraConfig: `{name}`=.* asks for what this package does not provide",
    ):
        LoraConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "`r`=0 must be an integer of at least 1"),
        ({"lora_alpha": "8"}, "`lora_alpha`='8' must be a finite number"),
        ({"lora_dropout": 1.0}, "`lora_dropout`=1.0 must be a probability"),
        ({"bias": "some"}, "`bias`='some' must be one of 'none', 'all', 'lora_only'"),
        (
            {"init_lora_weights": "mica"},
            "`init_lora_weights`='mica' must be one of .*'pissa'.*pissa_niter_<n>",
        ),
        ({"init_lora_weights": "pissa_niter_x"}, "`init_lora_weights`='pissa_niter_x'"),
        ({"init_lora_weights": "olora", "lora_alpha": 0}, "needs a positive `lora_alpha`"),
        ({"rank_pattern": {"q": 0}}, r"`rank_pattern\['q'\]`=0"),
        ({"alpha_pattern": {"q": "a"}}, r"`alpha_pattern\['q'\]`='a'"),
        (
            {"use_dora": True, "lora_bias": True},
            "lora_bias=True is not supported together with `use_dora`=True",
        ),
        (
            {"lora_bias": True, "init_lora_weights": "gaussian"},
            "lora_bias=True is for `init_lora_weights` True or False, found 'gaussian'",
        ),
        (
            {"target_modules": ".*q", "layers_to_transform": [0]},
            "`layers_to_transform` cannot be used when `target_modules` is a str",
        ),
        ({"layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
        ({"use_rslora": 1}, "`use_rslora`=1 must be True or False"),
    ],
)
def test_values_that_are_not_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


def every_kind():
    class Every(nn.Module):
        def __init__(self):
            from transformers.pytorch_utils import Conv1D

            super().__init__()
            self.linear, self.stored, self.table = (
                nn.Linear(6, 8),
                Conv1D(8, 6),
                nn.Embedding(10, 6),
            )
            self.one, self.two, self.three = (
                nn.Conv1d(4, 8, 3),
                nn.Conv2d(4, 8, 3, groups=2),
                nn.Conv3d(4, 8, 2),
            )

    return Every()


NAMES = ["linear", "stored", "table", "one", "two", "three"]
# What another implementation saves for rank 2: names and shapes.
FILE = {
    "linear.lora_A.weight": (2, 6),
    "linear.lora_B.weight": (8, 2),
    "stored.lora_A.weight": (2, 6),
    "stored.lora_B.weight": (8, 2),
    "table.lora_embedding_A": (2, 10),
    "table.lora_embedding_B": (6, 2),
    "one.lora_A.weight": (2, 4, 3),
    "one.lora_B.weight": (8, 2, 1),
    "two.lora_A.weight": (2, 4, 3, 3),
    "two.lora_B.weight": (8, 1, 1, 1),
    "three.lora_A.weight": (2, 4, 2, 2, 2),
    "three.lora_B.weight": (8, 2, 1, 1, 1),
}
LENGTHS = {
    "linear.lora_magnitude_vector": (8,),
    "stored.lora_magnitude_vector": (8,),
    "table.lora_magnitude_vector": (6,),
    "one.lora_magnitude_vector": (1, 8, 1),
    "two.lora_magnitude_vector": (1, 8, 1, 1),
    "three.lora_magnitude_vector": (1, 8, 1, 1, 1),
}


@pytest.mark.parametrize("dora", [False, True])
def test_the_keys_of_a_file(dora, tmp_path):
    config = LoraConfig(r=2, target_modules=NAMES, use_dora=dora)
    model = get_peft_model(every_kind(), config)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    expected = {
        f"base_model.model.{name}": shape
        for name, shape in {**FILE, **(LENGTHS if dora else {})}.items()
    }
    assert {name: tuple(tensor.shape) for name, tensor in file.items()} == expected
    save_file(
        {name: torch.randn(shape) for name, shape in expected.items()},
        tmp_path / "adapter_model.safetensors",
    )
    again = PeftModel.from_pretrained(every_kind(), tmp_path)
    values = load_file(tmp_path / "adapter_model.safetensors")
    assert all(
        torch.equal(tensor, values[name])
        for name, tensor in get_peft_model_state_dict(again).items()
    )


def test_biases_and_whole_modules(tmp_path):
    """A bias of an adapter's own, one of the base, and one of a copied module have keys of their
    own.
    """

    def fresh():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    config = LoraConfig(
        r=2, target_modules=["0"], modules_to_save=["2"], bias="all", lora_bias=True
    )
    model = get_peft_model(fresh(), config)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    trained = {
        name.removeprefix("base_model.model.")
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    lora = {"0.lora_A.default.weight", "0.lora_B.default.weight", "0.lora_B.default.bias"}
    assert trained == {
        *lora,
        "0.base_layer.bias",
        "1.bias",
        "2.modules_to_save.default.weight",
        "2.modules_to_save.default.bias",
    }
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    names = {
        name.removeprefix("base_model.model.")
        for name in load_file(tmp_path / "adapter_model.safetensors")
    }
    assert names == {
        name.replace(".default", "").replace(".modules_to_save", "") for name in trained
    }
    x = torch.randn(3, 4)
    assert torch.equal(PeftModel.from_pretrained(fresh(), tmp_path)(x), model(x))


def test_an_adapted_embedding_is_saved_with_its_weight(tmp_path):
    """Its vocabulary may have been extended before; other embeddings are left out."""
    for target, saved in (
        (["embed_tokens"], {"model.embed_tokens"}),
        (["embed_tokens", "lm_head"], {"model.embed_tokens", "lm_head"}),
    ):
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", *target]))
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.base_layer.weight.normal_()
        names = {
            name
            for name in get_peft_model_state_dict(model)
            if "base_layer" in name or name.endswith("lm_head.weight")
        }
        assert names == {f"base_model.model.{name}.base_layer.weight" for name in saved}
    assert not any(
        "base_layer" in name
        for name in get_peft_model_state_dict(model, save_embedding_layers=False)
    )


def test_transformers_own_interface(tmp_path):
    """Add, train, generate, save, load: DoRA's lengths find their place, and pissa takes its part
    off again.
    """
    ids = torch.randint(3, 48, (2, 5))
    for fields in (
        {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
        {"init_lora_weights": "pissa"},
    ):
        torch.manual_seed(2)
        base = llama()
        base.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            plain = base(ids).logits
        base.add_adapter(LoraConfig(r=2, lora_dropout=0.1, **fields), adapter_name="x")
        optimiser = torch.optim.Adam([p for p in base.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            base.train()(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        with torch.no_grad():
            trained = base.eval()(ids).logits
            assert not torch.allclose(trained, plain, atol=1e-2)
            base.save_pretrained(tmp_path / "adapter")
            loaded = type(base).from_pretrained(tmp_path / "base").eval()
            loaded.load_adapter(tmp_path / "adapter")
            torch.testing.assert_close(loaded(ids).logits, trained)
            made = base.generate(ids, max_new_tokens=3, do_sample=False)
            assert torch.equal(loaded.generate(ids, max_new_tokens=3, do_sample=False), made)
            base.disable_adapters()
            assert torch.equal(base(ids).logits, plain)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "olora"}])
@pytest.mark.parametrize("offloads", [True, False])
def test_starts_can_be_computed_on_the_accelerator(options, offloads, monkeypatch):
    from peft.tuners.lora import base, layer

    moved = []
    for module in (base, layer):
        monkeypatch.setattr(module, "on_accelerator", lambda t: moved.append(t.shape) or t.clone())
    for runtime in (LoraRuntimeConfig(offloads), {"ephemeral_gpu_offload": offloads}):
        torch.manual_seed(0)
        base_model = nn.Sequential(nn.Linear(6, 8))
        config = LoraConfig(r=2, target_modules=["0"], runtime_config=runtime, **options)
        model = get_peft_model(base_model, config)
        assert ((8, 6) in moved) == offloads
        x = torch.randn(3, 6)
        torch.testing.assert_close(model(x), base_model[0].base_layer(x))
    with pytest.raises(ValueError, match="`runtime_config.ephemeral_gpu_offload`='yes'"):
        LoraConfig(runtime_config=LoraRuntimeConfig("yes"))
    with pytest.raises(ValueError, match="must be a LoraRuntimeConfig"):
        LoraConfig(runtime_config={"other": True})
