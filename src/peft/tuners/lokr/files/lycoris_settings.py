# SPDX-License-Identifier: Apache-2.0
"""LyCORIS's settings and presets as a `LoKrConfig`."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from ....base.errors import PeftTypeError, PeftValueError
from ....base.geometry import Geometry
from ....base.modules import check_model
from ....base.validation import name_list
from ....core.base_layer import geometry
from ....core.plan import own_modules
from ....core.targets import exactly, patterns
from ..config import LoKrConfig
from ..shapes import factorization
from .placement import most_common

Settings = Mapping[str, Any]

# LyCORIS's settings that are fields of a config, with the field's name.
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
# Settings that are read for each layer.
_READ = {
    "linear_dim", "linear_alpha", "conv_dim", "conv_alpha", "factor", "unbalanced_factorization",
    "algo", "apply_preset", "preset",
}  # fmt: skip
_WITHOUT_EFFECT = {"multiplier", "bypass_mode", "warn_on_unmatched"}
_PRESET = {
    "enable_conv", "target_module", "target_name", "exclude_name", "module_algo_map",
    "name_algo_map", "use_fnmatch", "lora_prefix",
}  # fmt: skip
_LAYER_CLASSES = ("Linear", "Conv1d", "Conv2d", "Conv3d")


def lokr_config_from_lycoris(model: nn.Module, settings: Settings) -> LoKrConfig:
    """Return the config of the adapter that LyCORIS would make with these settings.

    Args:
        model: The model that the adapter is for; it is not changed.
        settings: Arguments of LyCORIS's `create_lycoris`, as in SimpleTuner's
            `lycoris_config.json`: `algo`, `linear_dim`, `linear_alpha`, `conv_dim`, `conv_alpha`,
            `factor`, `full_matrix`, …, and a preset as a dictionary under `apply_preset` (or
            `preset`). A preset has classes (`target_module`) and names (`target_name`) of modules
            to adapt, with wildcards if `use_fnmatch`; names to leave out (`exclude_name`); settings
            by class or name (`module_algo_map`, `name_algo_map`). Without a preset all linear and
            convolutional layers are adapted.

    Raises:
        PeftTypeError: A setting is unknown.
        PeftValueError: The settings ask for another method than LoKr, or mean no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 64))
        >>> preset = {"target_name": ["1*"], "use_fnmatch": True}
        >>> settings = {"algo": "lokr", "linear_dim": 1, "apply_preset": preset}
        >>> config = lokr_config_from_lycoris(model, settings)
        >>> config.target_modules, config.r
        ({'1'}, 1)

    Source: arXiv:2309.14859; LyCORIS's documentation of its arguments and presets
    """
    check_model(model)
    if not isinstance(settings, Mapping):
        raise PeftTypeError(f"`settings`={settings!r} must be a dictionary of LyCORIS's arguments.")
    preset = settings.get("apply_preset", settings.get("preset")) or {}
    if not isinstance(preset, Mapping):
        raise PeftTypeError(
            f"The preset {preset!r} must be a dictionary; names of presets are LyCORIS's own."
        )
    known = _READ | _FIELDS.keys() | _WITHOUT_EFFECT
    if unknown := [*sorted(settings.keys() - known), *sorted(preset.keys() - _PRESET)]:
        raise PeftTypeError(
            f"LyCORIS's LoKr has no setting {', '.join(map(repr, unknown))} that is known here."
        )
    for key in ("target_module", "target_name", "exclude_name"):
        for problem in name_list(key, preset.get(key)):
            raise PeftTypeError(problem)
    for key in ("module_algo_map", "name_algo_map"):
        given = preset.get(key) or {}
        if not isinstance(given, Mapping) or not all(
            isinstance(v, Mapping) for v in given.values()
        ):
            raise PeftTypeError(f"`{key}`={given!r} must be a dictionary, name → settings.")
    modules = own_modules(model)
    layers: dict[str, _Layer] = {}
    for path, own in _Preset(preset).choose(modules).items():
        own = {**settings, **own}
        if str(own.get("algo", "lokr")).lower() not in ("lokr", "kron"):
            raise PeftValueError(
                f"`{path}`: the settings ask for {own['algo']!r}; this is for LoKr alone."
            )
        size = geometry(modules[path])
        if size is not None and (preset.get("enable_conv", True) or not _is_spatial(size)):
            layers[path] = _layer(own, size)
    if not layers:
        raise PeftValueError("The settings mean no linear or convolutional layer of the model.")
    return _config(settings, layers, modules)


class _Layer(NamedTuple):
    """Rank, alpha and size of `W1` of one layer."""

    r: int
    alpha: float
    w1_size: tuple[int, int]


class _Preset:
    """A preset of LyCORIS: the modules to adapt, by class or by name, and settings of their own."""

    def __init__(self, preset: Settings) -> None:
        self.by_class: Mapping[str, Settings] = preset.get("module_algo_map") or {}
        self.by_name: Mapping[str, Settings] = preset.get("name_algo_map") or {}
        chooses = ("target_module", "target_name", "module_algo_map", "name_algo_map")
        default = () if any(key in preset for key in chooses) else _LAYER_CLASSES
        self.classes = {*(preset.get("target_module", default) or ()), *self.by_class}
        self.names = [*self.by_name, *(preset.get("target_name") or ())]
        self.excluded = preset.get("exclude_name") or ()
        self.wildcards = bool(preset.get("use_fnmatch"))

    def fits(self, pattern: str, path: str) -> bool:
        """Return whether a name of the preset means the module at a path."""
        if path == pattern:
            return True
        if self.wildcards:
            return fnmatch.fnmatch(path, pattern)
        return re.match(pattern, path) is not None

    def name_of(self, path: str) -> str | None:
        """Return the first name that means the module at a path, None if there is none."""
        return next((pattern for pattern in self.names if self.fits(pattern, path)), None)

    def excludes(self, path: str) -> bool:
        """Return whether the module at a path is to be left out."""
        return any(self.fits(pattern, path) for pattern in self.excluded)

    def choose(self, modules: Mapping[str, nn.Module]) -> dict[str, Settings]:
        """Return the settings of each module to adapt, by path.

        LyCORIS looks for modules of the classes first, from the outside in. It adapts all modules
        inside the first that it finds, with the settings of the innermost class that has any. Names
        come second.
        """
        result: dict[str, Settings] = {}
        for path in modules:
            if self.excludes(path):
                continue
            above = [*(path[:i] for i, sign in enumerate(path) if sign == "."), path]
            kinds = [type(modules[outer]).__name__ if outer in modules else "" for outer in above]
            meant = (
                i
                for i, outer in enumerate(above)
                if kinds[i] in self.classes
                and not self.excludes(outer)
                and self.name_of(outer) is None
            )
            start = next(meant, None)
            if start is not None:
                own = next((kind for kind in reversed(kinds[start:]) if kind in self.by_class), "")
                result[path] = _as_model_settings(self.by_class.get(own, {}))
            elif (pattern := self.name_of(path)) is not None:
                result[path] = _as_model_settings(self.by_name.get(pattern, {}))
        return result


def _as_model_settings(settings: Settings) -> Settings:
    """Return settings of a module in the names of settings of a model: `linear_dim` and `conv_dim`
    for `dim`, `linear_alpha` and `conv_alpha` for `alpha`.
    """
    result = {name: value for name, value in settings.items() if name not in ("dim", "alpha")}
    for name in ("dim", "alpha"):
        if settings.get(name):
            result |= {f"linear_{name}": settings[name], f"conv_{name}": settings[name]}
    return result


def _layer(settings: Settings, size: Geometry) -> _Layer:
    """Return the options of one layer. LyCORIS swaps a factor above the square root, and takes the
    rank for alpha if both sides are full.
    """
    r, alpha = int(_number(settings, "linear_dim") or 4), _number(settings, "linear_alpha", 1) or 0
    if _is_spatial(size):
        r, alpha = int(_number(settings, "conv_dim") or r), _number(settings, "conv_alpha") or alpha
    factor = int(_number(settings, "factor", -1))
    (a, c), (b, d) = (
        sorted(factorization(n, factor)) for n in (size.out_features, size.in_features)
    )
    if settings.get("unbalanced_factorization"):
        a, c = c, a
    is_full = 2 * r >= max(c, d) and not (settings.get("decompose_both") and 2 * r < max(a, b))
    alpha = float(r) if is_full or not alpha else alpha
    return _Layer(r, int(alpha) if alpha == int(alpha) else alpha, (a, b))


def _number(settings: Settings, name: str, default: float = 0) -> float:
    """Return a setting that is a number, or a text of one as in commands."""
    value = settings.get(name, default)
    try:
        number = float(value or 0)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise PeftValueError(f"`{name}`={value!r} must be a finite number.")
    return number


def _is_spatial(size: Geometry) -> bool:
    """Return whether LyCORIS counts a layer as a convolution with a kernel: by its first size."""
    return bool(size.kernel_size) and size.kernel_size[0] != 1


def _config(settings: Settings, layers: Mapping[str, _Layer], paths: Collection[str]) -> LoKrConfig:
    ranks = {path: layer.r for path, layer in layers.items()}
    alphas = {path: layer.alpha for path, layer in layers.items()}
    r, alpha = most_common(ranks), most_common(alphas)
    targets, excluded = exactly(list(layers), paths)
    return LoKrConfig(
        r=r,
        alpha=alpha,
        rank_pattern=patterns(ranks, r),
        alpha_pattern=patterns(alphas, alpha),
        factor_pattern=patterns({path: list(own.w1_size) for path, own in layers.items()}, None),
        target_modules=targets,
        exclude_modules=excluded,
        init_weights="lycoris",
        **{ours: settings[theirs] for theirs, ours in _FIELDS.items() if theirs in settings},
    )
