# SPDX-License-Identifier: Apache-2.0
"""Mixing of low-rank skills: the arithmetic of Polytropon and multi-head routing, as pure functions
of tensors.

Every sample owns routing weights over an inventory of skills, and applies the low-rank map that the
weighted skills make together. With `n_splits > 1` features fall into that many blocks, each mixed
by weights of its own:

    A_w = stack over splits q of  sum_s w[q, s] A[q, s]     [in, r]
    B_w = concat over splits q of sum_s w[q, s] B[q, s]     [r, out]
    delta(x) = x @ A_w @ B_w * scale

Shapes: `weights [batch, n_splits, n_skills]`, `A [n_splits, n_skills, in // n_splits, r]`,
`B [n_splits, n_skills, r, out // n_splits]`.

Source: arXiv:2202.13914, arXiv:2211.03831
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.errors import PeftValueError
from ...ops.dispatch import is_eager, shapes
from ...ops.fused_linear import Chain, Ends, FunctionChain, LowRankChain
from ...ops.mixed_precision import scaled, widened
from ...ops.triton_support import with_kernel

_MOVE = 8
"""Multiplications done while one number is written or read; fits timings on a CPU core in float32.
"""


def gates(logits: Tensor, training: bool) -> Tensor:
    """Open each skill's gate: a probability in eval, a differentiable random draw in training.

    Eval: `sigmoid(l)`. Training, the relaxed Bernoulli of temperature 1:
    `sigmoid(l + log u - log(1 - u))` with `u` uniform in (0, 1). The draws, the clamping and hence
    every bit are those of `torch.distributions.RelaxedBernoulli(1, logits=l).rsample()`, without
    its checks of values.

    Args:
        logits: any shape.
        training: whether to sample.

    Returns:
        The shape of `logits`, in float32 at least: half precision has too few numbers near 0 and 1.

    Source: arXiv:2202.13914
    """
    logits = logits.to(_working_dtype(logits))
    if not training:
        return logits.sigmoid()
    return relaxed_gates(logits, torch.rand(logits.shape, dtype=logits.dtype, device=logits.device))


def relaxed_gates(logits: Tensor, u: Tensor) -> Tensor:
    """Return the gates of logits in training, for numbers `u` that were drawn."""
    info = torch.finfo(logits.dtype)
    p = logits.sigmoid().clamp(info.eps, 1 - info.eps)
    u = u.clamp(info.eps, 1 - info.eps)
    relaxed = u.log() - (-u).log1p() + p.log() - (-p).log1p()
    return relaxed.sigmoid().clamp(info.tiny, 1 - info.eps)


def normalise(gates: Tensor, eps: float = 1e-12) -> Tensor:
    """Make gates into mixing weights: `w[..., s] = gates[..., s] / (sum_s gates[..., s] + eps)`.

    Args:
        gates: `[..., n_skills]`, not negative.
        eps: keeps a row of closed gates at zero weight.

    Returns:
        `[..., n_skills]`.

    Example:
        >>> normalise(torch.tensor([0.5, 0.5, 1.0]))
        tensor([0.2500, 0.2500, 0.5000])

    Source: arXiv:2202.13914
    """
    return gates / (gates.sum(dim=-1, keepdim=True) + eps)


def _mix_exactly(weights: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Mix in float64, whose bits no setting takes away."""
    found = _mix(weights.double(), A.double(), B.double(), scale)
    return tuple(factor.to(A.dtype) for factor in found)


def _example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
    """Make arguments of `mix` to try a kernel with: several pieces of each factor, none of them
    whole.
    """

    def numbers(*shape: int) -> Tensor:
        return (
            torch.arange(math.prod(shape), device=device, dtype=torch.float32)
            .sin()
            .view(shape)
            .requires_grad_()
        )

    return numbers(3, 2, 3), numbers(2, 3, 50, 3), numbers(2, 3, 3, 70), 0.5


