# SPDX-License-Identifier: Apache-2.0
"""LyCORIS's settings and presets as a `LoKrConfig`: which modules of a model they mean, and how
each is split.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from ....base.errors import PeftTypeError, PeftValueError
from ....base.geometry import Geometry
from ....core.base_layer import geometry
from ....core.plan import own_modules
from ....core.targets import exactly, patterns
from ..config import LoKrConfig
from ..shapes import factorization

_PRESET = frozenset(
    [
        "enable_conv",
        "target_module",
        "target_name",
        "exclude_name",
        "module_algo_map",
        "name_algo_map",
        "use_fnmatch",
        "lora_prefix",
    ]
)
# LyCORIS's words for what a config has; and those that need no counterpart.
_FIELDS = {
    "decompose_both": "decompose_both",
    "use_tucker": "use_effective_conv2d",
    "use_scalar": "use_scalar",
    "dora_wd": "weight_decompose",
    "weight_decompose": "weight_decompose",
    "wd_on_output": "wd_on_output",
    "full_matrix": "full_matrix",
    "rs_lora": "use_rslora",
    "rank_dropout": "rank_dropout",
    "rank_dropout_scale": "rank_dropout_scale",
    "module_dropout": "module_dropout",
}
_READ = {
    "linear_dim",
    "linear_alpha",
    "conv_dim",
    "conv_alpha",
    "factor",
    "unbalanced_factorization",
    "algo",
    "apply_preset",
    "preset",
}
_WITHOUT_EFFECT = {"multiplier", "bypass_mode", "warn_on_unmatched"}


def lokr_config_from_lycoris(model: nn.Module, settings: Mapping[str, Any]) -> LoKrConfig:
    """The config of the adapter that LyCORIS would make with these settings, module by module.

    Args:
        model: The model that the adapter is for; it is not changed.
        settings: The arguments of LyCORIS's `create_lycoris`, as SimpleTuner's
            `lycoris_config.json` has them: `algo`, `linear_dim`, `linear_alpha`, `conv_dim`,
            `conv_alpha`, `factor`, `full_matrix`, …, and a preset as a dictionary under
            `apply_preset` (or `preset`): classes (`target_module`) and names (`target_name`) of
            modules to adapt, with wildcards if `use_fnmatch`; names to leave out (`exclude_name`);
            settings by class or name (`module_algo_map`, `name_algo_map`). Without a preset all
            linear and convolutional layers are adapted.

    Raises:
        PeftTypeError: A setting is unknown.
        PeftValueError: Another method than LoKr is asked for, or no module is meant.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 64))
        >>> config = lokr_config_from_lycoris(
        ...     model, {"algo": "lokr", "linear_dim": 1, "apply_preset": {"target_name": ["1*"], "use_fnmatch": True}}
        ... )
        >>> config.target_modules, config.r
        ({'1'}, 1)

    Source: arXiv:2309.14859; LyCORIS's documentation of its arguments and presets
    """
    preset = settings.get("apply_preset", settings.get("preset")) or {}
    if not isinstance(preset, Mapping):
        raise PeftTypeError(
            f"The preset {preset!r} must be a dictionary; names of presets are LyCORIS's own."
        )
    unknown = sorted(set(settings) - _READ - set(_FIELDS) - _WITHOUT_EFFECT) + sorted(
        set(preset) - _PRESET
    )
    if unknown:
        raise PeftTypeError(
            f"LyCORIS's LoKr has no setting {', '.join(map(repr, unknown))} that is known here."
        )
    modules = own_modules(model)
    chosen = {path: {**settings, **own} for path, own in _chosen(modules, preset).items()}
    for path, own in chosen.items():
        if str(own.get("algo", "lokr")).lower() not in ("lokr", "kron"):
            raise PeftValueError(
                f"`{path}`: the settings ask for {own['algo']!r}; this is for LoKr alone."
            )
    sized = {
        path: (own, size)
        for path, own in chosen.items()
        if (size := geometry(modules[path])) is not None
    }
    with_conv = preset.get("enable_conv", True)
    layers = {
        path: _layer(own, size)
        for path, (own, size) in sized.items()
        if with_conv or not _is_spatial(size)
    }
    if not layers:
        raise PeftValueError("The settings mean no linear or convolutional layer of the model.")
    return _config(settings, layers, list(modules))


def _config(
    settings: Mapping[str, Any],
    layers: Mapping[str, tuple[int, float, tuple[int, int]]],
    paths: list[str],
) -> LoKrConfig:
    ranks, alphas = (
        {path: layer[0] for path, layer in layers.items()},
        {path: layer[1] for path, layer in layers.items()},
    )
    pairs: dict[str, Any] = {path: list(layer[2]) for path, layer in layers.items()}
    r, alpha = (
        Counter(ranks.values()).most_common(1)[0][0],
        Counter(alphas.values()).most_common(1)[0][0],
    )
    targets, excluded = exactly(list(layers), paths)
    return LoKrConfig(
        r=r,
        alpha=alpha,
        rank_pattern=patterns(ranks, r),
        alpha_pattern=patterns(alphas, alpha),
        factor_pattern=patterns(pairs, None),
        target_modules=targets,
        exclude_modules=excluded,
        init_weights="lycoris",
        **{ours: settings[theirs] for theirs, ours in _FIELDS.items() if theirs in settings},
    )


def _chosen(
    modules: Mapping[str, nn.Module], preset: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The modules that a preset means, with the settings it has for each."""
    by_class, by_name = preset.get("module_algo_map", {}), preset.get("name_algo_map", {})
    plain = not any(
        key in preset
        for key in ("target_module", "target_name", "module_algo_map", "name_algo_map")
    )
    classes = {
        *preset.get("target_module", ["Linear", "Conv1d", "Conv2d", "Conv3d"] if plain else []),
        *by_class,
    }
    names = [*by_name, *preset.get("target_name", [])]
    excluded = preset.get("exclude_name", [])

    def fits(pattern: str, path: str) -> bool:
        same = path == pattern
        return same or (
            fnmatch.fnmatch(path, pattern)
            if preset.get("use_fnmatch")
            else re.match(pattern, path) is not None
        )

    def named(path: str) -> str | None:
        return next((pattern for pattern in names if fits(pattern, path)), None)

    def kept(path: str) -> bool:
        return path in modules and not any(fits(pattern, path) for pattern in excluded)

    result: dict[str, dict[str, Any]] = {}
    for path in filter(kept, modules):
        places = [*(path[:i] for i, sign in enumerate(path) if sign == "."), path]
        kinds = [type(modules[place]).__name__ if place in modules else "" for place in places]
        # The outermost module of a class that is meant comes first, with the settings of the
        # innermost that has some.
        start = next(
            (
                i
                for i, place in enumerate(places)
                if kinds[i] in classes and kept(place) and named(place) is None
            ),
            None,
        )
        if start is not None:
            own = next((kind for kind in reversed(kinds[start:]) if kind in by_class), None)
            result[path] = _translated(by_class.get(own, {}))
        elif (pattern := named(path)) is not None:
            result[path] = _translated(by_name.get(pattern, {}))
    return result


