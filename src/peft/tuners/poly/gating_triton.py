# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for the mixing weights of tasks in `gating.task_weights`, and for their gradient:

    w[b, q] = g / (Σ_s g_s + 1e-12),  l = table[task_b, q],
    g = σ(l), or for a draw  g = σ(l + log u − log(1 − u))

in float32, with the clamping of `gating.relaxed_gates`: `σ(l)`, `u` and `g` stay an epsilon away
from 0 and 1.

Source: arXiv:2202.13914, section 3
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.triton_support import on_device_of

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_MOST_SKILLS, _MOST_SAMPLES = 1024, 1024
# Number of elements that one program computes.
_BLOCK = 512

_EPS: tl.constexpr = tl.constexpr(2.0**-23)
_TINY: tl.constexpr = tl.constexpr(2.0**-126)
# The logit of `1 − eps`: clamping logits to it clamps probabilities to `[eps, 1 − eps]`.
_BOUND: tl.constexpr = tl.constexpr(15.942385)


def fits(table: Tensor, task_ids: Tensor, draws: Tensor | None, n_splits: int) -> bool:
    """Return whether the kernels support these tensors."""
    return (
        table.dtype in _DTYPES
        and table.is_contiguous()
        and (draws is None or draws.is_contiguous())
        and table.shape[1] // n_splits <= _MOST_SKILLS
        and 0 < task_ids.shape[0] <= _MOST_SAMPLES
    )


def forward(table: Tensor, task_ids: Tensor, draws: Tensor | None, n_splits: int) -> Tensor:
    """Return the mixing weights in one launch. An id out of range gives weights of NaN."""
    batch, n_skills = task_ids.shape[0], table.shape[1] // n_splits
    weights = table.new_empty((batch, n_splits, n_skills), dtype=torch.float32)
    sizes = _sizes(n_splits, n_skills, draws is not None)
    with on_device_of(table):
        _weigh_kernel[(triton.cdiv(batch * n_splits, sizes["BLOCK_R"]),)](
            table, task_ids, draws, weights, batch, task_ids.stride(0), table.shape[0], **sizes
        )
    return weights


def backward(
    table: Tensor,
    task_ids: Tensor,
    draws: Tensor | None,
    n_splits: int,
    gradients: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Return the table's gradient, summed in the order of the samples, so it is deterministic."""
    grad_table, rows = torch.empty_like(table), table.shape[0] * n_splits
    sizes = _sizes(n_splits, table.shape[1] // n_splits, draws is not None)
    with on_device_of(table):
        _distribute_kernel[(triton.cdiv(rows, sizes["BLOCK_R"]),)](
            table, task_ids, draws, gradients[0].contiguous(), grad_table,
            task_ids.shape[0], task_ids.stride(0), rows, **sizes,
        )  # fmt: skip
    return [grad_table]


@functools.cache
def _sizes(n_splits: int, n_skills: int, drawn: bool) -> dict[str, int]:
    """Return the sizes that a kernel is compiled for."""
    block = triton.next_power_of_2(n_skills)
    blocks = {"BLOCK_R": max(_BLOCK // block, 1), "BLOCK_S": block}
    return {"Q": n_splits, "S": n_skills, "DRAWN": drawn, **blocks}


@triton.jit(do_not_specialize=["batch", "stride", "n_tasks"])
def _weigh_kernel(
    table, task_ids, draws, weights, batch, stride, n_tasks,
    Q: tl.constexpr, S: tl.constexpr, DRAWN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Compute the weights of rows, each a split of a sample."""
    row, skill = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    real = (row < batch * Q)[:, None] & (skill < S)[None, :]
    task = tl.load(task_ids + (row // Q) * stride, mask=row < batch * Q, other=0)
    valid = (task >= 0) & (task < n_tasks)
    logits = table + (task * Q + row % Q)[:, None] * S + skill[None, :]
    logit = tl.load(logits, mask=real & valid[:, None], other=float("nan")).to(tl.float32)
    offset = row[:, None] * S + skill[None, :]
    u = logit
    if DRAWN:
        u = tl.load(draws + offset, mask=real, other=0.5)
    gate, _ = _open(logit, u, DRAWN)
    gate = tl.where(real, gate, 0.0)
    tl.store(weights + offset, gate / (tl.sum(gate, 1) + 1e-12)[:, None], mask=real)


@triton.jit(do_not_specialize=["batch", "stride", "rows"])
def _distribute_kernel(
    table, task_ids, draws, grad_weights, grad_table, batch, stride, rows,
    Q: tl.constexpr, S: tl.constexpr, DRAWN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of rows of the table, each a split of a task, over the task's samples. A
    task without samples gets zeros.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    row, skill = first + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    real = (row < rows)[:, None] & (skill < S)[None, :]
    offset = row[:, None] * S + skill[None, :]
    logit = tl.load(table + offset, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
    for sample in range(batch):
        task = tl.load(task_ids + sample * stride)
        if (task * Q < first + BLOCK_R) & (task * Q + Q > first):
            own = real & (row // Q == task)[:, None]
            at = (sample * Q + row % Q)[:, None] * S + skill[None, :]
            u = logit
            if DRAWN:
                u = tl.load(draws + at, mask=own, other=0.5)
            gate, slope = _open(logit, u, DRAWN)
            gate = tl.where(own, gate, 0.0)
            opened = tl.sum(gate, 1) + 1e-12
            grad_weight = tl.load(grad_weights + at, mask=own, other=0.0)
            mean = tl.sum(grad_weight * gate, 1) / opened
            total += tl.where(own, (grad_weight - mean[:, None]) / opened[:, None] * slope, 0.0)
    tl.store(grad_table + offset, total.to(grad_table.dtype.element_ty), mask=real)


@triton.jit
def _open(logit, u, DRAWN: tl.constexpr):
    """Return gates and their derivatives by the logits. Clamps by comparison, since minima would
    turn NaN into a number.
    """
    if DRAWN:
        u = tl.where(u < _EPS, _EPS, tl.where(u > 1 - _EPS, 1 - _EPS, u))
        held = tl.where(logit < -_BOUND, -_BOUND, tl.where(logit > _BOUND, _BOUND, logit))
        gate = tl.sigmoid(held + (tl.log(u) - tl.log(1 - u)))
        is_free = (held == logit) & (gate >= _TINY) & (gate <= 1 - _EPS)
        slope = tl.where(is_free, gate * (1 - gate), 0.0)
        gate = tl.where(gate < _TINY, _TINY, tl.where(gate > 1 - _EPS, 1 - _EPS, gate))
    else:
        gate = tl.sigmoid(logit)
        slope = gate * (1 - gate)
    return gate, slope
