# SPDX-License-Identifier: Apache-2.0
"""Products of rows with the matrix of their expert, for rows that are sorted by expert."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.calls.rows import RowOwners
from ..base.tracing import shapes
from .dispatch import is_eager, without_autocast

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
# The kernels want rows of a multiple of this many bytes.
_ALIGNMENT = 16
# Oldest compute capability of the kernels.
_AMPERE = (8, 0)


class GroupedRows:
    """Rows of activations, sorted by the expert that they go to.

    Args:
        expert: `[rows]`, the expert of each row, ascending.
        token: `[rows]`, the token that each row is a copy of.
        tokens: All tokens, `[tokens, hidden]`.
        experts: Number of experts.

    Example:
        >>> tokens, chosen = torch.ones(3, 2), torch.tensor([2, 0, 1])
        >>> rows = GroupedRows(torch.tensor([0, 2, 2]), chosen, tokens, experts=3)
        >>> rows.product(tokens[chosen], torch.arange(3.0)[:, None, None].expand(3, 2, 1))
        tensor([[0.],
                [4.],
                [4.]])
    """

    def __init__(self, expert: Tensor, token: Tensor, tokens: Tensor, experts: int) -> None:
        self.expert, self.token, self.tokens, self.experts = expert, token, tokens, experts
        numbers = torch.arange(experts, device=expert.device, dtype=expert.dtype)
        self.offsets = torch.searchsorted(expert, numbers, right=True).to(torch.int32)

    def of_samples(self, values: Tensor, owners: RowOwners) -> Tensor:
        """Return values of samples, `[samples, …]`, as values of the rows, `[rows, …]`; `owners`
        tells the sample of each token.
        """
        by_token = owners.expand(values, self.tokens)
        (samples, *_), (tokens, *_) = shapes(by_token, self.tokens)
        if samples != tokens:
            by_token = by_token.repeat_interleave(tokens // samples, 0)
        return by_token[self.token]

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each expert, as numbers: read from the device once, and only without kernels."""
        ends: list[int] = self.offsets.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def product(self, x: Tensor, weight: Tensor, times: int = 1) -> Tensor:
        """Return the product of each row with its expert's matrix.

        Args:
            x: `[times · rows, n]`, with `times` consecutive rows in place of each.
            weight: `[experts, n, m]`.
            times: As above.

        Returns:
            `[times · rows, m]`, in the dtype of `x`.
        """
        if _has_kernel(x, weight):
            return F.grouped_mm(x, weight, offs=self.offsets * times)
        if is_eager():
            return self._one_by_one(x, weight, times)
        # A compiler can't trace sizes that depend on data.
        expert = self.expert if times == 1 else self.expert.repeat_interleave(times)
        return torch.bmm(x.unsqueeze(1), weight[expert]).squeeze(1)

    def _one_by_one(self, x: Tensor, weight: Tensor, times: int) -> Tensor:
        """Return the product by a matrix product for each expert that has rows."""
        parts = x.split([size * times for size in self.sizes])
        with without_autocast(x):
            pairs = zip(parts, weight.unbind(0), strict=True)
            products = [part @ matrix for part, matrix in pairs if part.shape[0]]
            return torch.cat(products) if products else x @ weight[0]

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Return `scale · B·A·x` with each row's expert's factors, in the dtype of `x`.

        Args:
            x: `[rows, in]`.
            A: `[experts, r, in]`.
            B: `[experts, out, r]`.
            scale: A number, or a tensor `[rows, 1]`.
        """
        A, B = A.to(x.dtype), B.to(x.dtype)
        step = _ALIGNMENT // x.element_size()
        if (extra := -A.shape[1] % step) and x.dtype in _KERNEL_DTYPES:
            A, B = F.pad(A, (0, 0, 0, extra)), F.pad(B, (0, extra))
        hidden = self.product(x, A.mT) * scale
        return self.product(hidden.to(x.dtype), B.mT.contiguous())


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Return whether torch's grouped product takes the operands."""
    if x.dtype not in _KERNEL_DTYPES or weight.dtype != x.dtype or not hasattr(F, "grouped_mm"):
        return False
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return False
    if any(size * x.element_size() % _ALIGNMENT for size in weight.shape[1:]):
        return False
    if x.device.type == "cuda":
        return torch.cuda.get_device_capability(x.device) >= _AMPERE
    return x.device.type == "cpu" and x.is_contiguous() and _is_aligned(x, weight)


def _is_aligned(*tensors: Tensor) -> bool:
    """Return whether memory starts where the kernels for CPUs want it; a file that is mapped into
    memory need not.
    """
    return torch.compiler.is_compiling() or all(
        is_eager() and tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors
    )
