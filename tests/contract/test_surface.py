# SPDX-License-Identifier: Apache-2.0
"""The interface's names: all can be imported, those that are provided have its signatures, the
others say that they are not.
"""

import copy
import importlib
import inspect
import itertools
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import llama, mlp
from torch import nn
from torch.distributed.fsdp.wrap import _or_policy

import peft
import peft.functional
import peft.import_utils
import peft.utils.hotswap
import peft.utils.other
import peft.utils.transformers_weight_conversion
from peft.base import other_places, placeholders
from peft.base.registry import PEFT_TYPE_TO_TUNER_MAPPING, registered_methods
from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES, check_adapters_to_merge, onload_layer


def words(text):
    return text.split()


# Every public name of `peft` in Hugging Face PEFT 0.21.2, and those of earlier releases that programs
# still import, config and model classes apart.
NAMES = words("""
    AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
    AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification CPTEmbedding CartridgeEncoder
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING MultitaskPromptTuningInit NoMatchingPeftModuleError PEFT_TYPE_TO_CONFIG_MAPPING
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PeftConfig PeftError PeftMixedModel PeftModel PeftModelForCausalLM
    PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification
    PeftModelForTokenClassification PeftType PeftWarning PrefixEncoder PromptEmbedding PromptEncoder
    PromptEncoderReparameterizationType PromptTuningInit TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TaskType
    bloom_model_postprocess_past_key_value cast_mixed_precision_params compose_cartridge_adapters convert_to_lora create_arrow_model
    find_kappa_target_modules get_base_model_state_dict get_eva_state_dict get_layer_status get_model_status get_peft_config
    get_peft_model get_peft_model_state_dict initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text
    initialize_lora_eva_weights inject_adapter_in_model load_peft_weights prepare_model_for_int8_training
    prepare_model_for_kbit_training preprocess_loraga
    prompt_embeddings_from_past_key_values replace_lora_weights_loftq save_as_lora set_base_model_state_dict
    set_peft_model_state_dict shift_tokens_right
""")
CLASSES = words("""
    AdaLora Adamss AdaptionPrompt BOFT Beft Bone C3A Deft Delora FourierFT Frod Glora Gralora HRA Hira IA3 LNTuning Lily LoHa LoKr Lora Miss
    OFT OSF Peanut Poly Psoft Pvera RandLora Road Shadow Shira Supertuning TinyLora TrainableTokens UniLora VBLoRA Vera WaveFT XLora
""")
CONFIGS = words("""
    Arrow BdLora CPT Cartridge Eva Kasa LoftQ LoraGA LoraRuntime Monteclora MultitaskPromptTuning PrefixTuning PromptEncoder
    PromptLearning PromptTuning Velora
""")

ALL = [
    *NAMES,
    *(f"{name}Config" for name in (*CLASSES, *CONFIGS)),
    *(f"{name}Model" for name in CLASSES),
]

