# SPDX-License-Identifier: Apache-2.0
"""The deltas of an adapter as exact low-rank factors, for libraries of adapters: experts that a
model routes over, clusters, sums.

The adapter is built and filled beside the model (`injection.py`), asked for its factors, and
dropped. The model stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..base.calls.running import holds
from ..base.constants import MODEL_ROOT, ROOT
from ..base.errors import (
    CheckpointError,
    PeftError,
    PeftNotSupportedError,
    PeftTypeError,
    UnsupportedModuleError,
)
from ..base.modules import check_model
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING, lookup
from ..base.tensors import ordinary_tensors
from ..checkpoint.hub import HubOptions, only_hub_options
from ..config import PeftConfig, TargetedConfig
from ..ops.low_rank import Deltas as Deltas
from . import plan as _plan
from .conversion import check_convertible, config_of, layers_with, naming_layer, root_of
from .filling import CheckpointFill
from .injection import Build, Construction, build_adapter
from .layer import BaseTunerLayer
from .loading import read_checkpoint
from .renamed_targets import present_names
from .tuner import BaseTuner

SavedAdapter: TypeAlias = "str | os.PathLike[str] | tuple[PeftConfig, Mapping[str, Tensor]]"
"""A folder, an id on the Hub, or a config and tensors by checkpoint key."""

# The name of the adapter while it exists.
_NAME = "default"


def low_rank_deltas(
    model: nn.Module,
    adapter: SavedAdapter,
    task_id: int | str | Mapping[int | str, float] | None = None,
    *,
    device: str | torch.device | None = None,
    **hub_options: object,
) -> Deltas:
    """Return the deltas of a saved adapter for a base model, `ΔW = B·A` exactly, by module path.

    The adapter can be of any method and rank. The model is not changed, and may have adapters.

    Args:
        model: The base model, or a model with adapters.
        adapter: A folder, an id on the Hub, or a pair `(config, state_dict)`.
        task_id: For an adapter with tasks: the task by id or name, or a dictionary with the share
            of each of several.
        device: Device of the factors, by default that of each module.
        **hub_options: `subfolder`, `revision`, `token`, `cache_dir`, …

    Returns:
        For each module a `LowRank` with `B [out, r]` and `A [r, in · taps]`; scales are in `B`.

    Raises:
        CheckpointNotFoundError: There is no such adapter.
        CheckpointError: A file is damaged, or does not fit the base model.
        PeftValueError: The config does not fit the base model, or the task is unknown or missing.
        PeftNotSupportedError: The adapter is more than low-rank deltas: it also trains full
            modules, biases or token rows, has weight decomposition (DoRA), or its delta depends on
            the input.

    Example:
        >>> from peft import LoKrConfig, get_peft_model, get_peft_model_state_dict
        >>> base = nn.Sequential(nn.Linear(8, 6))
        >>> config = LoKrConfig(r=1, target_modules=["0"], init_weights=False)
        >>> tuned = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
        >>> deltas = low_rank_deltas(base, (config, get_peft_model_state_dict(tuned)))
        >>> dense = tuned.base_model.model[0].get_delta_weight("default")
        >>> torch.allclose(deltas["0"].B @ deltas["0"].A, dense, atol=1e-6)
        True
    """
    with _naming(adapter):
        hub = only_hub_options(hub_options, "low_rank_deltas")
        config, layers = DeltaReader(model).layers_of(adapter, hub)
        tuner_cls = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
        options = tuner_cls.conversion_options(config, task_id=task_id)
        return _deltas(layers, _NAME, options, device)


def deltas_by_task(
    model: nn.Module,
    adapter: SavedAdapter,
    *,
    device: str | torch.device | None = None,
    deltas_only: bool = False,
    **hub_options: object,
) -> dict[str, Deltas]:
    """Return all deltas of a saved adapter, by the name of the task; "" for a method without tasks.

    Tasks without names are called "task_0", "task_1", …; an only one "".

    Args:
        model, adapter, device, **hub_options: As for `low_rank_deltas`.
        deltas_only: Pass over full modules, biases and token rows, which are refused by default.

    Raises:
        PeftError: As `low_rank_deltas`.
    """
    return DeltaReader(model, device=device, deltas_only=deltas_only)(adapter, **hub_options)


class DeltaReader:
    """`deltas_by_task` of many adapters, one after the other. Layers that were made for an adapter
    are filled again for the next one of an equal config, which is several times faster.

    Args:
        model, device, deltas_only: As for `deltas_by_task`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device | None = None,
        deltas_only: bool = False,
    ) -> None:
        check_model(model)
        self.root, self.device, self.deltas_only = root_of(model)[0], device, deltas_only
        # The last adapter's config as text, and its tuner and layers.
        self._last: tuple[str, BaseTuner[TargetedConfig], Build[TargetedConfig]] | None = None

    def __call__(self, adapter: SavedAdapter, **hub_options: object) -> dict[str, Deltas]:
        """Return all deltas of a saved adapter, by the name of the task."""
        with _naming(adapter):
            hub = only_hub_options(hub_options, "deltas_by_task")
            config, layers = self.layers_of(adapter, hub)
            views = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).delta_views(config)
            return {
                name: _deltas(layers, _NAME, options, self.device)
                for name, options in views.items()
            }

    def layers_of(
        self, adapter: SavedAdapter, hub: HubOptions
    ) -> tuple[PeftConfig, dict[str, BaseTunerLayer]]:
        """Return an adapter's config and layers; these hold until the next call."""
        config, state, source = _read(self.root, adapter, hub)
        text, last = config.to_json(), self._last
        if last is None or last[0] != text:
            self._last = last = (text, *self._built(config))
        _, tuner, build = last
        with ordinary_tensors():
            try:
                CheckpointFill(self.root, state, source)(build)
            except CheckpointError as error:
                raise CheckpointError(f"It does not fit this base model. {error}") from None
            tuner.put_shared(build)
        layers = dict(build.all_layers())
        _check_products(layers, _NAME)
        return build.config, layers

    def _built(
        self, config: TargetedConfig
    ) -> tuple[BaseTuner[TargetedConfig], Build[TargetedConfig]]:
        """Return the tuner and the layers of an adapter, without values."""
        tuner = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)(self.root, None)
        tuner.delta_views(config)  # raises if the delta depends on the input
        _check_undecomposed(config)  # before the plan, which depends on the model
        with ordinary_tensors():
            config = config.for_adapter()
            config.inference_mode = True
            plan = _plan.make(tuner, _NAME, config, is_new=False, is_filled=True)
            if not self.deltas_only:
                whole = [f"`{path}`" for path in plan.trainable_copies]
                _check_only_deltas(whole, plan.tokens.indices, config.trained_biases)
            return tuner, build_adapter(tuner, plan, Construction(initialize=False))


