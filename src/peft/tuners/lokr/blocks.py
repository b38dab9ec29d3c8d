# SPDX-License-Identifier: Apache-2.0
"""The product of a Kronecker delta with an activation, block by block: `H = x · down`,
`Y = W1 · H · up` for each row.

`x` is read as `[rows, b, d]`, `H` as `[rows, b, k]`, the output as `[rows, a, c]`. Either of `down
[d, k]` and `up [k, c]` may be missing.

Source: arXiv:2309.14859, eq. 4
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.dispatch import shapes
from ...ops.fused_linear import Ends, InPlaceMiddle


class _Blocks(InPlaceMiddle):
    """`W1 · H · up`, from `H`, `W1 [a, b]` and `up [k, c]`, if any."""

    def __call__(self, product: Tensor, *factors: Tensor) -> Ends:
        """Return the chain's ends, by operations that autograd and compilers can follow."""
        w1, up = _unpacked(factors)
        ((a, b),) = shapes(w1)
        grid = product.reshape(-1, b, product.shape[-1] if up is None else up.shape[0])
        if up is None:
            return Ends(w1.expand(grid.shape[0], a, b), grid)
        if torch.is_grad_enabled() or torch.jit.is_tracing():
            # A batched product would compute the gradient of `W1` for each row before summing. A
            # trace must not depend on whether there are gradients.
            mixed = F.linear(grid.mT, w1).mT
        else:
            mixed = w1 @ grid
        return Ends(mixed.reshape(-1, up.shape[0]), up)

    def add(
        self, result: Tensor, x: Tensor, down: Tensor | None, *factors: Tensor, beta: int
    ) -> None:
        """Write `beta · result + Y` into `result`."""
        w1, up = _unpacked(factors)
        (a, b), n = w1.shape, x.numel() // x.shape[-1]
        h, left = _first(x, down).view(n, b, -1), w1.expand(n, a, b)
        if up is None:
            result.view(n, a, -1).baddbmm_(left, h, beta=beta)
        else:
            mixed = torch.bmm(left, h).view(n * a, -1)
            result.view(n * a, -1).addmm_(mixed, up, beta=beta)

    def gradients(
        self,
        x: Tensor,
        gradient: Tensor,
        wanted: Sequence[bool],
        down: Tensor | None,
        *factors: Tensor,
    ) -> list[Tensor | None]:
        """Return the gradients for `x`, `down`, `W1` and `up`."""
        w1, up = _unpacked(factors)
        (a, b), n = w1.shape, x.numel() // x.shape[-1]
        for_x, for_down, for_w1, *for_up = wanted
        h, left = _first(x, down).view(n, b, -1), w1.expand(n, a, b)
        of_up = None
        if up is None:
            of_mixed = gradient.view(n, a, -1)
        else:
            rows, memory = gradient.view(n * a, -1), x.new_empty(n * a, up.shape[0])
            if for_up[0]:
                torch.bmm(left, h, out=memory.view(n, a, -1))
                of_up = memory.mT @ rows
            of_mixed = torch.mm(rows, up.mT, out=memory).view(n, a, -1)
        of_w1 = _summed(of_mixed, h) if for_w1 else None
        of_x = of_down = None
        if for_x or for_down:
            of_x = torch.bmm(left.mT, of_mixed).view(-1, h.shape[2])
        if down is not None and of_x is not None:
            # `(H'ᵀ · x)ᵀ`, since a product is faster with the thin side first.
            of_down = (of_x.mT @ x.view(-1, down.shape[0])).mT if for_down else None
            of_x = of_x @ down.mT if for_x else None
        return [of_x, of_down, of_w1, of_up][: len(wanted)]


BLOCKS = _Blocks()


def _unpacked(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    return factors[0], factors[1] if len(factors) > 1 else None


def _first(x: Tensor, down: Tensor | None) -> Tensor:
    """Return the first product, in the order of its elements."""
    return x if down is None else x.view(-1, down.shape[0]) @ down


def _summed(p: Tensor, q: Tensor) -> Tensor:
    """Return `Σ p · qᵀ` over the first dimension."""
    # One product takes transposed copies of both, a batched one a result for each row.
    if p.shape[2] < q.shape[1]:
        return torch.einsum("nak,nbk->ab", p, q)
    return torch.bmm(p, q.mT).sum(0)
