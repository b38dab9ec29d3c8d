# SPDX-License-Identifier: Apache-2.0
"""Compare the keys, shapes and values of a checkpoint with the tensors that it is loaded into."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..base.constants import SEQ_CLS_HEAD_NAMES
from ..base.containers import walk
from ..base.errors import CheckpointError, PeftRuntimeError, warn
from ..base.suggestions import listed
from ..integrations.distributed import check_gathered


class LoadResult(NamedTuple):
    """Keys that are in only one of a checkpoint and an adapter."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def check_state(
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    ignore_mismatched_sizes: bool | None = None,
) -> LoadResult:
    """Compare a checkpoint with the tensors that it is loaded into.

    Args:
        ignore_mismatched_sizes: Warn about other shapes and count them as missing; None if the
            caller has no such option.

    Raises:
        CheckpointError: Shape or kind of a tensor differ, or two values of tied weights.
        PeftRuntimeError: ZeRO-3 has emptied a tensor.
    """
    check_gathered(expected.values(), written=True)
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    mismatched = {}
    for key, tensor in expected.items():
        if key not in state:
            continue
        if state[key].shape != tensor.shape:
            mismatched[key] = (
                f"size mismatch for {key}: found shape {list(state[key].shape)} in the checkpoint "
                f"and {list(tensor.shape)} in the model"
            )
        elif state[key].is_floating_point() != tensor.is_floating_point():
            mismatched[key] = (
                f"dtype mismatch for {key}: found {state[key].dtype}, the model has {tensor.dtype}"
            )
    _check_ties(expected, state)
    problems = "; ".join(mismatched.values())
    if mismatched and not ignore_mismatched_sizes:
        message = f"The checkpoint does not fit the model; nothing was loaded. {problems}."
        if number := _labels_in(expected, state):
            message += (
                f" The head in it has {number} labels: load the base model with "
                f"`num_labels={number}` (of a stacked head, `num_labels=labels.total`)."
            )
        if ignore_mismatched_sizes is not None:
            message += (
                " `ignore_mismatched_sizes=True` leaves these tensors as they are, and loads the "
                "others."
            )
        raise CheckpointError(message)
    if mismatched:
        warn(f"Not loaded, because you passed `ignore_mismatched_sizes=True`: {problems}")
    return LoadResult([*missing, *mismatched], unexpected)


def _check_ties(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint has one value for each tensor that the model has under two keys."""
    first: dict[int, str] = {}
    for key, tensor in expected.items():
        if key not in state:
            continue
        other = first.setdefault(id(tensor), key)
        if other != key and not state[key].is_meta and not torch.equal(state[key], state[other]):
            raise CheckpointError(
                f"{other} and {key} are one tied weight in the model, and differ in the "
                "checkpoint; nothing was loaded. Load the base model with weights of their own "
                "(`tie_word_embeddings=False`)."
            )


def _labels_in(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> int | None:
    """Return the number of labels of a checkpoint's head, if the model's has another number."""
    for key in expected.keys() & state.keys():
        own, given, path = expected[key].shape, state[key].shape, key.split(".")[:-1]
        is_head = bool(path) and path[-1] in SEQ_CLS_HEAD_NAMES and len(given) > 0
        if is_head and own[:1] != given[:1] and own[1:] == given[1:]:
            return given[0]
    return None


def check_complete(result: LoadResult, source: str, remedy: str = "") -> None:
    """Check that a checkpoint had all tensors of its adapter and no others."""
    if not result.missing_keys and not result.unexpected_keys:
        return
    parts = [f"'{source}' does not hold this adapter's weights; nothing was loaded."]
    if result.missing_keys:
        parts.append(f"Missing keys: {listed(result.missing_keys)}.")
    if result.unexpected_keys:
        parts.append(f"Unexpected keys: {listed(result.unexpected_keys)}.")
    raise CheckpointError(" ".join([*parts, *([remedy] if remedy else [])]))


def check_unmerged(model: nn.Module, targets: Collection[Tensor] | None = None) -> None:
    """Check that no adapter is merged into tensors to be written; None for the base model's."""
    ids = None if targets is None else {id(target) for target in targets}
    for path, module in walk(model):
        if not (names := vars(module).get("merged_adapters")):
            continue
        base = module.get_base_layer()  # type: ignore[operator]
        if ids is None or not ids.isdisjoint(map(id, base.parameters())):
            raise PeftRuntimeError(
                f"`{path}`: {', '.join(names)} is merged into the weight that is to be written; "
                "call `unmerge_adapter` first."
            )


def check_adapter_unmerged(model: nn.Module, adapter_name: str) -> None:
    """Check that an adapter is not merged, so that it can get new values."""
    if any(adapter_name in vars(module).get("merged_adapters", ()) for _, module in walk(model)):
        raise PeftRuntimeError(
            f"Adapter {adapter_name} is merged; call `unmerge_adapter` before loading into it."
        )


def warn_of_values(
    source: str,
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    masked: Collection[str] = (),
) -> None:
    """Warn about values that are NaN, infinite, or too large for the adapter's dtype.

    Minus infinity is allowed in tensors whose key contains one of `masked`. Meta, fake and
    distributed tensors are not checked.
    """
    diverged, too_large = [], []
    for key, (low, high) in _extremes(state).items():
        if low == -math.inf and not math.isinf(high) and not set(masked).isdisjoint(key.split(".")):
            continue
        kind = expected[key].dtype
        if not (math.isfinite(low) and math.isfinite(high)):
            diverged.append(key)
        elif kind.is_floating_point and max(-low, high) > torch.finfo(kind).max:
            too_large.append(f"{key} ({max(-low, high):.4g})")
    if diverged:
        warn(
            f"{source} has values that are NaN or infinite, and so will the outputs be: "
            f"{listed(diverged)}. It is loaded as it is; the training that wrote it went wrong, "
            "take a checkpoint of an earlier step."
        )
    if too_large:
        warn(
            f"{source} has values that are infinite in the dtype of the adapter in the model: "
            f"{listed(too_large)}. It is loaded so; give the adapter a wider dtype "
            "(`autocast_adapter_dtype=True`, or cast the model before)."
        )


@torch.no_grad()
def _extremes(state: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return the minimum and maximum of each tensor, with one synchronization per dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor, Tensor]]] = {}
    for key, tensor in state.items():
        if (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.is_meta
            or not tensor.is_floating_point()
            or not tensor.numel()
        ):
            continue
        low, high = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
        if type(low) is Tensor:  # fake tensors have no values
            groups.setdefault((low.device, low.dtype), []).append((key, low, high))
    result: dict[str, tuple[float, float]] = {}
    for group in groups.values():
        numbers = torch.stack([number for _, *pair in group for number in pair]).tolist()
        result |= {
            key: (low, high)
            for (key, *_), low, high in zip(group, numbers[::2], numbers[1::2], strict=True)
        }
    return result