SIGNATURES = {
    "peft.helpers": {
        "check_if_peft_model": "model_name_or_path",
        "disable_input_dtype_casting": "model, active=True",
        "rescale_adapter_scale": "model, multiplier",
        "update_forward_signature": "model",
        "update_generate_signature": "model",
        "update_signature": "model, method='all'",
    },
    "peft.functional": {
        "cast_adapter_dtype": "model, adapter_name, autocast_adapter_dtype=True",
        "delete_adapter": "model, adapter_name, prefix, layer_cls=BaseTunerLayer",
        "get_peft_model_state_dict": (
            "model, state_dict=None, adapter_name='default', unwrap_compiled=False, "
            "save_embedding_layers='auto'"
        ),
        "inject_adapter_in_model": "peft_config, model, adapter_name='default', low_cpu_mem_usage=False, state_dict=None",
        "set_adapter": "model, adapter_name, inference_mode=False, layer_cls=BaseTunerLayer",
        "set_peft_model_state_dict": (
            "model, peft_model_state_dict, adapter_name='default', ignore_mismatched_sizes=False, "
            "low_cpu_mem_usage=False"
        ),
        "set_requires_grad": "model, adapter_names, requires_grad=True",
    },
    "peft.utils.hotswap": {
        "check_hotswap_configs_compatible": "config0, config1",
        "hotswap_adapter": "model, model_name_or_path, adapter_name, torch_device=None, **kwargs",
        "hotswap_adapter_from_state_dict": "model, state_dict, adapter_name, config, parameter_prefix='lora_'",
        "prepare_model_for_compiled_hotswap": "model, *, target_rank=None, config=None, check_compiled='error'",
    },
    "peft.utils.transformers_weight_conversion": {
        "build_peft_weight_mapping": "weight_conversions, adapter_name, peft_config=None",
    },
    "peft.utils.other": {"fsdp_auto_wrap_policy": "model"},
    "peft.utils": {
        "cast_mixed_precision_params": "model, dtype",
        "id_tensor_storage": "tensor",
        "shift_tokens_right": "input_ids, pad_token_id, decoder_start_token_id",
        "transpose": "weight, fan_in_fan_out",
        "prepare_model_for_kbit_training": (
            "model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None, "
            "auto_clear_cache=True"
        ),
    },
    "peft": {
        "get_layer_status": "model",
        "get_model_status": "model",
        "get_peft_config": "config_dict",
        "get_peft_model": (
            "model, peft_config, adapter_name='default', mixed=False, autocast_adapter_dtype=True, "
            "revision=None, "
            "low_cpu_mem_usage=False"
        ),
        "get_base_model_state_dict": "model",
        "set_base_model_state_dict": "model, state_dict, strict=True",
    },
}


def written(function):
    """A signature without annotations."""
    parts = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = (
            p.default.__name__
            if isinstance(p.default, type) and p.default is not p.empty
            else repr(p.default)
        )
        stars = "**" if p.kind is p.VAR_KEYWORD else ""
        parts.append(stars + p.name + ("" if p.default is p.empty else f"={default}"))
    return ", ".join(parts)


@pytest.mark.parametrize("module", SIGNATURES)
def test_functions_are_called_as_the_interface_says(module):
    for name, expected in SIGNATURES[module].items():
        assert written(getattr(sys.modules[module], name)) == expected, name


def test_every_name_can_be_imported():
    for name in ALL:
        assert getattr(peft, name) is not None
    assert not placeholders._NAMES - set(ALL)
    assert not placeholders._NAMES & set(peft.__all__)


def test_what_is_not_provided_is_a_class_that_nothing_is_of():
    for name in sorted(placeholders._NAMES):
        marker = getattr(peft, name)
        assert marker is getattr(peft, name)
        assert not isinstance(peft.LoKrConfig(), marker)
        assert not issubclass(peft.PeftModel, marker)
        if name in placeholders._LORA_OPTIONS:
            with pytest.raises(
                NotImplementedError,
                match=rf"`kasa_config`={name}\(1, a=2\) asks for what this package does not",
            ):
                peft.LoraConfig(kasa_config=marker(1, a=2))
            continue
        with pytest.raises(
            NotImplementedError, match=f"{name} is not provided by this package; it provides .*LOKR"
        ):
            marker(1, a=2)
        assert not hasattr(marker, "TEXT")
        for use in (lambda marker=marker: marker.TEXT, lambda marker=marker: marker["bloom"]):
            with pytest.raises(NotImplementedError, match="not Hugging Face's. To go back"):
                use()
    with pytest.raises(AttributeError, match="module 'peft' has no attribute 'Nothing'"):
        _ = peft.Nothing


def test_the_version_tells_the_package_and_passes_the_gates_of_clients():
    from packaging.specifiers import SpecifierSet
    from packaging.version import parse

    version = parse(peft.__version__)
    assert version.local == "independent" and not version.is_prerelease
    assert version >= parse("0.21.0")  # transformers and TRL
    assert parse(version.base_version) >= parse("0.17.0")  # diffusers
    assert all(version in SpecifierSet(own) for own in (">=0.20.0", f"=={version.public}"))


