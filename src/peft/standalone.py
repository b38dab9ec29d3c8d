# SPDX-License-Identifier: Apache-2.0
"""`load_standalone`: load adapters without their base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from .base.constants import MODEL_ROOT, ROOT
from .base.errors import PeftTypeError, PeftValueError
from .checkpoint.hub import HubOptions, load_peft_weights, of_one_save, only_hub_options
from .config import PeftConfig, TargetedConfig
from .core.filling import CheckpointFill
from .core.injection import Construction
from .core.low_rank_deltas import SavedAdapter
from .core.skeleton import adapted_paths, skeleton_of
from .mixed_model import PeftMixedModel
from .peft_model import PeftModel


def load_standalone(
    adapters: SavedAdapter | Mapping[str, SavedAdapter], **hub_options: object
) -> PeftModel:
    """Load adapters without their base model: for conversion, comparison, combination, export.

    In place of the base model is one that has the adapted layers alone, without weights. It can't
    be run or merged into. Sizes are read from the adapters' tensors.

    Args:
        adapters: An adapter: its folder, its id on the Hub, or a pair of config and tensors by
            checkpoint key; or several by the name that each is to have.
        **hub_options: `subfolder`, `revision`, `token`, `cache_dir`, …

    Returns:
        The model with the adapters, the first of which is active: a `PeftModel`, or a
        `PeftMixedModel` if the adapters are of several methods.

    Raises:
        CheckpointNotFoundError: There is no such adapter.
        CheckpointError: A file is damaged, or the adapters are for modules of different sizes.
        PeftNotSupportedError: An adapter's tensors do not tell the sizes of its modules (a
            convolution with flattened factors, say), or it depends on the base model's weights.

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
    root = skeleton_of(list(loaded.values()))
    mixed = len({config.peft_type for config, _ in loaded.values()}) > 1
    model: PeftModel | None = None
    for name, (config, state) in loaded.items():
        own = _by_path(config, state)
        place = places[name]
        source = "The adapter's tensors" if isinstance(place, tuple) else str(place)
        fill = CheckpointFill(root, state, source)
        if model is None:
            model_cls = PeftMixedModel if mixed else PeftModel.class_for(config.task_type)
            options = {"autocast_adapter_dtype": False, "initialize": False}
            model = model_cls(root, own, name, fill=fill, **options)
        else:
            model.add_filled_adapter(name, own, fill, Construction(False, initialize=False))
        model.base_model.method_of(own).note_loaded(model, name)
    assert model is not None
    return model.eval()


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
    if not isinstance(config, TargetedConfig):
        raise PeftTypeError(f"'{adapter}' is not an adapter of modules chosen by name.")
    return config, state


def _by_path(config: TargetedConfig, state: Mapping[str, Tensor]) -> TargetedConfig:
    """Return a config that targets the modules of an adapter's tensors by their whole paths."""
    limits = {"layers_to_transform", "layers_pattern"} & type(config).__dataclass_fields__.keys()
    changes: dict[str, Any] = {
        "target_modules": sorted(adapted_paths(state)),
        "exclude_modules": None,
        "inference_mode": True,
        **dict.fromkeys(limits),
    }
    own = replace(config, **changes)
    if config.source is not None:
        own.source = config.source
    return own
