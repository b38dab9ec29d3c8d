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

from ...base.tracing import shapes
from ...ops.fused_linear import Ends


class _Blocks:
    """A chain's function: `W1 · H · up`, from `H`, `W1 [a, b]` and `up [k, c]`, if any."""

    def __call__(self, product: Tensor, w1: Tensor, up: Tensor | None = None) -> Ends:
        """Return the chain's ends, by operations that autograd and compilers can follow."""
        ((a, b),) = shapes(w1)
        grid = product.reshape(-1, b, product.shape[-1] if up is None else up.shape[0])
        if up is None:
            return Ends(w1.expand(grid.shape[0], a, b), grid)
        if torch.is_grad_enabled() or torch.jit.is_tracing():
            # A batched product would compute the gradient of `W1` for each row before summing. A
            # trace must not depend on whether there are gradients.
            mixed = F.linear(grid.mT, w1).mT
        else:
            mixed = torch.bmm(w1.expand(grid.shape[0], a, b), grid)
        return Ends(mixed.reshape(-1, up.shape[0]), up)

    def gradients(
        self, gradient: Tensor, product: Tensor, factors: Sequence[Tensor], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients for `H`, `W1` and `up`, with a product less than autograd needs."""
        (w1, *ups), (for_h, for_w1, *for_up) = factors, wanted
        (a, b), of_up = w1.shape, None
        h = product.view(-1, b, ups[0].shape[0] if ups else product.shape[-1])
        left = w1.expand(len(h), a, b)
        of_mixed = gradient.view(len(h), a, -1)
        if ups:
            rows, memory = of_mixed.flatten(0, 1), h.new_empty(len(h) * a, h.shape[2])
            if for_up[0]:
                torch.bmm(left, h, out=memory.view(len(h), a, -1))
                of_up = memory.mT @ rows
            of_mixed = torch.mm(rows, ups[0].mT, out=memory).view(len(h), a, -1)
        of_h = torch.bmm(left.mT, of_mixed).view(product.shape) if for_h else None
        return [of_h, _summed(of_mixed, h) if for_w1 else None, *[of_up for _ in ups]]


BLOCKS = _Blocks()


def _summed(p: Tensor, q: Tensor) -> Tensor:
    """Return `Σ p · qᵀ` over the first dimension."""
    # One product takes transposed copies of both, a batched one a result for each row.
    if p.shape[2] < q.shape[1]:
        return torch.einsum("nak,nbk->ab", p, q)
    return torch.bmm(p, q.mT).sum(0)
