# SPDX-License-Identifier: Apache-2.0
"""EVA: run a model on data, and start LoRA from the principal directions of its layers' inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ...base.calls.running import changing
from ...base.constants import MODEL_ROOT
from ...base.errors import PeftNotSupportedError, PeftTypeError, PeftValueError
from ...base.validation import check_adapter, check_functions
from ...config import PeftConfig
from ...core import plan as _plan
from ...core.adapters import check_unsharded
from ...core.base_layer import is_linear
from ...core.tuner import BaseTuner
from ...integrations.distributed import take_back
from ...peft_model import PeftModel
from .config import LoraConfig
from .eva_ranks import put_directions
from .eva_survey import Batch, Batches, LayerInputs, ModelInputs, Run, Survey, device_of
from .layer import Linear, LoraLayer
from .model import LoraModel

__all__ = [
    "forward_fn_dict", "get_eva_state_dict", "initialize_lora_eva_weights",
    "prepare_layer_inputs_fn_language_modeling", "prepare_model_inputs_fn_language_modeling",
]  # fmt: skip


def prepare_model_inputs_fn_language_modeling(
    model_input: Mapping[str, Tensor], peft_config: LoraConfig
) -> Tensor:
    """Return the places `[n, 2]` of the tokens to use: not padding, and not without a label.

    Args:
        model_input: Arguments of the model by name, with `input_ids` or `attention_mask`.
        peft_config: Its `eva_config` says which labels do not count.
    """
    if not isinstance(model_input, Mapping):
        raise PeftTypeError(
            "EVA expects the batches of the data loader to be dictionaries of the model's "
            f"arguments, got {type(model_input)}; pass a `prepare_model_inputs_fn` of your own, or "
            "None for all positions."
        )
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    chosen, options = mask.bool(), peft_config.eva_config
    if options is not None and options.use_label_mask and "labels" in model_input:
        chosen = chosen & (model_input["labels"] != options.label_mask_value)
    return chosen.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: object, model_input: Tensor, layer_name: str
) -> Tensor:
    """Return the rows of a layer's input `[batch, tokens, in]` at the places `model_input`."""
    return _tensor(layer_input, layer_name)[tuple(model_input.T.unbind())]


def _all_rows(layer_input: object, model_input: object, layer_name: str) -> Tensor:
    """Return all rows of a layer's input."""
    return _tensor(layer_input, layer_name).flatten(0, -2)


