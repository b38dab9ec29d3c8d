# SPDX-License-Identifier: Apache-2.0
"""Batched products with thin factors, by either order, against float64."""

from __future__ import annotations

import pytest
import torch

from peft.ops.batched import batched_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 2, 10, 11])
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33])
@pytest.mark.parametrize("interleaved", [True, False])
def test_a_batched_product_and_its_gradients(dtype, columns, rows, interleaved):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, rows, 24, generator=random).to(dtype)
    factor = torch.randn(3, 24, columns, generator=random).to(dtype)
    cotangent = torch.randn(3, rows, columns, generator=random).to(dtype)
    exact = [
        torch.einsum("nrk,nkm->nrm", x.double(), factor.double()),
        torch.einsum("nrm,nkm->nrk", cotangent.double(), factor.double()),
        torch.einsum("nrk,nrm->nkm", x.double(), cotangent.double()),
    ]
    if not interleaved:
        factor = factor.mT.contiguous().mT
    x.requires_grad_()
    factor.requires_grad_()
    result = batched_product(x, factor)
    is_transposed = rows >= 32 and columns in (2, 10) and interleaved and dtype == torch.float32
    assert (result.stride(2) != 1) == is_transposed or columns == 1
    found = [result, *torch.autograd.grad(result, (x, factor), cotangent)]
    bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.2}[dtype]
    for tensor, expected in zip(found, exact, strict=True):
        assert tensor.dtype == dtype and tensor.shape == expected.shape
        torch.testing.assert_close(tensor.double(), expected, rtol=bound, atol=bound)


def test_rows_that_several_factors_share():
    x, factors = torch.randn(1, 40, 24), torch.randn(3, 24, 4)
    shared = batched_product(x.expand(3, -1, -1), factors)
    for one, factor in zip(shared, factors, strict=True):
        expected = x[0].double() @ factor.double()
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-5)
