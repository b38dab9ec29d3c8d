# SPDX-License-Identifier: Apache-2.0
"""Names of files and task heads, and default target modules of known architectures."""

from __future__ import annotations

# Files of a saved adapter.
CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
# Files that an adapter's weights may be in, the preferred one first.
WEIGHTS_FILES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)

# Prefixes of keys in a checkpoint: of the adapted model, and of the base model in it.
ROOT = "base_model."
MODEL_ROOT = "base_model.model."

# Layers with an entry for each token, which `save_embedding_layers` adds to a checkpoint.
EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")
# Value of `target_modules` for all linear layers but the output head.
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
# Value of `target_modules` that matches no module, without an error.
DUMMY_TARGET_MODULES = "dummy-target-modules"

# Heads that `PeftModelFor…` trains in addition to the adapter, since they start at random.
SEQ_CLS_HEAD_NAMES = ("classifier", "score")
QA_HEAD_NAMES = ("qa_outputs",)
# Output heads that "all-linear" leaves out, in addition to the model's `get_output_embeddings()`.
OUTPUT_HEAD_NAMES = ("lm_head", "score", "classifier", "qa_outputs")

# Result of `BaseTuner.get_model_config` for a model without a config.
DUMMY_MODEL_CONFIG = {"model_type": "custom"}

_QV_PROJ = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")

# Default target modules by model type: the query and value projections, as in the LoRA paper
# (arXiv:2106.09685, section 4.2), or the fused projection that contains them.
DEFAULT_TARGET_MODULES: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(
        (
            "bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama", "llama4",
            "mistral", "mixtral", "opt", "qwen2", "qwen3", "stablelm",
        ),
        _QV_PROJ,
    ),
    **dict.fromkeys(("bert", "electra", "layoutlm", "roberta", "xlm-roberta"), _QUERY_VALUE),
    **dict.fromkeys(
        ("RefinedWeb", "RefinedWebModel", "bloom", "chatglm", "falcon", "gpt_neox"),
        ("query_key_value",),
    ),
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