def _mix(weights: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    weights = weights.to(A.dtype)
    A_w = torch.einsum("bqs,qsdr->bqdr", weights, A).flatten(1, 2)
    B_w = torch.einsum("bqs,qsrd->brqd", scaled(weights, scale), B).flatten(2, 3)
    return A_w, B_w


@with_kernel(3, _example, _mix_exactly)
def mix(weights: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mix the skills into one pair of factors per sample.

    Args:
        weights: `[batch, n_splits, n_skills]`, cast to the skills' dtype.
        A: `[n_splits, n_skills, in // n_splits, r]`.
        B: `[n_splits, n_skills, r, out // n_splits]`.
        scale: goes into `B_w`, by way of its weights.

    Returns:
        `A_w [batch, in, r]` and `B_w [batch, r, out]`, for `batch * n_skills * (in + out) * r`
        multiplications. On a GPU it is one kernel where that can be had (`mixing_triton.py`).

    Source: arXiv:2211.03831
    """
    return _mix(weights, A, B, scale)


def poly_delta(x: Tensor, weights: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Apply each sample's mixture of skills: `delta(x) = x @ A_w @ B_w * scale`.

    Args:
        x: `[rows, ..., in]`, in the skills' dtype (or under autocast).
        weights: `[batch, n_splits, n_skills]` with `rows` a multiple of `batch`, where row `i`
            belongs to sample `i // (rows // batch)`; or `[rows, ..., n_splits, n_skills]`, a weight
            for each token.
        A: `[n_splits, n_skills, in // n_splits, r]`.
        B: `[n_splits, n_skills, r, out // n_splits]`.
        scale: factor on the result.

    Returns:
        `[rows, ..., out]`. Either the samples' matrices are mixed and then applied (`mix`), or all
        skills are applied and mixed at rank `r`; `rank_space_pays` tells what each costs and
        chooses.

    Raises:
        PeftValueError: the leading sizes of `x` and `weights` do not fit together.

    Source: arXiv:2211.03831, arXiv:2202.13914
    """
    delta = poly_chain(x, weights, A, B, scale).delta()
    return delta.reshape(*x.shape[:-1], A.shape[0] * B.shape[3])


def poly_chain(
    x: Tensor,
    weights: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    by_split: Callable[[], Tensor] | None = None,
) -> Chain:
    """Return `poly_delta` as a chain: first `x` times `[batch, in, r]`, or in rank space
    `[in, n_skills·r]`. Splits in rank space have factors of their own, and so no first and last
    product.

    Args:
        x, weights, A, B, scale: As for `poly_delta`.
        by_split: A function that returns `side_by_side(A)`; None to compute it.

    Source: arXiv:2211.03831, arXiv:2202.13914
    """
    tokens, pays = _sizes(x, weights, A, B)
    weights = _by_sample(weights)
    if not pays:
        return LowRankChain(x, *mix(weights, A, B), scale)

    ((n_splits, n_skills, width, r),) = shapes(A)

    def spread(h: Tensor, weights: Tensor) -> Tensor:
        """From `h [rows, splits and skills, r]` comes `z = sum_qs w[q, s] h[q, s]`, and from it
        `scale w[q, s] z`.
        """
        w = weights.to(h.dtype)
        if tokens != 1:
            w = w.repeat_interleave(h.shape[0] // w.shape[0] if tokens else 0, 0)
        w = w.reshape(-1, n_splits * n_skills, 1)
        return w @ (w.mT @ h * scale)

    if n_splits == 1:
        last = B.flatten(0, 2)

        def middle(h: Tensor, last: Tensor, weights: Tensor) -> Ends:
            return Ends(spread(h.view(-1, n_skills, r), weights).view(-1, n_skills * r), last)

        def each(x: Tensor, A: Tensor, last: Tensor, weights: Tensor) -> Ends:
            h = torch.bmm(x.reshape(1, -1, width).expand(n_skills, -1, width), A[0])
            return Ends(spread(h.transpose(0, 1), weights).view(-1, n_skills * r), last)

        if (
            by_split is None and not torch.is_grad_enabled() and is_eager()
        ):  # a product for each skill needs no copy of them
            return FunctionChain(widened(x, A.dtype), each, (A, last, weights))
        down = (side_by_side(A) if by_split is None else by_split())[0]
        return FunctionChain(x, middle, (last, weights), down)

    first, last = (
        side_by_side(A) if by_split is None else by_split(),
        B.flatten(1, 2),
    )  # [n_splits, n_skills * r, out / n_splits]

    def delta(x: Tensor, first: Tensor, last: Tensor, weights: Tensor) -> Tensor:
        """`h[q, s] = x_q A[q, s]`, spread, and `delta_q = sum_s (scale w[q, s] z) B[q, s]`."""
        h = x.reshape(-1, n_splits, width).transpose(0, 1) @ first  # [n_splits, rows, n_skills * r]
        h = spread(h.unflatten(2, (n_skills, r)).transpose(0, 1).flatten(1, 2), weights)
        h = h.view(-1, n_splits, n_skills * r).transpose(0, 1)
        return (h @ last).transpose(0, 1).reshape(-1, n_splits * last.shape[2])

    return FunctionChain(widened(x, A.dtype), delta, (first, last, weights))


def side_by_side(A: Tensor) -> Tensor:
    """The skills of each split as columns of one matrix: `[n_splits, n_skills, in // n_splits, r]`
    to `[n_splits, in // n_splits, n_skills * r]`.
    """
    return A.transpose(1, 2).flatten(2)


def rank_space_pays(batch: int, tokens: int, features: int, n_splits: int, n_skills: int) -> bool:
    """Whether applying all skills and mixing at rank `r` is cheaper than mixing matrices and
    applying them.

    Costs per rank and feature, in multiplications; a number moved through memory counts as `_MOVE`
    = 8 of them:

    - mixing matrices: `batch * n_skills` to mix, `batch * tokens` to apply, `batch` numbers written
      and read;
    - rank space: `batch * tokens * n_skills` to apply, `n_skills / 2` numbers to reorder `A`, and
      four passes over the `batch * tokens * n_splits * n_skills` numbers at rank `r`.

    So a few tokens per sample go through rank space (at most 6 with 4 skills, 3 with 8), and so
    does token-level routing, where each token is a sample and matrices for each are out of the
    question. Longer sequences mix matrices, and so does a lone sample in decoding.

    Args:
        batch: samples, each with weights of its own.
        tokens: per sample.
        features: `in + out`.
        n_splits: blocks of features.
        n_skills: inventory size.

    Source: arXiv:2211.03831
    """
    applied = batch * tokens * n_skills
    matrices = features * batch * (n_skills + tokens + 2 * _MOVE)
    rank_space = features * (applied + _MOVE * n_skills) + 4 * _MOVE * applied * n_splits
    return _certainly(matrices - rank_space > 0)


def _certainly(condition: bool) -> bool:
    """A comparison of sizes; while a graph for free sizes is made, whether it holds for all of
    them: so one graph does.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def task_factors(
    weights: Tensor, A: Tensor, B: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mix the skills of one task into a LoRA of rank `r`: `delta(x) = x @ A.T @ B.T`, exactly.

    Args:
        weights: `[n_splits, n_skills]`.
        A: `[n_splits, n_skills, in // n_splits, r]`.
        B: `[n_splits, n_skills, r, out // n_splits]`.
        scale: goes into the returned `B`.

    Returns:
        `A [r, in]` and `B [out, r]`, the orientation of `nn.Linear.weight`, contiguous.

    Source: arXiv:2202.13914
    """
    A_w, B_w = mix(weights.unsqueeze(0), A, B, scale)
    return A_w[0].T.contiguous(), B_w[0].T.contiguous()


def task_delta_weight(weights: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Weight update `[out, in]` of one task, of rank `r`; arguments as in `task_factors`.

    Source: arXiv:2202.13914
    """
    factor_A, factor_B = task_factors(weights, A, B, scale)
    return factor_B @ factor_A


def grow_skills(
    logits: Tensor, A: Tensor, B: Tensor, extra: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add `extra` skills to an inventory without changing any task's function in eval.

    In each split the most used skills (by mean weight over tasks) are cloned, and each clone shares
    its parent's gate: `sigmoid(l) = f * sigmoid(l) + (1 - f) * sigmoid(l)` with a random `f` in
    (0.25, 0.75) per task. Sums of gates and mixtures stay what they were, while each twin is used,
    and trained, to a different degree by each task. If `extra` exceeds the inventory it doubles
    first, as often as needed. (In training twins draw their gates apart, so a task's random weights
    then scatter a little less than before.)

    Args:
        logits: `[n_tasks, n_splits * n_skills]`.
        A: `[n_splits, n_skills, in // n_splits, r]`.
        B: `[n_splits, n_skills, r, out // n_splits]`.
        extra: skills to add, at least 0.
        generator: for the fractions.

    Returns:
        `logits [n_tasks, n_splits * (n_skills + extra)]`, `A` and `B` with `n_skills + extra`
        skills, new ones last, in their dtypes.

    Source: arXiv:2202.13914
    """
    n_splits, n_skills = A.shape[:2]
    clones = min(extra, n_skills)
    if clones <= 0:
        return logits, A, B

    table = logits.reshape(-1, n_splits, n_skills)
    usage = normalise(gates(table, training=False)).mean(dim=0)
    parents = usage.topk(clones, dim=-1).indices
    per_task = parents.expand(table.shape[0], -1, -1)
    shared = table.gather(-1, per_task)
    device = generator.device if generator is not None else shared.device
    drawn = torch.rand(
        shared.shape, generator=generator, dtype=_working_dtype(shared), device=device
    )
    fraction = 0.25 + 0.5 * drawn.to(shared.device)
    kept = table.scatter(-1, per_task, _share_gate(shared, 1 - fraction))
    grown = torch.cat((kept, _share_gate(shared, fraction)), dim=-1).flatten(-2)

    split = torch.arange(n_splits, device=parents.device).unsqueeze(-1)
    A = torch.cat((A, A[split, parents]), dim=1)
    B = torch.cat((B, B[split, parents]), dim=1)
    return grow_skills(grown, A, B, extra - clones, generator)


def _working_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _by_sample(weights: Tensor) -> Tensor:
    """Return weights as `[batch, n_splits, n_skills]`; those of tokens have each for a sample."""
    return weights if weights.dim() == 3 else weights.flatten(0, -3)


def _sizes(x: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> tuple[int, bool]:
    """Return how many tokens each sample of an input has, and if rank space pays for them."""
    leading, owners, (n_splits, n_skills, width, _), of_B = shapes(x, weights, A, B)
    leading, owners = leading[:-1], owners[:-2]
    if len(owners) > 1:
        if owners != leading:
            raise PeftValueError(
                f"Token-level weights of shape {tuple(weights.shape)} do not fit an input of shape "
                f"{tuple(x.shape)}: "
                "all but their last two sizes must be all but its last one."
            )
        batch, tokens = math.prod(leading), 1
    else:
        rows, batch = leading[0], owners[0]
        # Checked, since a reshape would silently move tokens between samples.
        if rows != batch and (batch == 0 or rows % batch != 0):
            raise PeftValueError(
                f"An input of {rows} rows (shape {tuple(x.shape)}) does not fit routing weights "
                f"for {batch} samples: "
                "the rows must be a multiple of the samples."
            )
        # Rows of one sample become one sequence, so its matrices are mixed once and never repeated.
        tokens = math.prod(leading) // max(batch, 1)
    return tokens, rank_space_pays(batch, tokens, n_splits * (width + of_B[-1]), n_splits, n_skills)


def _share_gate(logits: Tensor, share: Tensor) -> Tensor:
    """Logits of `share * sigmoid(logits)`, for shares well below 1; no gate is too small or too
    open for it.
    """
    wide = logits.to(_working_dtype(logits))
    return (share.log() + F.logsigmoid(wide) - torch.log1p(-share * wide.sigmoid())).to(
        logits.dtype
    )
