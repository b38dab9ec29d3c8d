# SPDX-License-Identifier: Apache-2.0
"""`load_standalone`: load adapters without their base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from .base.constants import MODEL_ROOT, ROOT
from .base.errors import CheckpointError, PeftNotSupportedError, PeftTypeError, PeftValueError
from .base.modules import check_model
from .base.plain_values import JsonObject
from .checkpoint.hub import HubOptions, load_peft_weights, of_one_save, only_hub_options
from .config import PeftConfig, TargetedConfig
from .core.filling import CheckpointFill
from .core.injection import Construction
from .core.loading import check_sizes
from .core.low_rank_deltas import SavedAdapter
from .core.renamed_targets import present_names
from .core.skeleton import adapted_paths, skeleton_of
from .core.targets import any_layer
from .mixed_model import PeftMixedModel
from .peft_model import PeftModel


def load_standalone(
    adapters: SavedAdapter | Mapping[str, SavedAdapter],
    *,
    model: nn.Module | None = None,
    **hub_options: object,
) -> PeftModel:
    """Load adapters without their base model: for conversion, comparison, combination, export.

    In place of the base model is one that has the adapted layers alone, without weights. It can't
    be run or merged into. Sizes are read from the adapters' tensors.

    Args:
        adapters: An adapter: its folder, its id on the Hub, or a pair of config and tensors by
            checkpoint key; or several by the name that each is to have.
        model: The base model without weights, as `meta_model` makes it, for adapters whose tensors
            do not tell all sizes. The adapters are put into it.
        **hub_options: `subfolder`, `revision`, `token`, `cache_dir`, …

    Returns:
        The model with the adapters, the first of which is active: a `PeftModel`, or a
        `PeftMixedModel` if the adapters are of several methods.

    Raises:
        CheckpointNotFoundError: There is no such adapter.
        CheckpointError: A file is damaged, or the adapters are for modules of different sizes.
        PeftNotSupportedError: An adapter's tensors do not tell the sizes of its modules, or it
            depends on the base model's weights. A convolution with flattened factors is taken for
            a linear layer, unless a `model` is given.

    Example:
        >>> import tempfile, torch
        >>> from peft import LoKrConfig, get_peft_model, save_as_lora
        >>> config = LoKrConfig(r=2, target_modules=["0"], init_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/lokr")
        ...     alone = load_standalone(f"{folder}/lokr")
        ...     save_as_lora(f"{folder}/lora", alone, rank=4).config.r
        4
    """
    places = dict(adapters) if isinstance(adapters, Mapping) else {"default": adapters}
    if not places:
        raise PeftValueError("`adapters` is empty; name at least one adapter.")
    hub = only_hub_options(hub_options, "load_standalone")
    loaded = {name: _read(place, hub) for name, place in places.items()}
    if model is None:
        root: nn.Module = skeleton_of(list(loaded.values()))
        loaded = {name: (_by_path(*adapter), adapter[1]) for name, adapter in loaded.items()}
    else:
        check_model(model)
        root = model
        loaded = {name: _present(model, *adapter) for name, adapter in loaded.items()}
    # Parameters have the dtype of the file, or float32 in a model of another.
    autocast = model is not None
    mixed = len({config.peft_type for config, _ in loaded.values()}) > 1
    result: PeftModel | None = None
    for name, (config, state) in loaded.items():
        place = places[name]
        source = "The adapter's tensors" if isinstance(place, tuple) else str(place)
        fill = CheckpointFill(root, state, source)
        try:
            if result is None:
                model_cls = PeftMixedModel if mixed else PeftModel.class_for(config.task_type)
                options = {"autocast_adapter_dtype": autocast, "initialize": False}
                result = model_cls(root, config, name, fill=fill, **options)
            else:
                rest = Construction(autocast, initialize=False)
                result.add_filled_adapter(name, config, fill, rest)
        except CheckpointError as error:
            if model is not None:
                raise
            raise PeftNotSupportedError(
                f"'{source}' can't be understood without its base model; pass that, without "
                f"weights, as `meta_model` makes it. {error}"
            ) from error
        result.base_model.method_of(config).note_loaded(result, name)
    assert result is not None
    return result.eval()


def _read(adapter: SavedAdapter, hub: HubOptions) -> tuple[TargetedConfig, Mapping[str, Tensor]]:
    """Return an adapter's config and its tensors by checkpoint key."""
    if isinstance(adapter, tuple):
        config, given = adapter
        state = {key if key.startswith(ROOT) else MODEL_ROOT + key: t for key, t in given.items()}
    else:
        config, state = of_one_save(
            adapter,
            hub.get("subfolder"),
            lambda: (PeftConfig.from_pretrained(adapter, **hub), load_peft_weights(adapter, **hub)),
        )
        check_sizes(config, sum(tensor.nbytes for tensor in state.values()), adapter)
    if not isinstance(config, TargetedConfig):
        raise PeftTypeError(f"'{adapter}' is not an adapter of modules chosen by name.")
    return config, state


def _present(
    model: nn.Module, config: TargetedConfig, state: Mapping[str, Tensor]
) -> tuple[TargetedConfig, Mapping[str, Tensor]]:
    """Return a config and tensors under the present names of a model's modules."""
    config, state = present_names(model, config.for_adapter(), state)
    config.inference_mode = True
    return config, state


def _by_path(config: TargetedConfig, state: Mapping[str, Tensor]) -> TargetedConfig:
    """Return a config that targets the modules of an adapter's tensors by their whole paths."""
    changes: JsonObject = {
        "target_modules": sorted(adapted_paths(state)),
        "exclude_modules": None,
        "inference_mode": True,
        **any_layer(config),
    }
    result = replace(config, **changes)
    if config.source is not None:
        result.source = config.source
    return result