ABSENT = """
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.lora import GPTQLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import get_layer_device_map
import peft
for name, marker in list(globals().items()):
    if isinstance(marker, type) and not name.startswith("_"):
        assert not isinstance(peft.LoraConfig(), marker) and not issubclass(peft.PeftModel, marker)
        try:
            marker()
        except NotImplementedError as error:
            assert f"{name} is not provided by this package" in str(error)
            continue
        raise AssertionError(name)
for absent in ("peft.tuners.nothing", "peft.tuners.adalora.layer.deeper", "peft.nothing"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise AssertionError(absent)
try:
    from peft.tuners.lora import Nothing
except ImportError:
    Nothing = None
assert Nothing is None
"""


def test_modules_that_are_not_provided_hold_such_classes():
    exec(ABSENT, {"__name__": "absent"})


def test_every_method_of_the_registry_is_no_marker():
    for name in registered_methods():
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(name)]
        assert tuner.__name__ in peft.__all__


# Documented paths: those of the interface's specification, and those that client libraries import.
PLACES = {
    "peft.auto": "AutoPeftModel, AutoPeftModelForCausalLM",
    "peft.config": "PeftConfig, PeftConfigMixin, PromptLearningConfig",
    "peft.functional": "delete_adapter, inject_adapter_in_model, set_adapter",
    "peft.helpers": "disable_input_dtype_casting, rescale_adapter_scale",
    "peft.import_utils": "is_bnb_available, is_quanto_available, is_xpu_available",
    "peft.mapping": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, get_peft_config, "
        "get_peft_model, inject_adapter_in_model"
    ),
    "peft.mapping_func": "get_peft_model",
    "peft.mixed_model": "PeftMixedModel",
    "peft.optimizers": "create_loraplus_optimizer",
    "peft.peft_model": (
        "PeftModel, PeftModelForCausalLM, get_layer_status, get_model_status, TunerLayerStatus, TunerModelStatus, "
        "PeftType, get_peft_model_state_dict, set_peft_model_state_dict, shift_tokens_right, WEIGHTS_NAME"
    ),
    "peft.tuners": "LoKrConfig, LoKrModel, PolyConfig, PolyModel, VBLoRAConfig, VBLoRAModel",
    "peft.tuners.loha": "LoHaConfig, LoHaLayer, LoHaModel",
    "peft.tuners.loha.config": "LoHaConfig",
    "peft.tuners.loha.layer": "LoHaLayer, Linear, Conv2d",
    "peft.tuners.loha.model": "LoHaModel",
    "peft.tuners.lokr": "LoKrConfig, LoKrLayer, LoKrModel, Linear, Conv2d",
    "peft.tuners.lokr.config": "LoKrConfig",
    "peft.tuners.lokr.layer": "LoKrLayer, Linear, Conv2d, factorization",
    "peft.tuners.lokr.model": "LoKrModel",
    "peft.tuners.lora": "LoraConfig, LoraLayer, LoraModel, Linear",
    "peft.tuners.lora.config": "LoraConfig",
    "peft.tuners.lora.layer": (
        "LoraLayer, Linear, BaseTunerLayer, check_adapters_to_merge, transpose"
    ),
    "peft.tuners.lora.model": (
        "LoraModel, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, onload_layer, ties"
    ),
    "peft.tuners.lycoris_utils": "LycorisConfig, LycorisLayer, LycorisTuner",
    "peft.tuners.mixed": "COMPATIBLE_TUNER_TYPES, MixedModel",
    "peft.tuners.poly": "PolyConfig, PolyLayer, PolyModel, Linear",
    "peft.tuners.poly.config": "PolyConfig",
    "peft.tuners.poly.layer": "PolyLayer, Linear",
    "peft.tuners.poly.model": "PolyModel",
    "peft.tuners.poly.router": "Router",
    "peft.tuners.tuners_utils": (
        "BaseTunerLayer, BaseTuner, check_target_module_exists, inspect_matched_modules, "
        "BufferDict, DUMMY_TARGET_MODULES, ModulesToSaveWrapper, PeftConfig, check_adapters_to_merge, "
        "delete_adapter, onload_layer, set_adapter"
    ),
    "peft.tuners.vblora": "VBLoRAConfig, VBLoRALayer, VBLoRAModel, Linear",
    "peft.tuners.vblora.config": "VBLoRAConfig",
    "peft.tuners.vblora.layer": "VBLoRALayer, Linear",
    "peft.tuners.vblora.model": "VBLoRAModel",
    "peft.utils": (
        "CONFIG_NAME, ModulesToSaveWrapper, PeftConfig, PeftType, PromptLearningConfig, TaskType, "
        "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING, TrainableTokensWrapper, "
        "_freeze_adapter, _get_submodules, get_quantization_config, "
        "get_peft_model_state_dict, infer_device, load_peft_weights, register_peft_method, "
        "set_peft_model_state_dict"
    ),
    "peft.utils.constants": (
        "CONFIG_NAME, DUMMY_MODEL_CONFIG, DUMMY_TARGET_MODULES, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME"
    ),
    "peft.utils.hotswap": (
        "check_hotswap_configs_compatible, hotswap_adapter, hotswap_adapter_from_state_dict, "
        "prepare_model_for_compiled_hotswap"
    ),
    "peft.utils.merge_utils": "dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties",
    "peft.utils.other": (
        "AuxiliaryTrainingWrapper, ModulesToSaveWrapper, fsdp_auto_wrap_policy, get_pattern_key, "
        "get_quantization_config, transpose"
    ),
    "peft.utils.peft_types": "PeftType, TaskType, register_peft_method",
    "peft.utils.save_and_load": (
        "get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict"
    ),
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping",
    "peft.utils.warning": "PeftWarning",
}


