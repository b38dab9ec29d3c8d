# SPDX-License-Identifier: Apache-2.0
"""The modules that FSDP1 wraps by themselves."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from torch import nn

from ..base.containers import walk
from ..base.errors import PeftTypeError


def unsplit_classes(model: nn.Module) -> set[str]:
    """Return the names of the module classes that a transformers model, or a model in it, keeps on
    one device.
    """
    names: set[str] = set()
    for _, module in walk(model):
        names.update(getattr(type(module), "_no_split_modules", None) or ())
        names.update(vars(module).get("_no_split_modules") or ())
    return names


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Return an auto-wrap policy for FSDP1 that wraps each transformer block, and each trainable
    leaf with a `weight`, so that it is kept apart from frozen weights.

    The blocks are of the classes that the environment variable `FSDP_TRANSFORMER_CLS_TO_WRAP` names
    (separated by commas), by default of those in the model's `_no_split_modules`.

    Args:
        model: A `PeftModel`, or any model.

    Raises:
        PeftTypeError: The model has no module of a class that the variable names.
    """
    from torch.distributed.fsdp.wrap import (
        _or_policy,
        lambda_auto_wrap_policy,
        transformer_auto_wrap_policy,
    )

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = unsplit_classes(model) if named is None else set(filter(None, named.split(",")))
    classes = {type(module) for module in model.modules() if type(module).__name__ in names}
    missing = names - {cls.__name__ for cls in classes}
    if missing and named is not None:
        raise PeftTypeError(
            "Could not find the transformer layer class to wrap in the model: "
            f"{', '.join(sorted(missing))}, from the environment variable "
            "`FSDP_TRANSFORMER_CLS_TO_WRAP`."
        )
    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trainable_leaf)
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return functools.partial(_or_policy, policies=[leaves, blocks])


def _is_trainable_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not module._modules and weight is not None and weight.requires_grad