def _translated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of single modules, which have one rank and alpha for all kinds of layers."""
    result = {name: value for name, value in settings.items() if name not in ("dim", "alpha")}
    if settings.get("dim"):
        result |= {"linear_dim": settings["dim"], "conv_dim": settings["dim"]}
    if settings.get("alpha"):
        result |= {"linear_alpha": settings["alpha"], "conv_alpha": settings["alpha"]}
    return result


def _layer(settings: Mapping[str, Any], size: Geometry) -> tuple[int, float, tuple[int, int]]:
    """Rank, alpha and the size of `W1` of one layer. A factor above the square root is swapped
    there, and where both sides are whole alpha is the rank.
    """
    r, alpha = int(settings.get("linear_dim") or 4), float(settings.get("linear_alpha", 1) or 0)
    if _is_spatial(size):
        r, alpha = int(settings.get("conv_dim") or r), float(settings.get("conv_alpha") or alpha)
    factor = int(settings.get("factor", -1))
    (a, c), (b, d) = (
        sorted(factorization(n, factor)) for n in (size.out_features, size.in_features)
    )
    if settings.get("unbalanced_factorization"):
        a, c = c, a
    whole = 2 * r >= max(c, d) and not (settings.get("decompose_both") and 2 * r < max(a, b))
    alpha = float(r) if whole or not alpha else alpha
    return r, int(alpha) if alpha == int(alpha) else alpha, (a, b)


def _is_spatial(size: Geometry) -> bool:
    """Whether a convolution counts as one with a kernel, by its first size as there."""
    return bool(size.kernel_size) and size.kernel_size[0] != 1