@pytest.mark.parametrize("path", PLACES)
def test_documented_paths_hold_their_names(path):
    module = importlib.import_module(path)
    for name in PLACES[path].split(", "):
        assert getattr(module, name) is not None


def test_names_at_further_places_are_those_of_their_home():
    for module, homes in other_places._PLACES.items():
        for home, names in homes.items():
            for name, _, own in (place.partition(":") for place in names.split()):
                found = getattr(importlib.import_module(module), name)
                assert found is getattr(importlib.import_module(home), own or name), (module, name)
                doc = getattr(found, "__doc__", None)
                assert doc != "Not provided by this package.", (module, name)
    with pytest.raises(AttributeError, match="Did you mean 'get_peft_config'"):
        _ = peft.mapping.get_peft_conf


PICKLED = {
    "peft.tuners.tuners_utils": "AdapterModuleDict, AdapterParameterDict, BaseTunerLayer",
    "peft.utils.other": "AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper",
    "peft.utils.peft_types": "PeftType, TaskType",
}


@pytest.mark.parametrize("path", PICKLED)
def test_pickles_name_classes_at_their_documented_path(path):
    for name in PICKLED[path].split(", "):
        cls = getattr(importlib.import_module(path), name)
        assert (cls.__module__, cls.__qualname__) == (path, name)


def test_layer_classes_tell_what_their_parameters_are_called():
    from peft.tuners.loha.layer import LoHaLayer
    from peft.tuners.lora import LoraLayer

    assert LoHaLayer.adapter_layer_names == (
        "hada_w1_a",
        "hada_w1_b",
        "hada_w2_a",
        "hada_w2_b",
        "hada_t1",
        "hada_t2",
    )
    assert {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"} <= set(
        LoraLayer.adapter_layer_names
    )


LIBRARIES = {
    "bnb": "bitsandbytes",
    "torchao": "torchao",
    "gptqmodel": "gptqmodel",
    "optimum": "optimum",
    "aqlm": "aqlm",
    "eetq": "eetq",
    "hqq": "hqq",
    "inc": "neural_compressor",
    "te": "transformer_engine",
    "diffusers": "diffusers",
}


@pytest.fixture
def installed(monkeypatch):
    """Installed libraries, by version, in place of those that are: what is not in here is not
    there.
    """
    utils, libraries = peft.import_utils, {}
    monkeypatch.setattr(utils, "find_spec", lambda name: object() if name in libraries else None)

    def version(name):
        if name not in libraries:
            raise PackageNotFoundError(name)
        return libraries[name]

    monkeypatch.setattr(utils, "version", version)
    for cached in (utils._is_installed, utils._version):
        monkeypatch.setattr(utils, cached.__name__, cached.__wrapped__)
    return libraries


