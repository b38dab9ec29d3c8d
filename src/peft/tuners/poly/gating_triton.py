# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for the mixing weights of tasks, `gating.task_weights`, and for their gradient:

    w[b, q] = g / (Σ_s g_s + 1e-12),  l = table[task_b, q],
    g = σ(l), or for a draw  g = σ(l + log u − log(1 − u))

in float32, with the clamping of `gating.relaxed_gates`: `σ(l)`, `u` and `g` stay an epsilon away
from 0 and 1.

Source: arXiv:2202.13914, section 3
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...ops.derivatives import gradients_again
from ...ops.dispatch import is_batched
from ...ops.triton_support import on_device_of
from .gating import Gating, normalize, relaxed_gates

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_MOST_SKILLS, _MOST_SAMPLES = 1024, 1024
# Number of elements that one program computes.
_BLOCK = 512

_EPS: tl.constexpr = tl.constexpr(2.0**-23)
_TINY: tl.constexpr = tl.constexpr(2.0**-126)
# The logit of `1 − eps`: clamping logits to it clamps probabilities to `[eps, 1 − eps]`.
_BOUND: tl.constexpr = tl.constexpr(15.942385)


def fits(table: Tensor, task_ids: Tensor, n_splits: int, gating: Gating, training: bool) -> bool:
    """Return whether the kernels support these tensors and options."""
    other = gating.hard or gating.always_on or (gating.dropout if training else gating.top_k)
    return (
        not other
        and type(task_ids) is Tensor
        and task_ids.device == table.device
        and table.dtype in _DTYPES
        and table.shape[1] // n_splits <= _MOST_SKILLS
        and 0 < task_ids.shape[0] <= _MOST_SAMPLES
    )


def task_weights(
    table: Tensor, task_ids: Tensor, n_splits: int, gating: Gating, training: bool
) -> Tensor:
    """Return the mixing weights of `gating.task_weights` in one launch beside that of the draws,
    which are those of `gating.gates`.

    Gradients are summed in the order of the samples, so they are deterministic. An id out of range
    gives weights of NaN.
    """
    shape = task_ids.shape[0], n_splits, table.shape[1] // n_splits
    draws = None
    if training and gating.relaxed:
        draws = torch.rand(shape, dtype=torch.float32, device=table.device)
    if torch.is_grad_enabled() and table.requires_grad:
        return _Weigh.apply(table, task_ids, draws, shape)
    return _weighed(table, task_ids, draws, shape)


class _Context(Protocol):
    """Attributes of an autograd context that `_Weigh` uses."""

    shape: tuple[int, int, int]
    saved_tensors: tuple[Tensor, Tensor, Tensor | None]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        table: Tensor,
        task_ids: Tensor,
        draws: Tensor | None,
        shape: tuple[int, int, int],
    ) -> Tensor:
        ctx.save_for_backward(table, task_ids, draws)
        ctx.shape = shape
        return _weighed(table, task_ids, draws, shape)

    @staticmethod
    def backward(ctx: _Context, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        table, task_ids, draws = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad_weights):
            plain = functools.partial(
                _weighed_plain, task_ids=task_ids, draws=draws, shape=ctx.shape
            )
            return *gradients_again(plain, (table,), (True,), (grad_weights,)), None, None, None
        batch, n_splits, n_skills = ctx.shape
        grad_table = torch.empty_like(table)
        rows = table.shape[0] * n_splits
        sizes = _sizes(n_splits, n_skills, draws is not None)
        with on_device_of(table):
            _distribute_kernel[(triton.cdiv(rows, sizes["BLOCK_R"]),)](
                table,
                task_ids,
                draws,
                grad_weights.contiguous(),
                grad_table,
                batch,
                task_ids.stride(0),
                rows,
                **sizes,
            )
        return grad_table, None, None, None


def _weighed_plain(
    table: Tensor, task_ids: Tensor, draws: Tensor | None, shape: tuple[int, int, int]
) -> Tensor:
    logits = F.embedding(task_ids, table).view(shape).float()
    return normalize(logits.sigmoid() if draws is None else relaxed_gates(logits, draws))


def _weighed(
    table: Tensor, task_ids: Tensor, draws: Tensor | None, shape: tuple[int, int, int]
) -> Tensor:
    batch, n_splits, n_skills = shape
    weights = table.new_empty(shape, dtype=torch.float32)
    sizes = _sizes(n_splits, n_skills, draws is not None)
    with on_device_of(table):
        _weigh_kernel[(triton.cdiv(batch * n_splits, sizes["BLOCK_R"]),)](
            table, task_ids, draws, weights, batch, task_ids.stride(0), table.shape[0], **sizes
        )
    return weights


@functools.cache
def _sizes(n_splits: int, n_skills: int, drawn: bool) -> dict[str, int]:
    """Return the sizes that a kernel is compiled for."""
    block = triton.next_power_of_2(n_skills)
    return {
        "Q": n_splits,
        "S": n_skills,
        "DRAWN": drawn,
        "BLOCK_R": max(_BLOCK // block, 1),
        "BLOCK_S": block,
    }


@triton.jit(do_not_specialize=["batch", "stride", "n_tasks"])
def _weigh_kernel(
    table,
    task_ids,
    draws,
    weights,
    batch,
    stride,
    n_tasks,
    Q: tl.constexpr,
    S: tl.constexpr,
    DRAWN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
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
    table,
    task_ids,
    draws,
    grad_weights,
    grad_table,
    batch,
    stride,
    rows,
    Q: tl.constexpr,
    S: tl.constexpr,
    DRAWN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
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
        slope = tl.where(
            (held == logit) & (gate >= _TINY) & (gate <= 1 - _EPS), gate * (1 - gate), 0.0
        )
        gate = tl.where(gate < _TINY, _TINY, tl.where(gate > 1 - _EPS, 1 - _EPS, gate))
    else:
        gate = tl.sigmoid(logit)
        slope = gate * (1 - gate)
    return gate, slope
