# SPDX-License-Identifier: Apache-2.0
"""Give an adapter other ranks in its layers, with `A` as given."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from ...base.containers import walk
from ...base.errors import PeftValueError, warn
from ...base.modules import get_submodules
from ...core import targets as _targets
from ...core.adapters import adopt, drop
from ...core.injection import Build, Construction, build_adapter
from ...core.parameter_layer import ParameterLayer
from ...core.plan import Plan, own_modules
from ...core.tuner import BaseTuner
from .config import LoraConfig
from .layer import Linear, LoraLayer


def put_directions(
    tuner: BaseTuner[LoraConfig], name: str, directions: Mapping[str, Tensor]
) -> None:
    """Set an adapter's `A [rank, in]` in some layers, by path, and `B` to zero.

    A layer with no rows loses the adapter. Ranks, alphas and targets of the config follow.

    Raises:
        PeftValueError: A layer is not the adapter's, or a tensor does not fit it; nothing is
            changed.
    """
    config = tuner.peft_config[name]
    layers = {
        path: layer
        for path, layer in tuner.adapter_layers(name, LoraLayer).items()
        if not isinstance(layer, ParameterLayer)
    }
    _check(layers, directions)
    if other := [path for path in layers if path not in directions]:
        warn(f"EVA has no directions for {', '.join(other)}; they start as usual.")
    removed = [path for path in layers if path in directions and not len(directions[path])]
    kept = {path: layer for path, layer in layers.items() if path not in removed}
    if not kept:
        raise PeftValueError(f"The directions leave no layer of adapter {name} a rank.")
    changed = _config_with_ranks(config, kept, directions)
    if removed:
        names, excluded = _targets.exactly(kept, own_modules(tuner.model))
        changed = replace(changed, target_modules=names, exclude_modules=excluded)
    fresh = {
        path: layer
        for path, layer in kept.items()
        if path in directions or any(p.is_meta for p in layer.adapter_parameters(name))
    }
    build = _built(tuner, name, changed, fresh, directions)
    # Nothing fails from here on.
    for path, layer in fresh.items():
        adopt(layer, build.layers[path])
    for path in removed:
        _take_out(tuner, path, name)
    tuner.inference_cache.forget(name)
    for field in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
        setattr(config, field, getattr(changed, field))


def _check(layers: Mapping[str, LoraLayer], directions: Mapping[str, Tensor]) -> None:
    """Check that each tensor is for a linear layer of the adapter, and of its width."""
    for path, rows in directions.items():
        layer = layers.get(path)
        if not isinstance(layer, Linear):
            raise PeftValueError(f"`{path}` is not a linear layer with the adapter.")
        if rows.dim() != 2 or rows.shape[1] != layer.in_features:
            raise PeftValueError(
                f"`{path}`: directions of shape {list(rows.shape)} do not fit its "
                f"{layer.in_features} inputs."
            )


def _config_with_ranks(
    config: LoraConfig, layers: Collection[str], directions: Mapping[str, Tensor]
) -> LoraConfig:
    """Return the config with a rank for each layer, and alphas that keep the scales."""
    ranks, alphas = {}, {}
    options = config.eva_config
    for path in layers:
        r, alpha = config.rank_at(path), config.alpha_at(path)
        ranks[path] = len(directions[path]) if path in directions else r
        keeps = options is None or options.adjust_scaling_factors
        alphas[path] = alpha * ranks[path] / r if keeps and ranks[path] != r else alpha
    return replace(
        config,
        rank_pattern=_targets.patterns(ranks, config.r),
        alpha_pattern=_targets.patterns(alphas, config.lora_alpha),
    )


def _built(
    tuner: BaseTuner[LoraConfig],
    name: str,
    config: LoraConfig,
    layers: Mapping[str, LoraLayer],
    directions: Mapping[str, Tensor],
) -> Build[LoraConfig]:
    """Return new parts of the adapter for some layers, in the present dtypes."""
    plan = Plan(name, config, targets=dict[str, nn.Module](layers))
    build = build_adapter(tuner, plan, Construction())
    for path, layer in layers.items():
        like = next(iter(layer.adapter_parameters(name)))
        fresh = build.layers[path]
        assert isinstance(fresh, LoraLayer)
        for container in fresh.containers():
            container.to(like.dtype)
        if path in directions:
            fresh.factors(name).A.data.copy_(directions[path])
        fresh.set_requires_grad(name, like.requires_grad)
    return build


def _take_out(tuner: BaseTuner[LoraConfig], path: str, name: str) -> None:
    """Remove an adapter from a layer, and the layer if it has no other."""
    layer = tuner.model.get_submodule(path)
    assert isinstance(layer, LoraLayer)
    drop(layer, name)
    if layer.scaling:
        return
    for place, module in list(walk(tuner.model, repeated=True)):
        if module is layer:
            parent, _, child = get_submodules(tuner.model, place)
            setattr(parent, child, layer.base_layer)
    if path in tuner.targeted_module_names:
        tuner.targeted_module_names.remove(path)