def test_installed_libraries_are_found_and_missing_ones_not(installed):
    utils = peft.import_utils
    found = {name: getattr(utils, f"is_{name}_available") for name in LIBRARIES}
    for name, library in LIBRARIES.items():
        assert not found[name]()
        installed[library] = "1.0"
        assert found[name]()
    assert all(asked() for asked in found.values())
    assert not utils.is_te_pytorch_available()
    installed["transformer_engine.pytorch"] = "1.0"
    assert utils.is_te_pytorch_available()
    for version, new in (("0.17.9", False), ("0.18.0", True), ("0.20", True)):
        installed["torchao"] = version
        assert utils.is_torchao_ge_v0_18_0() == new
    for version, new in (("0.38.1", False), ("0.39", True)):
        installed["bitsandbytes"] = version
        assert utils.is_bnb_4bit_available() == new


def test_versions_of_transformers_are_compared(installed):
    utils = peft.import_utils
    assert (
        not utils.is_transformers_ge_v4_0_0 and not utils.is_transformers_le_5_0
    )  # it is not installed
    installed["transformers"] = "4.53.2"
    assert (
        utils.is_transformers_ge_v4_53_2
        and utils.is_transformers_ge_v4
        and not utils.is_transformers_ge_v4_53_3
    )
    assert utils.is_transformers_le_4_54 and not utils.is_transformers_le_4_53
    with pytest.raises(AttributeError, match="has no attribute 'is_nothing'"):
        _ = utils.is_nothing


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_tables_of_target_modules_count(method, monkeypatch):
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(method)]
    table = getattr(peft.utils, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")
    assert table["llama"] == ["q_proj", "v_proj"]
    assert table is tuner.default_target_modules
    monkeypatch.setitem(table, "llama", ["o_proj"])
    model = peft.get_peft_model(llama(), METHODS[method].config(task_type="CAUSAL_LM"))
    assert {status.name.rpartition(".")[2] for status in model.get_layer_status()} == {"o_proj"}
    others = [
        PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(other)] for other in METHODS if other != method
    ]
    assert all(
        list(other.default_target_modules["llama"]) == ["q_proj", "v_proj"] for other in others
    )
    adalora = importlib.import_module("peft.tuners.adalora.model")  # not here
    table = adalora.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
    assert table == {}
    assert table is peft.utils.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
    with pytest.raises(AttributeError):
        _ = peft.utils.TRANSFORMERS_MODELS_TO_NOTHING_TARGET_MODULES_MAPPING


def test_tokens_are_shifted():
    labels = torch.tensor([[5, -100, 7], [1, 2, 3]])
    assert peft.shift_tokens_right(labels, 0, 9).tolist() == [[9, 5, 0], [9, 1, 2]]
    assert labels.tolist() == [[5, -100, 7], [1, 2, 3]]
    with pytest.raises(ValueError, match="`pad_token_id` has to be defined"):
        peft.shift_tokens_right(labels, None, 9)


def test_weights_are_transposed():
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    assert peft.utils.transpose(weight, False) is weight
    turned = peft.utils.transpose(weight, True)
    assert isinstance(turned, nn.Parameter)
    assert torch.equal(turned, weight.T)
    assert not isinstance(peft.utils.transpose(weight.data, True), nn.Parameter)


def test_tensors_that_share_memory_are_known():
    weight = torch.zeros(4, 4)
    identify = peft.utils.id_tensor_storage
    assert identify(weight) == identify(weight[1:]) == identify(weight.T)
    assert identify(weight) != identify(weight.clone())


def test_trainable_parameters_are_cast_up_and_frozen_ones_down(method):
    model = peft.get_peft_model(
        mlp(), method.config(target_modules=["0"]), autocast_adapter_dtype=False
    ).bfloat16()
    peft.cast_mixed_precision_params(model, torch.float16)
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.float16)


def wrapped(policy, model):
    return {
        name
        for name, module in model.named_modules()
        if policy(module=module, recurse=False, nonwrapped_numel=0)
    }


