# SPDX-License-Identifier: Apache-2.0
"""Tasks' mixing weights as one kernel from table to weights, and one for their gradient, where
Triton is (see `ops/triton_support.py`).

    w[b, q] = g / (sum_s g_s + 1e-12),  g = sigmoid(l)  or, drawn,  g = sigmoid(l + log u - log(1 -
    u)),  l = table[task_b, q]

in float32, with `mixing.gates`' clamping: `sigmoid(l)` and `u` to within epsilon of 0 and 1, and so
`g`.

Source: arXiv:2202.13914
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...ops.derivatives import gradients_again
from ...ops.dispatch import is_batched
from ...ops.triton_support import on_device_of
from .gating import Gating
from .mixing import normalise, relaxed_gates

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_MOST_SKILLS, _MOST_SAMPLES = 1024, 1024
_BLOCK = 512
"""Numbers that one program computes."""

_EPS: tl.constexpr = tl.constexpr(2.0**-23)
_TINY: tl.constexpr = tl.constexpr(2.0**-126)
_BOUND: tl.constexpr = tl.constexpr(15.942385)
"""The logit of `1 - eps`: to clamp probabilities to `[eps, 1 - eps]` is to clamp logits to this."""


def fits(table: Tensor, task_ids: Tensor, n_splits: int, how: Gating, training: bool) -> bool:
    """Return whether the kernels take such tensors and settings."""
    other = how.hard or how.always_on or (how.dropout if training else how.top_k)
    return (
        not other
        and type(task_ids) is Tensor
        and task_ids.device == table.device
        and table.dtype in _DTYPES
        and table.shape[1] // n_splits <= _MOST_SKILLS
        and 0 < task_ids.shape[0] <= _MOST_SAMPLES
    )


def task_weights(
    table: Tensor, task_ids: Tensor, n_splits: int, how: Gating, training: bool
) -> Tensor:
    """Rows of a table of logits as mixing weights, in one launch beside that of the draws.

    The draws are those that `mixing.gates` makes. The gradient is summed in order of the samples,
    and so always the same.

    Args:
        table: `[n_tasks, n_splits * n_skills]`.
        task_ids: `[batch]`. A task that there is not has weights of NaN.
        n_splits: Number of heads.
        how: The settings, of which these kernels take `relaxed`.
        training: Draw gates, if they are relaxed.

    Returns:
        `[batch, n_splits, n_skills]` in float32.

    Source: arXiv:2202.13914
    """
    shape = task_ids.shape[0], n_splits, table.shape[1] // n_splits
    draws = None
    if training and how.relaxed:
        draws = torch.rand(shape, dtype=torch.float32, device=table.device)
    if torch.is_grad_enabled() and table.requires_grad:
        return _Weigh.apply(table, task_ids, draws, shape)
    return _weighed(table, task_ids, draws, shape)


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, task_ids: Tensor, draws: Tensor | None, shape: tuple[int, int, int]
    ) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(table, task_ids, draws)
        ctx.shape = shape
        return _weighed(table, task_ids, draws, shape)

    @staticmethod
    def backward(ctx: Any, of_weights: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        table, task_ids, draws = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(of_weights):
            plain = functools.partial(
                _weighed_plainly, task_ids=task_ids, draws=draws, shape=ctx.shape
            )
            return *gradients_again(plain, (table,), (True,), (of_weights,)), None, None, None
        batch, n_splits, n_skills = ctx.shape
        of_table = torch.empty_like(table)
        rows = table.shape[0] * n_splits
        sizes = _sizes(n_splits, n_skills, draws is not None)
        with on_device_of(table):
            _distribute_kernel[(triton.cdiv(rows, sizes["BLOCK_R"]),)](
                table,
                task_ids,
                draws,
                of_weights.contiguous(),
                of_table,
                batch,
                task_ids.stride(0),
                rows,
                **sizes,
            )
        return of_table, None, None, None


def _weighed_plainly(
    table: Tensor, task_ids: Tensor, draws: Tensor | None, shape: tuple[int, int, int]
) -> Tensor:
    logits = F.embedding(task_ids, table).view(shape).float()
    return normalise(logits.sigmoid() if draws is None else relaxed_gates(logits, draws))


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
    """What a kernel is compiled for."""
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
    """A row is a split of a sample."""
    row, skill = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    real = (row < batch * Q)[:, None] & (skill < S)[None, :]
    task = tl.load(task_ids + (row // Q) * stride, mask=row < batch * Q, other=0)
    known = (task >= 0) & (task < n_tasks)
    logits = table + (task * Q + row % Q)[:, None] * S + skill[None, :]
    logit = tl.load(logits, mask=real & known[:, None], other=float("nan")).to(tl.float32)
    place = row[:, None] * S + skill[None, :]
    u = logit
    if DRAWN:
        u = tl.load(draws + place, mask=real, other=0.5)
    gate, _ = _open(logit, u, DRAWN)
    gate = tl.where(real, gate, 0.0)
    tl.store(weights + place, gate / (tl.sum(gate, 1) + 1e-12)[:, None], mask=real)


@triton.jit(do_not_specialize=["batch", "stride", "rows"])
def _distribute_kernel(
    table,
    task_ids,
    draws,
    of_weights,
    of_table,
    batch,
    stride,
    rows,
    Q: tl.constexpr,
    S: tl.constexpr,
    DRAWN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A row is a split of a task; a program sums what the samples of its tasks hand down, and
    writes zeros where there are none.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    row, skill = first + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    real = (row < rows)[:, None] & (skill < S)[None, :]
    place = row[:, None] * S + skill[None, :]
    logit = tl.load(table + place, mask=real, other=0.0).to(tl.float32)
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
            of_weight = tl.load(of_weights + at, mask=own, other=0.0)
            mean = tl.sum(of_weight * gate, 1) / opened
            total += tl.where(own, (of_weight - mean[:, None]) / opened[:, None] * slope, 0.0)
    tl.store(of_table + place, total.to(of_table.dtype.element_ty), mask=real)


@triton.jit
def _open(logit, u, DRAWN: tl.constexpr):
    """Gates, and their slope by the logits. Comparisons and not minima, which would make a number
    of NaN.
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
