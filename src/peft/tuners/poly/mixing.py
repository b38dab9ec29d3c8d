# SPDX-License-Identifier: Apache-2.0
"""Mixing of low-rank skills by Polytropon and multi-head routing, as pure functions of tensors.

Each sample has mixing weights over an inventory of skills, and the mixed skills are its low-rank
delta. With `n_splits > 1` features are split into blocks with weights of their own:

    A_w = stack over splits q of   Σ_s w[q, s] A[q, s]     [in, r]
    B_w = concat over splits q of  Σ_s w[q, s] B[q, s]     [r, out]
    Δ(x) = scale · x A_w B_w

Shapes: `weights [batch, n_splits, n_skills]`, `A [n_splits, n_skills, in // n_splits, r]`,
`B [n_splits, n_skills, r, out // n_splits]`, unless a docstring says otherwise.

Source: arXiv:2202.13914, arXiv:2211.03831
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...base.errors import PeftValueError
from ...base.tracing import shapes
from ...ops.batched import batched_product
from ...ops.dispatch import is_autocast
from ...ops.fused_linear import Chain, Ends
from ...ops.mixed_precision import scaled, widened
from ...ops.triton_support import with_kernel

# Cost of moving one number through memory, in multiplications; measured on a CPU core in float32.
_MOVE = 8


def mix(weights: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mix the skills into a pair of factors for each sample, in their dtype or that of autocast.

    It takes `batch · n_skills · (in + out) · r` multiplications, on a GPU in one Triton kernel
    (`mixing_triton.py`).

    Args:
        weights: Mixing weights, cast to the skills' dtype.
        A, B: The skills.
        scale: Factor on `B_w`.

    Returns:
        `A_w [batch, in, r]` and `B_w [batch, r, out]`.

    Source: arXiv:2211.03831, section 3
    """
    dtype = torch.get_autocast_dtype(A.device.type) if is_autocast(A) else A.dtype
    A_w, B_w = _mix(weights, A, B, dtype)
    return A_w, scaled(B_w, scale)