@pytest.fixture
def sharded(monkeypatch):
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    return peft.get_peft_model(
        llama(),
        METHODS["LOKR"].config(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )


def test_blocks_and_trainable_leaves_are_wrapped(sharded, monkeypatch):
    policy = peft.utils.other.fsdp_auto_wrap_policy(sharded)
    assert policy.func is _or_policy
    assert policy(module=sharded, recurse=True, nonwrapped_numel=0)
    blocks = {f"base_model.model.model.layers.{i}" for i in range(2)}
    head = "base_model.model.lm_head.modules_to_save.default"
    assert wrapped(policy, sharded) == {*blocks, head}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,LlamaAttention")
    policy = peft.utils.other.fsdp_auto_wrap_policy(sharded)
    parts = {f"{block}.{part}" for block, part in itertools.product(blocks, ("mlp", "self_attn"))}
    assert wrapped(policy, sharded) == {*parts, head}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,Nothing")
    with pytest.raises(
        TypeError, match="Could not find the transformer layer class to wrap in the model: Nothing"
    ):
        peft.utils.other.fsdp_auto_wrap_policy(sharded)


def test_factors_that_are_leaves_are_wrapped_by_themselves():
    model = peft.get_peft_model(mlp(), METHODS["LORA"].config(target_modules=["0"]))
    found = wrapped(peft.utils.other.fsdp_auto_wrap_policy(model), model)
    assert found == {f"base_model.model.0.lora_{part}.default" for part in "AB"}


def test_functions_for_single_layers(method):
    model = peft.get_peft_model(mlp(), method.config(target_modules=["0", "2"]), "a")
    model.add_adapter("b", method.config(target_modules=["0"]))
    model.set_adapter("a")
    layer = model.base_model.model[0]
    layer.merge(**method.merge)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        assert check_adapters_to_merge(layer) == []
    with pytest.warns(UserWarning, match="were merged a. You are now additionally merging b"):
        assert check_adapters_to_merge(layer, ["a", "b"]) == ["b"]
    with pytest.raises(TypeError, match="should be a list of strings"):
        check_adapters_to_merge(layer, "a")
    layer.unmerge()
    assert check_adapters_to_merge(layer) == ["a"]
    peft.utils._freeze_adapter(model, "a")
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("cls", [nn.Linear, nn.Embedding])
def test_a_layer_is_loaded_where_it_is_offloaded(cls):
    accelerate = pytest.importorskip("accelerate")
    module = cls(4, 3)
    expected = module.weight.detach().clone()
    accelerate.cpu_offload(module, torch.device("cpu"))
    assert module.weight.is_meta
    with onload_layer(module):
        assert torch.equal(module.weight, expected)
        module.weight.data.mul_(2)
        module.weight = nn.Parameter(expected * 3)
    assert module.weight.is_meta
    with onload_layer(module):
        assert torch.equal(module.weight, expected * 3)


def test_what_a_transformers_model_says_of_itself():
    model = llama()
    assert peft.utils.get_quantization_config(model, "gptq") is None
    model.quantization_method, model.config.quantization_config = "gptq", {"bits": 4}
    assert peft.utils.get_quantization_config(model, "gptq") == {"bits": 4}
    assert peft.utils.get_quantization_config(model, "awq") is None
    inside = nn.ModuleDict({"language": llama(), "head": nn.Linear(2, 2)})
    assert peft.utils.other._get_no_split_modules(inside) == {"LlamaDecoderLayer"}
    with pytest.warns(FutureWarning, match="use `prepare_model_for_kbit_training`"):
        prepared = peft.prepare_model_for_int8_training(llama().half())
    assert {parameter.dtype for parameter in prepared.parameters()} == {torch.float32}
    assert not prepared.is_gradient_checkpointing  # it is not quantized
    model = peft.prepare_model_for_kbit_training(model.half())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.is_gradient_checkpointing
    model.quantization_method = "awq"
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_targets_that_match_nothing_on_purpose(method, tmp_path):
    """Only a head is trained; the adapter can be saved and loaded as others can."""
    config = method.config(target_modules=DUMMY_TARGET_MODULES, modules_to_save=["4"])
    base = mlp()
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.partition(".modules_to_save")[0] for name in trained} <= {
        "base_model.model.4", "base_model.vblora_vector_bank.default"
    }  # fmt: skip
    with torch.no_grad():
        model.base_model.model[4].modules_to_save["default"].weight.normal_()
    x = torch.randn(3, 8)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