@holds
def loaded_deltas(
    model: nn.Module,
    adapter_name: str,
    *,
    device: str | torch.device | None = None,
    deltas_only: bool = False,
) -> dict[str, Deltas]:
    """Return all deltas of an adapter that a model has, at its present scale, by the name of the
    task as `deltas_by_task`.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        adapter_name: The adapter.
        device, deltas_only: As for `deltas_by_task`.

    Raises:
        PeftValueError: There is no such adapter.
        PeftNotSupportedError: As `low_rank_deltas`.
        UnsupportedModuleError: A layer has no delta that is a low-rank product.
    """
    config = config_of(model, adapter_name)
    views = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).delta_views(config)
    _check_undecomposed(config)
    layers = dict(layers_with(root_of(model)[0], adapter_name))
    if not deltas_only:
        parts = [f"`{name}`" for name in config.modules_to_save or ()]
        _check_only_deltas(parts, config.trainable_token_indices, config.trained_biases)
    _check_products(layers, adapter_name)
    return {name: _deltas(layers, adapter_name, options, device) for name, options in views.items()}


@contextmanager
def _naming(adapter: SavedAdapter) -> Iterator[None]:
    """Context whose errors name the adapter's place."""
    try:
        yield
    except PeftError as error:
        if isinstance(adapter, tuple) or str(adapter) in str(error):
            raise
        raise type(error)(f"Adapter '{adapter}': {error}") from error


def _deltas(
    layers: Mapping[str, BaseTunerLayer],
    adapter_name: str,
    options: Mapping[str, object],
    device: str | torch.device | None,
) -> Deltas:
    deltas = {}
    for path, layer in layers.items():
        with naming_layer(path):
            found = layer.low_rank_factors(adapter_name, None, **options)
        A, B = (tensor.detach().to(device, copy=True) for tensor in (found.A, found.B))
        deltas[path] = found._replace(A=A, B=B)
    return deltas


def check_has_deltas(adapter: str | os.PathLike[str]) -> None:
    """Check, by the config of a saved adapter alone, that its deltas are low-rank products.

    Raises:
        PeftNotSupportedError: It has weight decomposition (DoRA).
    """
    with _naming(adapter):
        _check_undecomposed(PeftConfig.from_pretrained(adapter))


def _check_products(layers: dict[str, BaseTunerLayer], adapter_name: str) -> None:
    """Check that each layer's delta is a low-rank product."""
    check_convertible(layers, adapter_name)
    if unfit := [path for path, layer in layers.items() if layer.geometry.groups > 1]:
        raise UnsupportedModuleError(f"`{unfit[0]}` is a convolution in groups.")


def _check_undecomposed(config: PeftConfig) -> None:
    """Check that an adapter has no weight decomposition (DoRA)."""
    if lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).decomposes(config):
        raise PeftNotSupportedError(
            "It has weight decomposition (DoRA): its change of the weight is of full rank and "
            "depends on the base model's weights. `convert_to_lora` approximates it, in the base "
            "model."
        )


def _check_only_deltas(whole: Iterable[str], token_rows: object, biases: str) -> None:
    """Check that an adapter has no parts outside its layers."""
    rows = token_rows if isinstance(token_rows, Mapping) else ["the embedding"] * bool(token_rows)
    parts = [*whole, *(f"rows of `{path}`" for path in rows)]
    parts += [f"biases (`bias`={biases!r})"] * (biases != "none")
    if parts:
        raise PeftNotSupportedError(
            f"It is more than deltas: it also trains {', '.join(parts)}, of which a model has "
            "one. Train adapters without these to route, add or cluster them."
        )


def _read(
    root: nn.Module, adapter: SavedAdapter, hub: HubOptions
) -> tuple[TargetedConfig, dict[str, Tensor], str]:
    """Return the config and tensors of an adapter under present names, and its place."""
    if not isinstance(adapter, tuple):
        config, state = read_checkpoint(root, adapter, None, hub)
        return config, state, str(adapter)
    config, given = adapter if len(adapter) == 2 else (None, None)  # type: ignore[assignment]
    if not isinstance(config, PeftConfig) or not isinstance(given, Mapping):
        raise PeftTypeError(
            "An adapter in memory is a pair of its config and its tensors by checkpoint key, as "
            "`convert_to_lora` returns it."
        )
    keyed = {key if key.startswith(ROOT) else MODEL_ROOT + key: t for key, t in given.items()}
    return *present_names(root, config, keyed), "The adapter's tensors"
