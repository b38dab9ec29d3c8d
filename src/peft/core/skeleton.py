# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a base model, made from adapters alone.

Most of what is done with an adapter asks the base model for nothing but the paths and sizes of its
layers, and the adapter's tensors tell these. So an adapter loads into a `Skeleton`, which has a
layer without values (on the meta device) at each of its paths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..base.constants import MODEL_ROOT
from ..base.errors import CheckpointError, PeftNotSupportedError
from ..base.plain_values import JsonObject, is_empty
from ..checkpoint.format import ModuleShape
from ..checkpoint.key_groups import group_keys, module_shapes
from ..checkpoint.keys import TOKEN_ROWS
from ..config import PeftConfig, TargetedConfig
from . import targets as _targets
from .plan import own_modules

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROWS = f".token_adapter.{TOKEN_ROWS}"
# Modules in one another that a path may name; torch walks them by recursion.
_DEEPEST = 100
# Fields of a config that choose modules by name.
_BY_NAME = ("target_modules", "exclude_modules")


class Skeleton(nn.Module):
    """A model with the layers that adapters have, and what their configs say of the real model.

    Attributes:
        paths: Paths of the adapted layers.
        targeting: Fields of a config that choose an adapter's layers in the real model, by the
            paths of these layers.
        base_class: Class and library of the real model, as a config has them.
    """

    def __init__(self, base_class: JsonObject | None) -> None:
        super().__init__()
        self.paths: set[str] = set()
        self.targeting: dict[frozenset[str], JsonObject] = {}
        self.base_class = base_class

    def put(self, path: str, module: nn.Module) -> None:
        """Put a module at a path, below parents that are made if missing; it takes over the
        children of a module that is there.
        """
        parent: nn.Module = self
        *above, name = path.split(".")
        for part in above:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        before = parent._modules.get(name)
        if before is not None:
            module._modules.update(before._modules)
        parent.add_module(name, module)


def skeleton_of(adapters: Sequence[tuple[TargetedConfig, Mapping[str, Tensor]]]) -> Skeleton:
    """Return a stand-in for the base model of adapters, given their configs and tensors.

    Raises:
        CheckpointError: Adapters have tensors for modules of different sizes.
        PeftNotSupportedError: The tensors do not tell a module's size, or the adapter needs the
            weights of the base model.
    """
    root = Skeleton(adapters[0][0].auto_mapping)
    layers: dict[str, _Layer] = {}
    parameters: dict[str, Tensor] = {}
    for config, state in adapters:
        _check_needs_no_model(config)
        groups = group_keys(state)
        shapes = module_shapes(groups, {key: tuple(value.shape) for key, value in state.items()})
        root.targeting[frozenset(adapted_paths(state))] = _targeting(config)
        for stem, shape in shapes.items():
            own = [state[key].dtype for key in groups.modules[stem].values()]
            dtype = next((dtype for dtype in own if dtype.is_floating_point), torch.float32)
            _note(layers, stem.removeprefix(MODEL_ROOT), shape, dtype)
        others = {key.removeprefix(MODEL_ROOT): state[key] for key in groups.others}
        for path, layer in _embeddings(config, others):
            layers.setdefault(path, layer)
        parameters |= {key: value for key, value in others.items() if not key.endswith(_ROWS)}
    for key, tensor in parameters.items():
        path, _, name = key.replace(".base_layer.", ".").rpartition(".")
        layers.setdefault(path, _Layer(None, tensor.dtype)).parameters[name] = tensor
    for path, layer in layers.items():
        _put(root, path, layer)
    root.paths = {path for path, layer in layers.items() if layer.is_adapted}
    return root.eval().requires_grad_(False)


def _put(root: Skeleton, path: str, layer: _Layer) -> None:
    """Make a layer at its path, or raise CheckpointError if no module can have it or be there."""
    problem = "which is deeper than modules are" if path.count(".") >= _DEEPEST else None
    try:
        if problem is None:
            root.put(path, layer.module())
    except (KeyError, ValueError, RuntimeError) as error:  # a name or size that torch refuses
        problem = f"where no module can be ({error})"
    if problem:
        shown = path if len(path) < 100 else f"{path[:100]}…"
        raise CheckpointError(f"The adapter has tensors for `{shown}`, {problem}.")


def adapted_paths(state: Iterable[str]) -> set[str]:
    """Return the paths of the modules that the tensors of an adapter are for, by their keys."""
    return {stem.removeprefix(MODEL_ROOT) for stem in group_keys(state).modules}


