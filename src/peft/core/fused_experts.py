# SPDX-License-Identifier: Apache-2.0
"""Calls of modules with adapted parameters: the experts of transformers' mixtures without the dense
sums `W + ΔW`, all other modules with them.

transformers keeps the experts of a mixture in stacks `[experts, …]`, and computes them by one of
several interchangeable functions of hidden states, indices of the chosen experts and their weights.
`_run_experts` is one more such function, which adds to each product the low-rank product of the
row's expert. It knows the token of each row, so that each sample keeps its own adapter and task.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..base.calls.adapter_batch import ADAPTER_BATCHES, AdapterBatch
from ..ops.dispatch import PLAIN_TENSORS
from ..ops.grouped import GroupedRows
from .adapted_parameters import AdaptingLayer, layers_of, plain_parameter, shared_sums

_Experts: TypeAlias = Any
"""The experts of a mixture of transformers."""

_INTERFACE = "transformers.integrations.moe"
# Functions of the interface that are torch's products alone.
_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def run(
    module: nn.Module,
    names: tuple[str, ...] | None,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> object:
    """Call a module with the active adapters of its parameters; `names` are its
    `interface_names`.
    """
    held = layers_of(module)
    batch = ADAPTER_BATCHES.current
    is_mixed = batch is not None and batch.only is None
    if not is_mixed and not any(inner.acting() for layers in held.values() for inner in layers):
        return module(*args, **kwargs)
    call = None if names is None else _expert_call(module, names, args, kwargs)
    if call is not None and _is_worth_it(held, is_mixed):
        return _run_experts(module, *call, batch if is_mixed else None)
    with shared_sums():
        return module(*args, **kwargs)


def _is_worth_it(held: dict[str, list[AdaptingLayer]], is_mixed: bool) -> bool:
    """Return whether the products of rows replace the module's own function."""
    stacks = [layer for layers in held.values() for layer in layers]
    if not all(layer.is_stacked for layer in stacks):
        return False
    if is_mixed or any(layer.depends_on_sample for layer in stacks):
        return True
    # Without a kernel under a compiler, rows would be multiplied by a copy of a matrix each.
    return not torch.compiler.is_compiling() or stacks[0].get_param().dtype == torch.bfloat16


def _expert_call(
    module: nn.Module, names: tuple[str, ...], args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return hidden states, chosen experts and weights of a call of transformers' experts; None
    where hooks or another implementation do more than the products.
    """
    own: _Experts = module
    if (
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or own._is_expert_parallel
        or own.config._experts_implementation not in _IMPLEMENTATIONS
    ):
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    values = [value for name in names if isinstance(value := given.get(name), Tensor)]
    if len(args) + len(kwargs) != 3 or len(values) != 3:
        return None
    hidden, index, weights = values
    is_flat = hidden.dim() == 2 and index.dim() == 2
    is_plain = all(
        type(plain_parameter(module, name)) in PLAIN_TENSORS
        for name in (*_projections(own), *layers_of(module))
    )
    return (hidden, index, weights) if is_flat and is_plain else None


def interface_names(kind: type) -> tuple[str, ...] | None:
    """Return the names of the three arguments of transformers' experts, None for other modules."""
    forward = getattr(kind, "forward", None)
    if forward is None or getattr(forward, "__globals__", {}).get("__name__") != _INTERFACE:
        return None
    names = tuple(inspect.signature(forward).parameters)[1:]
    return names if len(names) == 3 else None


def _projections(module: _Experts) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _run_experts(
    module: _Experts, hidden: Tensor, index: Tensor, weights: Tensor, batch: AdapterBatch | None
) -> Tensor:
    """Return the output of transformers' experts, `[tokens, hidden]`.

    Args:
        module: The experts.
        hidden: `[tokens, hidden]`.
        index: The chosen experts of each token, `[tokens, k]`.
        weights: Their weights, `[tokens, k]`.
        batch: The adapter of each sample, if they differ.
    """
    up, down = _projections(module)
    choices = index.shape[-1]
    expert, order = index.reshape(-1).sort()
    rows = GroupedRows(expert, order // choices, hidden, plain_parameter(module, up).shape[0])
    x = _project(module, up, hidden[rows.token], rows, batch)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _project(module, down, x, rows, batch)
    if module.has_post_expert_norm:
        x = module.post_expert_norm(x)
    x = x * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return x[back].view(hidden.shape[0], choices, -1).sum(1).to(hidden.dtype)


def _project(
    module: _Experts, name: str, x: Tensor, rows: GroupedRows, batch: AdapterBatch | None
) -> Tensor:
    """Return the product of rows with a stack, its bias and the deltas of its adapters."""
    weight = plain_parameter(module, name)
    x = x.to(weight.dtype)
    result = rows.product(x, weight if module.is_transposed else weight.mT)
    if module.has_bias:
        bias_name = f"{name}_bias"
        result = result + getattr(module, bias_name)[rows.expert]
    for layer in layers_of(module).get(name, ()):
        for adapter_name, share in _shares(layer, rows, batch):
            delta = layer.expert_delta(adapter_name, x, rows)
            result = result + (delta if share is None else delta * share.to(delta.dtype))
    return result


def _shares(
    layer: AdaptingLayer, rows: GroupedRows, batch: AdapterBatch | None
) -> Sequence[tuple[str, Tensor | None]]:
    """Return the adapters that act on a parameter, with `[rows, 1]`, 1 where a row's sample has
    this adapter; None for all rows.
    """
    if batch is None:
        return [(name, None) for name in layer.acting()]
    if layer.disable_adapters:
        return []
    names = [name for name in batch.samples if name in layer.scaling]
    if not names:
        return []
    owners, found = batch.row_owners(rows.tokens, layer), []
    for name in names:
        flags = [0] * batch.size
        for sample in batch.samples[name]:
            flags[sample] = 1
        chosen = batch.index_tensor(tuple(flags), rows.tokens.device)
        found.append((name, rows.of_samples(chosen, owners).unsqueeze(-1)))
    return found
