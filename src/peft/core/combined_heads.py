# SPDX-License-Identifier: Apache-2.0
"""Combine the modules and embedding rows that several adapters train in full, for example heads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..base.errors import PeftTypeError, PeftValueError
from ..base.plain_values import JsonObject
from ..base.suggestions import did_you_mean
from ..checkpoint.keys import companion_tensors, in_view
from ..config import TargetedConfig
from ..integrations.distributed import state_tensors

# Each adapter's tensors by checkpoint key.
Parts = Mapping[str, Mapping[str, Tensor]]
# Values of `heads` in addition to adapters' names. An adapter of such a name takes precedence.
MEAN, STACK = "mean", "stack"


def fields_of(configs: Iterable[TargetedConfig]) -> JsonObject:
    """Return the fields of a config that name all that some adapters train beside their layers."""
    every = list(configs)
    modules = dict.fromkeys(name for config in every for name in config.modules_to_save or ())
    rows = [c.trainable_token_indices for c in every if c.trainable_token_indices]
    return {
        "modules_to_save": list(modules) or None,
        "trainable_token_indices": rows[0] if rows else None,
    }


def collect(model: nn.Module, configs: Mapping[str, TargetedConfig]) -> Parts:
    """Return the modules and embedding rows that adapters train in full.

    Raises:
        PeftValueError: The adapters train different rows of embeddings.
    """
    rows = {
        name: config.trainable_token_indices
        for name, config in configs.items()
        if config.trainable_token_indices
    }
    if len({repr(indices) for indices in rows.values()}) > 1:
        raise PeftValueError(
            f"Adapters {', '.join(rows)} train different rows of embeddings, which can't be "
            "combined."
        )
    return {
        name: companion_tensors(state_tensors(model, in_view(config, name)).items(), config, name)
        for name, config in configs.items()
    }


def combine(
    parts: Parts,
    heads: str | None,
    weights: Mapping[str, float] | None = None,
    *,
    can_stack: bool = False,
) -> dict[str, Tensor]:
    """Combine the tensors that several adapters train beside their layers into one set.

    Args:
        parts: Each adapter's tensors by checkpoint key. A tensor of one adapter only is taken.
        heads: For tensors of several adapters that differ: "mean", or the name of the adapter whose
            tensor is taken. A name takes precedence over "mean".
        weights: Weights of the mean `Σ w·t / Σ w` by adapter, by default equal.
        can_stack: True if the caller can stack these heads too; for messages.

    Raises:
        PeftTypeError: `heads` is not a string.
        PeftValueError: Several train the same and `heads` is not given or names no adapter, or
            there is no mean.
    """
    choices = _choices(parts, can_stack)
    if heads is not None and not isinstance(heads, str):
        raise PeftTypeError(f"`heads`={heads!r} must be {choices}.")
    if heads == STACK not in parts:
        raise PeftValueError(
            f"`heads`={heads!r} is offered by `save_as_poly` and `convert_to_poly` alone, whose "
            f"tasks have labels of their own; here it must be {choices}."
        )
    if heads not in (None, MEAN, *parts):
        raise PeftValueError(
            f"`heads`={heads!r} must be {choices}.{did_you_mean(str(heads), [*parts, MEAN])}"
        )
    result: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for tensors in parts.values() for key in tensors):
        copies = {name: tensors[key] for name, tensors in parts.items() if key in tensors}
        if len(copies) == 1 or heads in copies or (heads is None and _are_equal(*copies.values())):
            taken = copies.get(heads or "", next(iter(copies.values())))
            result[key] = taken.detach().clone()
        elif heads is None or heads in parts:
            given = "" if heads is None else f", but {heads} (`heads`={heads!r}) does not"
            alike = len({tensor.shape for tensor in copies.values()}) == 1
            raise PeftValueError(
                f"Adapters {', '.join(copies)} each train a copy of `{key}`{given}. Choose one, or "
                f"combine them, by `heads`: {_choices(copies, can_stack, mean=alike)}."
            )
        else:
            remedy = f"pass as `heads` {_choices(copies, can_stack, mean=False)}"
            result[key] = _mean(key, copies, weights, remedy)
    return result


def _are_equal(first: Tensor, *others: Tensor) -> bool:
    """Return whether tensors hold the same numbers, as the rows of adapters before training do."""
    return all(torch.equal(first, other.to(first)) for other in others)


def _choices(names: Collection[str], can_stack: bool, mean: bool = True) -> str:
    """Return the values that `heads` may have, for messages."""
    words = [f"{MEAN!r}"] * (mean and MEAN not in names)
    words += [f"{STACK!r} (a head with the labels of all, see `TaskLabels`)"] * (
        can_stack and STACK not in names
    )
    return " or ".join(
        [*words, f"the name of the adapter whose copy is taken ({', '.join(map(repr, names))})"]
    )


def _mean(
    key: str, tensors: Mapping[str, Tensor], weights: Mapping[str, float] | None, remedy: str
) -> Tensor:
    """Return the weighted mean of tensors; raise if shapes differ or the weights sum to zero."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{list(tensor.shape)} ({name})" for name, tensor in tensors.items())
        raise PeftValueError(f"`{key}` has the shapes {shapes}, which have no mean; {remedy}.")
    first = next(iter(tensors.values()))
    if not (first.is_floating_point() or first.is_complex()):
        return first.clone()
    shares = {name: 1.0 if weights is None else weights[name] for name in tensors}
    total = sum(shares.values())
    if abs(total) < 1e-12:
        raise PeftValueError(
            f"`{key}`: the weights {shares} sum to zero, so there is no mean; {remedy}."
        )
    wide = torch.promote_types(first.dtype, torch.float32)
    summed = sum(
        (tensor.detach().to(first.device, wide) * shares[name] for name, tensor in tensors.items()),
        torch.zeros(()),
    )
    return (summed / total).to(first.dtype)