def exact_targets(root: nn.Module, chosen: Collection[str]) -> JsonObject:
    """Return `target_modules` and `exclude_modules` of a config that match the `chosen` of a
    model's modules and no other; those of the real model if this one stands in for it.
    """
    if not isinstance(root, Skeleton):
        names, excluded = _targets.exactly(chosen, own_modules(root))
        return {"target_modules": names, "exclude_modules": excluded}
    own = root.targeting.get(frozenset(chosen), {})
    by_name: list[Any] = [own.get(name) for name in _BY_NAME]
    limited = any(not is_empty(value) for name, value in own.items() if name not in _BY_NAME)
    if own and not limited and not is_empty(by_name[0]):
        found = _targets.select(sorted(root.paths), *by_name)
        if set(found) == set(chosen):
            return dict(zip(_BY_NAME, by_name, strict=True))
    return {"target_modules": sorted(chosen), "exclude_modules": None}


def saved_targets(root: nn.Module, config: PeftConfig) -> JsonObject:
    """Return the fields of a config that choose modules in the real model, for its file; none if
    the model is the real one.
    """
    if not isinstance(root, Skeleton):
        return {}
    return root.targeting.get(frozenset(getattr(config, "target_modules", None) or ()), {})


def base_class_of(root: nn.Module, config: PeftConfig) -> JsonObject | None:
    """Return `auto_mapping` for a config's file: the class of the base model, None if the task type
    tells it.
    """
    if config.task_type is not None:
        return None
    if isinstance(root, Skeleton):
        return root.base_class
    return {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}


@dataclass
class _Layer:
    """A module to make: its size if it is a layer, and the parameters that files have for it."""

    size: ModuleShape | None
    dtype: torch.dtype
    is_adapted: bool = False
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def module(self) -> nn.Module:
        """Return the module, on the meta device but for the parameters of files."""
        module = nn.Module() if self.size is None else self._layer(self.size)
        for name, tensor in self.parameters.items():
            module.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
        return module

    def _layer(self, size: ModuleShape) -> nn.Module:
        place: dict[str, Any] = {"device": "meta", "dtype": self.dtype}
        bias = "bias" in self.parameters
        if size.is_table:
            return nn.Embedding(size.in_features, size.out_features, **place)
        if not size.kernel_size:
            return nn.Linear(size.in_features, size.out_features, bias, **place)
        kind: Any = _CONVOLUTIONS[len(size.kernel_size) - 1]
        sizes = size.in_features, size.out_features, size.kernel_size
        return kind(*sizes, groups=size.groups, bias=bias, **place)


def _check_needs_no_model(config: TargetedConfig) -> None:
    """Refuse an adapter that can't be understood without the base model."""
    if not is_empty(getattr(config, "target_parameters", None)):
        raise PeftNotSupportedError(
            f"The adapter adapts parameters that are no modules' (`target_parameters`="
            f"{config.target_parameters!r}), whose sizes its tensors do not tell; pass the base "
            "model, without weights, as `meta_model` makes it."
        )
    if getattr(config, "starts_from_weight", False):
        raise PeftNotSupportedError(
            "The adapter is stored as a difference from a start that is computed from the base "
            "model's weights (`init_lora_weights`); load it into the base model."
        )


def _note(
    layers: dict[str, _Layer], path: str, shape: ModuleShape | None, dtype: torch.dtype
) -> None:
    """Note the size of an adapted layer, which is the same for all adapters."""
    if shape is None or len(shape.kernel_size) > len(_CONVOLUTIONS):
        raise PeftNotSupportedError(
            f"`{path}`: the adapter's tensors do not tell the size of this module; pass the base "
            "model, without weights, as `meta_model` makes it."
        )
    known = layers.get(path)
    if known is not None and known.size is not None:
        both = [size._replace(rank=None) for size in (known.size, shape)]
        if both[0] != both[1] and known.is_adapted:
            sizes = " and ".join(f"{size.in_features}->{size.out_features}" for size in both)
            raise CheckpointError(
                f"`{path}`: the adapters are for modules of different sizes, {sizes}; they are not "
                "of one base model."
            )
    layers[path] = _Layer(shape, dtype, True)


def _embeddings(
    config: TargetedConfig, others: Mapping[str, Tensor]
) -> Iterator[tuple[str, _Layer]]:
    """Yield the embeddings of which an adapter trains rows, by path."""
    indices = config.trainable_token_indices
    for key, rows in others.items():
        if key.endswith(_ROWS):
            path = key.removesuffix(_ROWS)
            own = (
                next((v for k, v in indices.items() if path.endswith(k)), [])
                if isinstance(indices, dict)
                else indices or []
            )
            size = ModuleShape(rows.shape[1], max(own, default=0) + 1, None, is_table=True)
            yield path, _Layer(size, rows.dtype)


def _targeting(config: TargetedConfig) -> JsonObject:
    """Return the fields of a config that choose modules."""
    names = (*_BY_NAME, *_targets.LAYER_FIELDS)
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
