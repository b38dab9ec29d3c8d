# SPDX-License-Identifier: Apache-2.0
"""The steps of an injection that concern starts from the base weight (`starts/`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from ...base.errors import PeftNotSupportedError, PeftValueError, warn
from ...base.geometry import Geometry
from ...base.suggestions import listed
from ...checkpoint.hub import load_peft_weights
from ...core.base_layer import innermost, is_linear, layer_of
from ...core.combining import outer_path
from ...core.injection import Build, Construction
from ...core.plan import Plan
from ...core.tuner import BaseTuner
from ...core.weights import is_quantized, put_weight
from .base import LoraLayer
from .config import LoraConfig
from .factors import Factors
from .starts.files import start_of
from .starts.first import EIGENS, GRADIENT, LEFT_ON_LAYERS
from .starts.kinds import FROM_DATA, IN_FILE

_DATA = {"corda": (EIGENS, "preprocess_corda"), "lora_ga": (GRADIENT, "preprocess_loraga")}


def problems(config: LoraConfig, size: Geometry, r: int, alpha: float) -> Iterator[str]:
    """Yield reasons why a linear or convolutional layer can't have a config's start."""
    start = config.init_lora_weights
    if not config.starts_from_weight and start != "orthogonal":
        return
    if size.is_conv:
        if start != "lora_ga":
            yield f"`init_lora_weights`={start!r} is for linear layers, not for convolutions."
    elif config.starts_from_weight:
        values, largest = (
            (2 * r if start == "lora_ga" else r),
            min(size.in_features, size.out_features),
        )
        if values > largest:
            needed = "`r`" if values == r else "2 · `r`"
            yield f"{needed}={values} is more than the {largest} singular values of the weight."
        if alpha <= 0:
            yield f"`init_lora_weights`={start!r} needs a positive alpha, found {alpha!r}."


def check(plan: Plan[LoraConfig], construction: Construction) -> None:
    """Check that the layers of a new adapter have what its start needs.

    Raises:
        PeftValueError: The data of a start were not collected, or adapters are merged.
        PeftNotSupportedError: A weight that is to be quantized is quantized already.
    """
    config = plan.config
    how = config.init_lora_weights
    layers = {path: m for path, m in plan.targets.items() if is_linear(m)}
    if how in FROM_DATA and construction.initialize and config.start != IN_FILE:
        attribute, function = _DATA[str(how)]
        missing = [path for path, m in layers.items() if not hasattr(innermost(m), attribute)]
        if missing and (how == "corda" or len(missing) == len(layers)):
            raise PeftValueError(
                f"`init_lora_weights`={how!r} starts from data that was not collected for "
                f"{_quoted(missing)}; call `{function}(model, config, …)` first, with the same "
                "targets."
            )
    if config.quantizes_weight:
        _check_quantizing(layers, construction)


def _check_quantizing(layers: Mapping[str, nn.Module], construction: Construction) -> None:
    """Check that an adapter may quantize the weights of some layers."""
    packed = [path for path, m in layers.items() if is_quantized(m)]
    if packed and construction.initialize:
        raise PeftNotSupportedError(
            f"`init_lora_weights`='loftq' quantizes the base weight, and {_quoted(packed)} are "
            "quantized; make the adapter with True, and call `replace_lora_weights_loftq`."
        )
    present = {path: layer_of(m, LoraLayer) for path, m in layers.items()}
    if merged := [
        path for path, layer in present.items() if layer is not None and layer.has_merges
    ]:
        raise PeftValueError(
            "`init_lora_weights`='loftq' quantizes the base weight, and adapters are merged into "
            f"that of {_quoted(merged)}; call `unmerge_adapter` first."
        )
    names = dict.fromkeys(name for layer in present.values() if layer for name in layer.scaling)
    if names and construction.initialize:
        warn(
            "`init_lora_weights`='loftq' quantizes the base weight, which changes what the model "
            f"computes with {', '.join(names)} too."
        )


def put(model: nn.Module, build: Build[LoraConfig]) -> None:
    """Put quantized weights into the base layers of a new adapter, and remove what it used up."""
    if build.config.start == IN_FILE:
        build.config.start = None  # the layers have it now
    for path, layer in build.layers.items():
        assert isinstance(layer, LoraLayer)
        base = innermost(model.get_submodule(path))
        if layer.quantized_weight is not None:
            dense = layer.geometry.as_stored(layer.quantized_weight.dense())
            put_weight(base, dense.to(base.get_parameter("weight").dtype))
            layer.quantized_weight = None
        for attribute in LEFT_ON_LAYERS:
            vars(base).pop(attribute, None)


def saved(tuner: BaseTuner[LoraConfig], config: LoraConfig) -> Mapping[str, Factors]:
    """Return the start in the file of an adapter's config, by layer; nothing for other starts."""
    if config.start != IN_FILE:
        return {}
    if config.source is None:
        raise PeftValueError(
            "The config does not tell the file that has the adapter's start; read it with "
            "`LoraConfig.from_pretrained`."
        )
    place, hub = config.source
    state = load_peft_weights(place, device="cpu", **hub)
    return start_of(*tuner.present_names(config, state))


def replace_starts(
    layers: Mapping[str, nn.Module], name: str, starts: Mapping[str, Factors]
) -> None:
    """Give an adapter the start of another file."""
    for path, layer in layers.items():
        start = starts.get(outer_path(path))
        if start is not None and isinstance(layer, LoraLayer) and name in layer.lora_start:
            for buffer, value in zip(layer.lora_start[name].buffers(), start, strict=True):
                buffer.copy_(value)


def _quoted(paths: Iterable[str]) -> str:
    """Return paths for a message."""
    return listed(map("`{}`".format, paths))
