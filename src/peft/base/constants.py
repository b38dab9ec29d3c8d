# SPDX-License-Identifier: Apache-2.0
"""Names that stand for something: task heads, and the layers adapted by default in known
architectures.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from .placeholders import placeholder
from .registry import PEFT_TYPE_TO_TUNER_MAPPING

# Files of a saved adapter.
CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"

# Layers that hold tokens: saved too where `save_embedding_layers` says so.
EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")
# What `target_modules` says to mean all linear layers but the output head.
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"

# Heads a task class trains beside the adapter, since they start at random.
SEQ_CLS_HEAD_NAMES = ("classifier", "score")
QA_HEAD_NAMES = ("qa_outputs",)
# Output heads that "all-linear" leaves alone, beside what the model's own `get_output_embeddings()`
# gives.
OUTPUT_HEAD_NAMES = ("lm_head", "score", "classifier", "qa_outputs")

# What `BaseTuner.get_model_config` says of a model without a config.
DUMMY_MODEL_CONFIG = {"model_type": "custom"}

_QV_PROJ = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")

# model_type -> target modules, where a config names none: the query and value projections, as in
# the LoRA paper (arXiv:2106.09685, section 4.2), or the fused projection that holds them.
DEFAULT_TARGET_MODULES: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(
        (
            "bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama", "llama4", "mistral", "mixtral", "opt", "qwen2",
            "qwen3", "stablelm",
        ),
        _QV_PROJ,
    ),
    **dict.fromkeys(("bert", "electra", "layoutlm", "roberta", "xlm-roberta"), _QUERY_VALUE),
    **dict.fromkeys(("RefinedWeb", "RefinedWebModel", "bloom", "chatglm", "falcon", "gpt_neox"), ("query_key_value",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    "blip-2": ("q", "v", *_QV_PROJ),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": (*_QV_PROJ, "fc1", "fc2"),
    "vit": (*_QUERY_VALUE, *_QV_PROJ),  # named so before transformers 5, and since
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}  # fmt: skip


MIN_TARGET_MODULES_FOR_OPTIMIZATION: Any  # not provided here


def __getattr__(name: str) -> Any:
    """`TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING`: the layers that a method adapts by
    default, by model type. An entry that is added there counts from then on.
    """
    method = re.fullmatch(r"TRANSFORMERS_MODELS_TO_(\w+)_TARGET_MODULES_MAPPING", name)
    if method is None or method[1] not in PEFT_TYPE_TO_TUNER_MAPPING:
        return placeholder(name, __name__)
    return _own_defaults(PEFT_TYPE_TO_TUNER_MAPPING[method[1]])


@cache
def _own_defaults(tuner: Any) -> dict[str, list[str] | str]:
    """A method's defaults as a dictionary of its own."""
    entries = tuner.default_target_modules.items()
    tuner.default_target_modules = {
        kind: names if isinstance(names, str) else list(names) for kind, names in entries
    }
    return tuner.default_target_modules
