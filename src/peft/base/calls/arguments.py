# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of a call's arguments, and the number of samples that they show."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..containers import walk
from ..tracing import untraced

# Keyword arguments under which models take the tensor whose rows are the samples.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "inputs")
# Arguments whose sizes need not be those of samples and tokens.
NO_TOKENS = re.compile(r"mask|position|grid|_sizes|cu_seq|bbox")


class ArgumentShape(NamedTuple):
    """The shape of an argument of a call."""

    name: str
    sizes: tuple[int, ...]
    is_floating: bool


def argument_shapes(
    arguments: Mapping[str, object], excluded: Iterable[str] = ()
) -> list[ArgumentShape]:
    """Return the shapes of a call's tensors, `excluded` arguments left out."""
    result = []
    for name, value in arguments.items():
        if name == "encoder_outputs" and isinstance(value, (tuple, Mapping)) and len(value):
            name, value = "encoder_hidden_states", value[0]
        if isinstance(value, Tensor) and value.dim() > 0 and name not in excluded:
            with untraced():  # a nested tensor may have no `shape`
                sizes = (value.size(0),) if value.is_nested else tuple(value.shape)
            result.append(ArgumentShape(name, sizes, value.is_floating_point()))
    return result


def count_samples(shapes: Iterable[ArgumentShape], batch_dim: int = 0) -> int | None:
    """Return the number of samples, by an argument with a known name or by tokens, or None."""
    fitting = {name: sizes for name, sizes, _ in shapes if len(sizes) > batch_dim}
    likely = [name for name in fitting if not NO_TOKENS.search(name)]
    for name in (*_INPUTS, *likely, *fitting):
        if name in fitting:
            return fitting[name][batch_dim]
    return None


def positional_names(function: Callable[..., object]) -> tuple[str, ...]:
    """Return the names of a function's arguments that can be passed by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )


def bind_arguments(
    names: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """Return a call's arguments by name; those beyond `names` by index, mappings by entry."""
    bound: dict[str, object] = {}
    for i, value in enumerate(args):
        if isinstance(value, Mapping):
            bound.update(value)
        else:
            bound[names[i] if i < len(names) else str(i)] = value
    return {**bound, **kwargs}


def generation_option(root: nn.Module, arguments: Mapping[str, object], name: str) -> object:
    """Return an option of `generate`, as passed or from a generation config."""
    for config in (arguments.get("generation_config"), getattr(root, "generation_config", None)):
        if arguments.get(name) is None and getattr(config, name, None) is not None:
            return getattr(config, name)
    return arguments.get(name)


def entry_modules(root: nn.Module) -> list[nn.Module]:
    """Return the modules that `generate` calls directly, the encoder or an inner model included."""
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        get_encoder = getattr(root, "get_encoder", None)
        parts = [] if get_encoder is None else [get_encoder()]
    else:
        parts = [
            module for _, module in walk(root) if callable(getattr(type(module), "generate", None))
        ]
    return [root, *(part for part in parts if isinstance(part, nn.Module) and part is not root)]