def _tensor(layer_input: object, layer_name: str) -> Tensor:
    """Return a layer's first argument."""
    first = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(first, Tensor):
        raise PeftTypeError(
            f"`{layer_name}`: its input is not a tensor but {type(first)}; pass a "
            "`prepare_layer_inputs_fn` that returns rows `[n, in]`."
        )
    return first


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, object]) -> object:
    """Call a model with the entries of a batch."""
    return model(**inputs)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Batch],
    peft_config: LoraConfig | None = None,
    forward_fn: Run = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs | None]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return the principal directions of the inputs of a model's layers, as many as EVA gives each.

    The model runs on the data, again and again, until the directions that are needed stay the same
    from batch to batch: their cosine similarity is at least `tau` of the `eva_config`. Layers with
    the same input are computed once. The ranks of all layers together stay the same; a direction
    gets one where it has a large share of the variance of its layer's inputs, up to `rho` times the
    layer's rank. The model runs in evaluation mode with its adapters off, and is as it was
    afterwards.

    Args:
        model: A `PeftModel`, or a plain model with a `peft_config`.
        dataloader: Batches that can be looped over more than once.
        peft_config: For a plain model; without `target_modules` all linear layers count.
        forward_fn: Calls the model with a batch.
        prepare_model_inputs_fn: Makes of a batch what `prepare_layer_inputs_fn` gets; None passes
            the batch on.
        prepare_layer_inputs_fn: Returns the rows `[n, in]` of a layer's input, for all layers or
            by name; None takes all rows.
        adapter_name: The adapter of a `PeftModel`.
        gather_distributed_inputs: In a distributed run, take the rows of all processes together;
            each has to see other data.
        show_progress_bar: False shows none.

    Returns:
        `[rank, in]` by the layer's name in `model`; no rows for a layer that needs no adapter.

    Raises:
        PeftValueError: There is no data, or every batch has fewer rows than a layer needs.
        PeftTypeError: Batches or inputs are of a kind that needs functions of your own, or an
            argument is of another type.

    Source: arXiv:2410.07170, algorithm 1
    """
    if not isinstance(dataloader, Iterable):
        raise PeftTypeError(f"`dataloader` must give batches, got {type(dataloader).__name__}.")
    check_functions(forward_fn=forward_fn)
    if prepare_model_inputs_fn is not None:
        check_functions(prepare_model_inputs_fn=prepare_model_inputs_fn)
    configs: Mapping[str, PeftConfig] = {}
    unadapted: AbstractContextManager[None] = nullcontext()
    if isinstance(model, PeftModel):
        check_adapter(adapter_name, model.peft_config)
        configs, unadapted = model.peft_config, model.disable_adapter()
    config = configs.get(adapter_name) if peft_config is None else peft_config
    if config is None:
        raise PeftValueError("`peft_config` is required if the model is not a PeftModel.")
    if not isinstance(config, LoraConfig) or config.eva_config is None:
        raise PeftValueError("EVA needs a LoraConfig with `init_lora_weights='eva'`.")
    if isinstance(model, PeftModel):
        layers = _adapted_layers(model, adapter_name)
    else:
        layers = _plain_layers(model, config)
    if not layers:
        raise PeftValueError("EVA is for linear layers, and the model has none to adapt.")
    functions = _input_functions(prepare_layer_inputs_fn, layers)
    survey = Survey(model, config, layers, functions, gather_distributed_inputs)
    with unadapted:
        batches = Batches(
            dataloader, device_of(model), config, prepare_model_inputs_fn, show_progress_bar
        )
        survey.find_equal_inputs(forward_fn, next(batches.once()))
        survey.find_directions(forward_fn, batches)
    return survey.result()


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Batch] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Run = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs | None]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter with `init_lora_weights="eva"` from the inputs that its layers see.

    Each layer's `A` becomes the principal directions of its inputs, `B` stays zero. Ranks and
    alphas change as EVA spreads the ranks, in the config's patterns too; a layer of rank zero loses
    the adapter. Call it before the optimizer is made. On an error the adapter is as it was.

    Args:
        model: A `PeftModel` with the adapter, which may be on the meta device.
        dataloader: Data to run the model on; not needed with an `eva_state_dict`.
        eva_state_dict: Directions by layer, from `get_eva_state_dict`; names may be those in the
            plain model.
        forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
        gather_distributed_inputs, show_progress_bar: As for `get_eva_state_dict`.

    Raises:
        PeftTypeError: An argument is of another type.
        PeftValueError: The adapter is not for EVA, several are active, or neither data nor
            directions are given.
        PeftRuntimeError: An engine has sharded the model.

    Example:
        >>> from peft import EvaConfig, LoraConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> config = LoraConfig(
        ...     r=2, target_modules=["0", "2"], init_lora_weights="eva", eva_config=EvaConfig(rho=1)
        ... )
        >>> model = get_peft_model(base, config)
        >>> initialize_lora_eva_weights(
        ...     model,
        ...     [torch.randn(64, 8) for _ in range(4)],
        ...     forward_fn=lambda model, batch: model(batch),
        ...     prepare_model_inputs_fn=None,
        ...     prepare_layer_inputs_fn=None,
        ... )
        >>> A = model.base_model.model[0].lora_A["default"].weight
        >>> torch.allclose(A @ A.T, torch.eye(2), atol=1e-5)
        True

    Source: arXiv:2410.07170, algorithm 1
    """
    if not isinstance(model, PeftModel):
        raise PeftValueError("The model must be a PeftModel; `get_peft_model` makes one.")
    check_adapter(adapter_name, model.peft_config)
    config = model.peft_config[adapter_name]
    if len(model.active_adapters) > 1:
        raise PeftValueError("EVA needs a single active adapter; choose one with `set_adapter`.")
    if getattr(config, "init_lora_weights", None) != "eva":
        raise PeftValueError(
            f"Adapter {adapter_name} is not for EVA; make it with `init_lora_weights='eva'`."
        )
    tuner = model.base_model
    if not isinstance(tuner, LoraModel):
        raise PeftNotSupportedError("EVA is not supported for a model that mixes methods.")
    take_back(model)
    own = tuner.adapter_layers(adapter_name, LoraLayer)
    check_unsharded(own, adapter_name, "start it by EVA")
    if eva_state_dict is None:
        if dataloader is None:
            raise PeftValueError("Pass a `dataloader`, or the `eva_state_dict` of an earlier run.")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    if not isinstance(eva_state_dict, Mapping):
        raise PeftTypeError("`eva_state_dict` must be what `get_eva_state_dict` returns.")
    directions = {name.removeprefix(MODEL_ROOT): rows for name, rows in eva_state_dict.items()}
    with changing(model, [adapter_name]):
        put_directions(tuner, adapter_name, directions)


def _adapted_layers(model: PeftModel, adapter_name: str) -> dict[str, nn.Module]:
    """Return the linear layers with an adapter by their paths in a `PeftModel`."""
    layers = model.base_model.adapter_layers(adapter_name, Linear)
    return {MODEL_ROOT + path: layer for path, layer in layers.items()}


def _plain_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Return the linear layers of a model that a config targets, by path."""
    if config.target_modules is None:
        modules = _plan.own_modules(model)
    else:
        tuner: BaseTuner[LoraConfig] = LoraModel(model, None)
        modules = _plan.make(tuner, "default", config.for_adapter()).targets
    return {path: module for path, module in modules.items() if is_linear(module)}


def _input_functions(
    given: LayerInputs | Mapping[str, LayerInputs | None] | None, layers: Collection[str]
) -> dict[str, LayerInputs]:
    """Return the function that prepares the inputs of each layer."""
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(layers, given)
    if unknown := sorted(set(by_name).difference(layers)):
        raise PeftValueError(
            f"`prepare_layer_inputs_fn` names {', '.join(unknown)}, which are not among the "
            "adapted linear layers."
        )
    return {name: by_name.get(name) or _all_rows for name in layers}