def poly_delta(x: Tensor, weights: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return each sample's delta, `Δ(x) = scale · x A_w B_w`.

    Args:
        x: `[rows, ..., in]`, in the skills' dtype or under autocast.
        weights: `[batch, n_splits, n_skills]` with `rows` a multiple of `batch`: row `i` belongs to
            sample `i // (rows // batch)`; or `[rows, ..., n_splits, n_skills]` for each token.
        scale: Factor on the delta.

    Returns:
        `[rows, ..., out]`.

    Raises:
        PeftValueError: The leading sizes of `x` and `weights` do not fit together.

    Example:
        >>> A, B = torch.ones(1, 2, 3, 1), torch.tensor([[[[1.0]], [[3.0]]]])  # two skills
        >>> poly_delta(torch.ones(1, 3), torch.tensor([[[0.5, 0.5]]]), A, B)
        tensor([[6.]])

    Source: arXiv:2211.03831, section 3; arXiv:2202.13914, section 3
    """
    delta = poly_chain(x, weights, A, B, scale).delta()
    return delta.reshape(*x.shape[:-1], A.shape[0] * B.shape[3])


def poly_chain(
    x: Tensor, weights: Tensor, A: Tensor, B: Tensor, scale: float | Tensor = 1.0
) -> Chain:
    """Return `poly_delta` as a chain of products.

    Either factors are mixed for each sample and applied to its rows, `(x A_w) B_w`; or all skills
    are applied and their results of rank `r` are mixed. `rank_space_pays` chooses.

    Args:
        x, weights, A, B, scale: As for `poly_delta`.

    Source: arXiv:2211.03831, section 3; arXiv:2202.13914, section 3
    """
    tokens, pays = rank_space_sizes(x, shapes(weights)[0][:-2], A, B)
    weights = weights if weights.dim() == 3 else weights.flatten(0, -3)
    if not pays:
        A_w, B_w = mix(weights, A, B)
        return Chain(x, A_w, (B_w,), scale=scale)
    mixed = functools.partial(_mixed_at_rank, scale=scale, tokens=tokens)
    return _rank_space_chain(x, weights, A, B, skill_columns(A), mixed)


def compact_skills(weights: Tensor, A: Tensor, B: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an equal inventory with the used skills only, if it is smaller.

    If each row of weights has at most `k` nonzero entries, `samples · k` skills suffice: each
    sample has `k` of them for itself. A single sample then reads `k / n_skills` of the inventory.

    Args:
        weights: `[..., n_splits, n_skills]` with at most `k` nonzero entries in each row.
        k: At least 1.

    Returns:
        Weights, `A` and `B` with `samples · k` skills, or unchanged if that is no fewer.

    Source: follows from the zero weights
    """
    samples, (*leading, n_splits, n_skills) = math.prod(weights.shape[:-2]), *shapes(weights)
    if not _holds(math.prod(leading) * k < n_skills):
        return weights, A, B
    values, index = weights.reshape(samples, n_splits, n_skills).topk(k, dim=-1)
    used = index.transpose(0, 1).flatten(1)  # [n_splits, samples * k]
    split = torch.arange(n_splits, device=index.device).unsqueeze(-1)
    identity = torch.eye(samples, dtype=values.dtype, device=values.device)
    compact = (identity[:, None, :, None] * values[:, :, None, :]).flatten(2)
    return compact.reshape(*weights.shape[:-1], samples * k), A[split, used], B[split, used]


def task_factors(
    weights: Tensor, A: Tensor, B: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mix the skills of one task into LoRA factors of rank `r`: `Δ(x) = x Aᵀ Bᵀ`, exactly.

    Args:
        weights: `[n_splits, n_skills]`.
        scale: Factor on the returned `B`.

    Returns:
        `A [r, in]` and `B [out, r]`, contiguous, oriented as `nn.Linear.weight`.

    Source: arXiv:2202.13914, section 3
    """
    A_w, B_w = mix(weights.unsqueeze(0), A, B, scale)
    return A_w[0].T.contiguous(), B_w[0].T.contiguous()


def decoding_chain(
    x: Tensor, mixing: Tensor, A: Tensor, B: Tensor, tokens: int, columns: Tensor | None = None
) -> Chain:
    """Return the chain in rank space without gradients, where the number of operations counts:
    `h_qs = x_q A_qs`, `p = M h`, `Δ_q = Σ_s p_qs B_qs`.

    Args:
        x: `[rows, ..., in]`.
        mixing: `mixing_matrix` of each sample.
        tokens: Number of rows of each sample.
        columns: `skill_columns(A)`, if that is cached.
    """

    def mixed(h: Tensor, mixing: Tensor) -> Tensor:
        return torch.bmm(mixing if tokens == 1 else mixing.repeat_interleave(tokens, 0), h)

    if columns is not None or A.shape[0] > 1:
        columns = skill_columns(A) if columns is None else columns
        return _rank_space_chain(x, mixing, A, B, columns, mixed)

    def ends(x: Tensor, A: Tensor, up: Tensor, mixing: Tensor) -> Ends:
        # A product for each skill saves the copy of `skill_columns`.
        h = batched_product(x.reshape(1, -1, A.shape[1]).expand(A.shape[0], -1, -1), A)
        return Ends(mixed(h.transpose(0, 1), mixing).view(-1, up.shape[0]), up)

    return Chain(widened(x, A.dtype), None, (A[0], B.flatten(0, 2), mixing), ends)


def mixing_matrix(weights: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return the mixing before and after rank space as one matrix, `M = scale · w wᵀ`.

    Args:
        weights: `[batch, n_splits, n_skills]`.

    Returns:
        `[batch, n_splits·n_skills, n_splits·n_skills]`.
    """
    w = weights.flatten(1)
    return scaled(w.unsqueeze(2) * w.unsqueeze(1), scale)


def _rank_space_chain(
    x: Tensor,
    weights: Tensor,
    A: Tensor,
    B: Tensor,
    columns: Tensor,
    mixed: Callable[[Tensor, Tensor], Tensor],
) -> Chain:
    """Return the chain in rank space, `h_qs = x_q A_qs`, `p = mixed(h, weights)`,
    `Δ_q = Σ_s p_qs B_qs`, for the `skill_columns` of `A`. Several splits have no first and last
    product of all features.
    """
    ((n_splits, n_skills, width, r),) = shapes(A)
    size = n_skills * r

    def ends(h: Tensor, up: Tensor, weights: Tensor) -> Ends:
        return Ends(mixed(h.view(-1, n_skills, r), weights).view(-1, size), up)

    def delta(x: Tensor, down: Tensor, up: Tensor, weights: Tensor) -> Tensor:
        h = x.reshape(-1, n_splits, width).transpose(0, 1) @ down  # [n_splits, rows, n_skills * r]
        h = mixed(h.unflatten(2, (n_skills, r)).transpose(0, 1).flatten(1, 2), weights)
        return (h.view(-1, n_splits, size).transpose(0, 1) @ up).transpose(0, 1)

    if n_splits == 1:
        return Chain(x, columns[0], (B.flatten(0, 2), weights), ends)
    return Chain(widened(x, A.dtype), None, (columns, B.flatten(1, 2), weights), delta)


def _mixed_at_rank(h: Tensor, weights: Tensor, scale: float | Tensor, tokens: int) -> Tensor:
    """Return `scale · w (wᵀ h)` for each row, both products of the mixing in rank space:
    `h [rows, n_splits·n_skills, r]`, `weights [batch, n_splits, n_skills]`, and `tokens` rows of
    each sample.
    """
    w = weights.to(h.dtype).flatten(1).unsqueeze(-1)
    if tokens != 1:
        w = w.repeat_interleave(h.shape[0] // w.shape[0] if tokens else 0, 0)
    return w @ (w.mT @ h * scale)


def skill_columns(A: Tensor) -> Tensor:
    """Return the skills of each split as columns of one matrix,
    `[n_splits, in // n_splits, n_skills·r]`.
    """
    return A.transpose(1, 2).flatten(2)


def rank_space_sizes(x: Tensor, owners: Sequence[int], A: Tensor, B: Tensor) -> tuple[int, bool]:
    """Return the number of rows of a sample, and whether mixing in rank space pays. `owners` are
    the leading sizes of the weights.
    """
    leading, (n_splits, n_skills, width, _), shape_B = shapes(x, A, B)
    leading = leading[:-1]
    if len(owners) > 1:
        if owners != leading:
            raise PeftValueError(
                f"Token-level weights of shape {(*owners, n_splits, n_skills)} do not fit an input "
                f"of shape {tuple(x.shape)}: all but their last two sizes must be all but its last "
                "one."
            )
        batch, tokens = math.prod(leading), 1
    else:
        rows, batch = leading[0], owners[0]
        # Checked, since a reshape would silently move tokens between samples.
        if rows != batch and (batch == 0 or rows % batch != 0):
            raise PeftValueError(
                f"An input of {rows} rows (shape {tuple(x.shape)}) does not fit routing weights "
                f"for {batch} samples: the rows must be a multiple of the samples."
            )
        # Rows of one sample become one sequence, so its factors are mixed once and never repeated.
        tokens = math.prod(leading) // max(batch, 1)
    features = n_splits * (width + shape_B[-1])
    return tokens, rank_space_pays(batch, tokens, features, n_splits, n_skills)


def rank_space_pays(batch: int, tokens: int, features: int, n_splits: int, n_skills: int) -> bool:
    """Return whether mixing in rank space is cheaper than mixing factors.

    Costs for each rank and feature, in multiplications; moving a number through memory counts 8:

    - factors: `batch · n_skills` to mix them, `batch · tokens` to apply them, `batch` numbers
      written and read;
    - rank space: `batch · tokens · n_skills` to apply the skills, `n_skills / 2` numbers to reorder
      `A`, four passes over the `batch · tokens · n_splits · n_skills` numbers of rank `r`.

    Rank space serves few tokens for each sample (at most 6 with 4 skills, 3 with 8) and
    token-level routing, where every token is a sample. Factors serve longer sequences, and the
    decoding of a single sample.

    Args:
        batch: Number of samples with weights of their own.
        tokens: Number of rows of a sample.
        features: `in + out`.

    Source: arXiv:2211.03831, section 3 (the two orders)
    """
    applied = batch * tokens * n_skills
    factors = features * batch * (n_skills + tokens + 2 * _MOVE)
    rank_space = features * (applied + _MOVE * n_skills) + 4 * _MOVE * applied * n_splits
    return _holds(factors - rank_space > 0)


def _holds(condition: bool) -> bool:
    """Return a condition on sizes. Under `torch.compile` it is whether the condition holds for all
    sizes of the graph, so that one graph serves all.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _mix_exactly(weights: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Mix in float64, which TF32 settings do not round."""
    A_w = torch.einsum("bqs,qsdr->bqdr", weights.double(), A.double()).flatten(1, 2)
    B_w = torch.einsum("bqs,qsrd->brqd", weights.double(), B.double()).flatten(2, 3)
    return A_w.to(dtype), B_w.to(dtype)


def _example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """Return arguments of `_mix` to try its kernel: factors of several incomplete blocks."""

    def numbers(*shape: int) -> Tensor:
        values = torch.arange(math.prod(shape), device=device, dtype=torch.float32).sin()
        return values.view(shape).requires_grad_()

    return numbers(3, 2, 3), numbers(2, 3, 50, 3), numbers(2, 3, 3, 70), torch.float32


@with_kernel(
    "mix_skills",
    "Tensor weights, Tensor A, Tensor B, ScalarType dtype",
    "(Tensor, Tensor)",
    _example,
    _mix_exactly,
)
def _mix(weights: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `A_w`, whose splits are `Σ_s w[q, s] A[q, s]`, and `B_w`, in a dtype."""
    weights = weights.to(A.dtype)
    ((n_splits, *_),) = shapes(A)
    if n_splits == 1:
        A_w, B_w = _mix_one_split(weights, A), _mix_one_split(weights, B)
    else:
        A_w = torch.einsum("bqs,qsdr->bqdr", weights, A).flatten(1, 2)
        B_w = torch.einsum("bqs,qsrd->brqd", weights, B).flatten(2, 3)
    return A_w.to(dtype), B_w.to(dtype)


def _mix_one_split(weights: Tensor, skills: Tensor) -> Tensor:
    """Return `Σ_s w[0, s] skills[0, s]` for each sample, as one product of two matrices, which
    takes fewer operations than the general form.
    """
    mixed = weights.flatten(1) @ skills.reshape(skills.shape[1], -1)
    return mixed.view(weights.shape[0], *skills.shape[2:])
