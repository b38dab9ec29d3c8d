# SPDX-License-Identifier: Apache-2.0
"""The maths of LoRA against slow textbook formulas in float64."""

import math

import pytest
import torch
from torch import nn

from peft.ops.mixed_precision import scaled
from peft.tuners.lora.factors import (
    draw,
    draw_for_embedding,
    grouped_row_norms,
    orthogonal,
    row_norms,
)
from peft.tuners.lora.starts.weight import olora, pissa


def slow_row_norms(W, A, B, scale):
    """Element by element, of the dense sum."""
    return torch.tensor(
        [
            math.sqrt(
                sum(
                    (W[o, i] + scale * sum(B[o, k] * A[k, i] for k in range(A.shape[0]))) ** 2
                    for i in range(W.shape[1])
                )
            )
            for o in range(W.shape[0])
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize(
    ("out", "inp", "r", "scale"), [(5, 7, 3, 0.5), (4, 2, 6, -3.0), (1, 9, 1, 0.0), (6, 6, 2, 20.0)]
)
def test_row_norms_are_those_of_the_dense_sum(out, inp, r, scale):
    W, A, B = (
        torch.randn(out, inp).double(),
        torch.randn(r, inp).double(),
        torch.randn(out, r).double(),
    )
    expected = slow_row_norms(W, A, B, scale)
    torch.testing.assert_close(row_norms(W, A, B, scale), expected)
    torch.testing.assert_close(
        row_norms(W.mT.contiguous().mT, A, B, scale), expected
    )  # as Conv1D stores it
    torch.testing.assert_close(
        row_norms(W.float(), A.float(), B.float(), scale).double(), expected, atol=1e-5, rtol=1e-5
    )
    scale_tensor = torch.tensor(scale, dtype=torch.float64)  # as it is held for compiled models
    torch.testing.assert_close(row_norms(W, A, B, scale_tensor), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_norms_of_narrow_weights_are_wide(dtype):
    W, A, B = torch.randn(16, 64).to(dtype), torch.randn(4, 64), 0.1 * torch.randn(16, 4)
    norms = row_norms(W, A, B, 2.0)
    assert norms.dtype is torch.float32
    expected = (W.double() + 2 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(norms.double(), expected, atol=0, rtol=2e-3)
    # Without a delta nothing but the sum itself is rounded.
    torch.testing.assert_close(
        row_norms(W, A, 0 * B, 2.0).double(), W.double().norm(dim=1), atol=0, rtol=1e-6
    )


def test_row_norms_have_no_gradient_and_do_not_follow_autocast():
    W, A, B = (torch.randn(8, 8, requires_grad=True) for _ in range(3))
    plain = row_norms(W, A, B, 1.0)
    assert not plain.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(row_norms(W, A, B, 1.0), plain)


def test_a_row_of_zeros_can_be_divided_by():
    norms = row_norms(torch.zeros(2, 3), torch.randn(1, 3), torch.tensor([[0.0], [2.0]]), 1.0)
    assert (norms > 0).all()
    assert (torch.zeros(2) / norms == 0).all()


def test_grouped_norms_follow_the_interface():
    """W plus the product of the factors in the order of their elements, worked out entry by entry."""
    groups, r = 2, 4
    W, A, B = (
        torch.randn(6, 2, 3).double(),
        torch.randn(r, 4, 3).double(),
        torch.randn(6, r // groups, 1).double(),
    )
    flat = torch.zeros(W.numel()).double()
    columns = 4 * 3
    for n in range(W.numel()):
        row, column = divmod(n, columns)
        flat[n] = sum(
            B.flatten()[row * r + k] * A.flatten()[k * columns + column] for k in range(r)
        )
    expected = (W + 1.5 * flat.view(W.shape)).flatten(1).square().sum(1).sqrt()
    torch.testing.assert_close(grouped_row_norms(W, A, B, 1.5), expected)
    assert (grouped_row_norms(0 * W, A, 0 * B, 1.5) > 0).all()


def test_orthogonal_factors_have_a_product_of_zero():
    A, B = orthogonal(6, 20, 30)
    assert A.shape == (6, 20) and B.shape == (30, 6)
    assert (B @ A).abs().max() < 1e-6
    assert min(A.norm(), B.norm()) > 0.5
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 3


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_pissa_is_the_best_approximation(shape):
    W, scale = torch.randn(shape).double(), 1.5
    A, B = pissa(W, 4, scale)
    S = torch.linalg.svdvals(W)
    # Eckart and Young: no product of this rank is nearer than the rest of the singular values.
    torch.testing.assert_close((W - scale * B @ A).norm(), S[4:].square().sum().sqrt())
    torch.testing.assert_close(A @ A.mT, torch.diag(S[:4] / scale))
    torch.testing.assert_close(B.mT @ B, torch.diag(S[:4] / scale))
    A, B = pissa(W, 4, scale, niter=40)
    torch.testing.assert_close((W - scale * B @ A).norm(), S[4:].square().sum().sqrt())
    assert pissa(W.bfloat16(), 4, scale).A.dtype is torch.float32


def test_olora_is_a_projection_of_the_weight():
    W = torch.randn(12, 20).double()
    A, B = olora(W, 5)
    torch.testing.assert_close(B.mT @ B, torch.eye(5).double())
    torch.testing.assert_close(B @ A, B @ (B.mT @ W))
    torch.testing.assert_close((B @ A)[:, :5], W[:, :5])  # the span of the first columns


@pytest.mark.parametrize("shape", [(16, 400), (16, 50, 3)])
def test_starts(shape):
    r, fan_in = shape[0], math.prod(shape[1:])
    A, B = torch.empty(shape), torch.empty(300, r, *[1] * (len(shape) - 2))
    draw(A, B, True)
    bound = 1 / math.sqrt(fan_in)
    assert 0.9 * bound < A.abs().max() <= bound and (B == 0).all()
    draw(A, B, "gaussian")
    assert abs(A.std() * r - 1) < 0.05 and (B == 0).all()
    draw(A, B, False)
    assert 0.9 / math.sqrt(r) < B.abs().max() <= 1 / math.sqrt(r)
    a, b = torch.empty(16, 500), torch.empty(300, 16)
    draw_for_embedding(a, b, True)
    assert (a == 0).all() and abs(b.std() - 1) < 0.05
    draw_for_embedding(a, b, False)
    assert abs(a.std() - 1) < 0.05 and abs(b.std() - 1) < 0.05


def test_a_scale_of_one_costs_nothing():
    h = torch.randn(3)
    assert scaled(h, 1.0) is h
    assert torch.equal(scaled(h, 2.0), 2 * h)
    assert torch.equal(scaled(h, nn.Parameter(torch.tensor(1.0))), h)
