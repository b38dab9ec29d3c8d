# SPDX-License-Identifier: Apache-2.0
"""Weights that a layer computes in each forward: `torch.nn.utils.parametrize`, `weight_norm`,
`spectral_norm`, `prune`.

Such a weight is not a parameter of the layer, and a value written into it is lost with the next
forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..base.errors import PeftNotSupportedError, warn
from ..base.tensors import ordinary_tensors

_Hook: TypeAlias = WeightNorm | SpectralNorm | prune.BasePruningMethod

_REMEDIES = (
    (WeightNorm, "torch.nn.utils.remove_weight_norm(layer)"),
    (SpectralNorm, "torch.nn.utils.remove_spectral_norm(layer)"),
    (prune.BasePruningMethod, 'torch.nn.utils.prune.remove(layer, "weight")'),
)


def is_computed(module: nn.Module) -> bool:
    """Return whether a layer's weight is a tensor, but not a parameter or buffer of the layer."""
    own = module.__dict__
    return (
        "weight" not in own["_parameters"]
        and "weight" not in own["_buffers"]
        and isinstance(getattr(module, "weight", None), Tensor)
    )


def read(module: nn.Module) -> Tensor:
    """Return a computed weight as it is in evaluation, without changing anything."""
    if parametrize.is_parametrized(module, "weight"):
        parts = list(_parametrizations(module)["weight"].modules())
        modes = [part.training for part in parts]
        try:
            for part in parts:
                part.training = False
            return cast(Tensor, module.weight)
        finally:
            for part, mode in zip(parts, modes, strict=True):
                part.training = mode
    hook = _hook(module)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(module)
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False)
    return cast(Tensor, module.weight) if hook is None else hook.apply_mask(module)


def refuse(module: nn.Module) -> None:
    """Raise `PeftNotSupportedError` if the layer's weight is computed: it can't be written to."""
    if is_computed(module):
        raise PeftNotSupportedError(
            f"{type(module).__name__} computes its weight in each forward, so a delta merged into "
            f"it would be lost; make it a parameter first, by {_remedy(module)}, or use "
            "`merge_and_unload`, which does so."
        )


@contextmanager
def made_plain(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context for a permanent merge: make computed weights parameters; an error undoes it.

    Raises:
        PeftNotSupportedError: It is unknown how some layer computes its weight.
    """
    computed = [module for module in modules if is_computed(module)]
    unknown = [
        m for m in computed if not parametrize.is_parametrized(m, "weight") and _hook(m) is None
    ]
    if unknown:
        refuse(unknown[0])
    before = [(module, module.__class__, _shallow(vars(module))) for module in computed]
    if computed:
        kinds = ", ".join(sorted({type(module).__name__ for module in computed}))
        warn(
            f"Making the computed weights of {len(computed)} layers ({kinds}) plain parameters, to "
            "merge into them."
        )
    try:
        for module in computed:
            make_plain(module)
        yield
    except BaseException:
        for module, kind, entries in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(entries)
        raise


def make_plain(module: nn.Module) -> None:
    """Turn a layer's computed weight into a parameter."""
    if not is_computed(module):
        return
    with ordinary_tensors():
        weight = read(module).detach().clone()
    if parametrize.is_parametrized(module, "weight"):
        own = _parametrizations(module)["weight"].parameters(recurse=False)
        trained = any(p.requires_grad for p in own)
        _drop_parametrization(module)
    else:
        hook = _hook(module)
        trained = any(
            p.requires_grad
            for name, p in module._parameters.items()
            if p is not None and name.startswith("weight_")
        )
        if isinstance(hook, WeightNorm):
            nn.utils.remove_weight_norm(module)
        elif isinstance(hook, SpectralNorm):
            nn.utils.remove_spectral_norm(module)
        else:
            prune.remove(module, "weight")
    for held in (module._parameters, module._buffers, vars(module)):
        held.pop("weight", None)
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=trained))


def _drop_parametrization(module: nn.Module) -> None:
    """Remove the weight's parametrization, but keep the class, which copies of the layer share."""
    made, plain = module.__class__, parametrize.type_before_parametrizations(module)
    others = {name: part for name, part in _parametrizations(module).items() if name != "weight"}
    if not others:
        del module._modules["parametrizations"]
        module.__class__ = plain
        return
    entries = {
        name: value
        for name, value in vars(made).items()
        if name not in ("weight", "__dict__", "__weakref__")
    }
    module.__class__ = type(made.__name__, (plain,), entries)
    module._modules["parametrizations"] = nn.ModuleDict(others)


def _parametrizations(module: nn.Module) -> nn.ModuleDict:
    return cast(nn.ModuleDict, module.parametrizations)


def _hook(module: nn.Module) -> _Hook | None:
    """Return the last hook of `weight_norm`, `spectral_norm` or `prune` on the weight."""
    found = None
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", getattr(hook, "_tensor_name", None))
        if isinstance(hook, _Hook) and name == "weight":
            found = hook
    return found


def _remedy(module: nn.Module) -> str:
    if parametrize.is_parametrized(module, "weight"):
        return '`torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")`'
    hook = _hook(module)
    return next(
        (f"`{text}`" for kind, text in _REMEDIES if isinstance(hook, kind)),
        "giving it an `nn.Parameter`",
    )


def _shallow(entries: dict[str, object]) -> dict[str, object]:
    return {
        name: value.copy() if isinstance(value, dict) else value for name, value in entries.items()
    }
