# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of VB-LoRA against a slow loop in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.vector_bank import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft.tuners.vblora import bank as bank_module
from peft.tuners.vblora.bank import (
    compose_factors,
    compress,
    expand,
    index_dtype,
    is_topk_only,
    savable_parameters,
)

few = settings(max_examples=25, deadline=None)
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def tile(logits: list[float], bank: list[list[float]], topk: int) -> list[float]:
    """One position, by the words of the paper."""
    best = sorted(range(len(logits)), key=lambda i: -logits[i])[:topk]
    total = sum(math.exp(logits[i] - logits[best[0]]) for i in best)
    mixed = [0.0] * len(bank[0])
    for i in best:
        weight = math.exp(logits[i] - logits[best[0]]) / total
        for e, entry in enumerate(bank[i]):
            mixed[e] += weight * entry
    return mixed


def composed(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """`tile` at every position."""
    rows = [tile(row.tolist(), bank.tolist(), topk) for row in logits.reshape(-1, logits.shape[-1])]
    return torch.tensor(rows, dtype=torch.float64).reshape(*logits.shape[:-1], bank.shape[1])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Logits without ties, a bank and a topk."""
    num_vectors = draw(st.integers(1, 9))
    leading = draw(st.lists(st.integers(1, 3), max_size=3))
    seed = draw(st.integers(0, 2**16))
    logits = normal(*leading, num_vectors, seed=seed) * draw(st.sampled_from([0.01, 1.0, 30.0]))
    bank = normal(num_vectors, draw(st.integers(1, 5)), seed=seed + 1)
    return logits, bank, draw(st.integers(1, num_vectors))


@given(problems())
@few
def test_compose_is_the_loop(problem: tuple[Tensor, Tensor, int]) -> None:
    logits, bank, topk = problem
    torch.testing.assert_close(compose(logits, bank, topk), composed(logits, bank, topk))


@given(problems())
@few
def test_devices_without_the_fused_kernel_give_the_same(
    problem: tuple[Tensor, Tensor, int],
) -> None:
    logits, bank, topk = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank_module, "_FUSED_DEVICES", frozenset())
        gathered = compose(logits, bank, topk)
    torch.testing.assert_close(gathered, compose(logits, bank, topk))


@pytest.mark.parametrize("topk", [1, 2, 5])
def test_gradients_reach_logits_and_bank(topk: int) -> None:
    logits, bank = normal(2, 3, 5).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits, bank: compose(logits, bank, topk), (logits, bank)
    )


def test_only_the_chosen_logits_have_a_gradient() -> None:
    logits = torch.tensor([3.0, -1.0, 2.0, 1.0], requires_grad=True)
    compose(logits, normal(4, 3, dtype=torch.float32), topk=2).sum().backward()
    assert logits.grad is not None
    assert (logits.grad != 0).tolist() == [True, False, True, False]


def test_equal_logits_give_equal_weights() -> None:
    bank = torch.eye(6)
    mixed = compose(torch.zeros(4, 6), bank, topk=3)
    assert sorted(mixed[0].tolist()) == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 1 / 3])


def test_the_backward_keeps_no_gathered_vectors() -> None:
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    logits, bank = normal(10, 4, 8).requires_grad_(), normal(8, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compose(logits, bank, topk=3)
    assert max(kept) <= max(bank.numel(), 10 * 4 * 3)


@half
def test_a_half_precision_bank_rounds_once(dtype: torch.dtype) -> None:
    logits, bank = normal(3, 2, 7, dtype=dtype), normal(7, 4, seed=1, dtype=dtype)
    mixed = compose(logits, bank, topk=3)
    assert mixed.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        mixed.double(), composed(logits.double(), bank.double(), 3), rtol=eps, atol=1e-6
    )


@half
def test_half_precision_trains(dtype: torch.dtype) -> None:
    logits, bank = (
        normal(3, 7, dtype=dtype).requires_grad_(),
        normal(7, 4, dtype=dtype).requires_grad_(),
    )
    compose(logits, bank, topk=2).sum().backward()
    assert logits.grad is not None and bank.grad is not None
    assert logits.grad.dtype == bank.grad.dtype == dtype
    assert logits.grad.isfinite().all() and bank.grad.count_nonzero() > 0


def test_autocast_does_not_reach_the_composition() -> None:
    logits, bank = normal(3, 7, dtype=torch.float32), normal(7, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = compose(logits, bank, topk=2)
    assert torch.equal(mixed, compose(logits, bank, topk=2))


def test_factors_lay_tiles_along_the_features() -> None:
    r, tiles_in, tiles_out, length, num_vectors, topk = 3, 2, 4, 5, 7, 2
    logits_A, logits_B = normal(r, tiles_in, num_vectors), normal(tiles_out, r, num_vectors, seed=1)
    bank = normal(num_vectors, length, seed=2)
    expected_A = torch.zeros(r, tiles_in * length, dtype=torch.float64)
    expected_B = torch.zeros(tiles_out * length, r, dtype=torch.float64)
    for j in range(r):
        for t in range(tiles_in):
            expected_A[j, t * length : (t + 1) * length] = composed(logits_A[j, t], bank, topk)
        for t in range(tiles_out):
            expected_B[t * length : (t + 1) * length, j] = composed(logits_B[t, j], bank, topk)
    A, B = compose_factors(logits_A, logits_B, bank, topk)
    torch.testing.assert_close(A, expected_A)
    torch.testing.assert_close(B, expected_B)


@pytest.mark.compile
def test_compiles_without_a_graph_break() -> None:
    arguments = (normal(3, 2, 7), normal(4, 3, 7), normal(7, 5), 2)
    compiled = torch.compile(compose_factors, fullgraph=True, backend="eager")
    for ours, eager in zip(compiled(*arguments), compose_factors(*arguments), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize(
    ("num_vectors", "dtype"),
    [
        (1, torch.uint8),
        (255, torch.uint8),
        (256, torch.int16),
        (32767, torch.int16),
        (32768, torch.int32),
        (2**31 - 1, torch.int32),
        (2**31, torch.int64),
    ],
)
def test_index_dtype_holds_the_number_of_vectors(num_vectors: int, dtype: torch.dtype) -> None:
    assert index_dtype(num_vectors) == dtype


@given(problems(), st.sampled_from([torch.float64, torch.float32]))
@few
def test_compact_form_composes_to_the_same(
    problem: tuple[Tensor, Tensor, int], dtype: torch.dtype
) -> None:
    logits, bank, topk = problem
    indices, weights = compress(logits.to(dtype), topk)
    assert indices.shape == (*logits.shape[:-1], topk) and indices.dtype == torch.uint8
    assert weights.shape == (*logits.shape[:-1], topk - 1) and weights.dtype == torch.float32
    assert indices.is_contiguous() and weights.is_contiguous()
    rebuilt = expand(indices, weights, bank.shape[0])
    assert not rebuilt.isnan().any()
    torch.testing.assert_close(
        compose(rebuilt, bank, topk), compose(logits, bank, topk), atol=1e-5, rtol=1e-5
    )


@given(problems())
@few
def test_compact_form_holds_best_first_and_leaves_out_the_last_weight(
    problem: tuple[Tensor, Tensor, int],
) -> None:
    logits, _, topk = problem
    indices, weights = compress(logits, topk)
    for row, chosen, kept in zip(
        logits.reshape(-1, logits.shape[-1]).tolist(),
        indices.reshape(-1, topk).tolist(),
        weights.reshape(-1, topk - 1).tolist() if topk > 1 else [[]] * indices.numel(),
        strict=True,
    ):
        best = sorted(range(len(row)), key=lambda i: -row[i])[:topk]
        assert chosen == best
        total = sum(math.exp(row[i] - row[best[0]]) for i in best)
        assert kept == pytest.approx(
            [math.exp(row[i] - row[best[0]]) / total for i in best[:-1]], rel=1e-5
        )


@half
def test_weights_are_float32_whatever_the_logits(dtype: torch.dtype) -> None:
    logits = normal(4, 300, dtype=dtype)
    indices, weights = compress(logits, topk=3)
    assert (indices.dtype, weights.dtype) == (torch.int16, torch.float32)
    assert torch.equal(weights, logits.topk(3).values.float().softmax(-1)[..., :-1])


@half
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_files_of_half_precision_weights_load(dtype: torch.dtype, topk: int) -> None:
    logits, bank = normal(5, 12), normal(12, 3)
    indices, weights = compress(logits, topk)
    rebuilt = expand(indices, weights.to(dtype), num_vectors=12, dtype=torch.float64)
    assert rebuilt.dtype == torch.float64
    tolerance = 4 * torch.finfo(dtype).eps
    expected = composed(logits, bank, topk)
    torch.testing.assert_close(
        compose(rebuilt, bank, topk), expected, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize(
    "weights",
    [[0.75, 0.2500001], [0.75, 0.251], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1 / 3, 1 / 3]],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_negative_or_nan(weights: list[float], dtype: torch.dtype) -> None:
    indices = torch.tensor([[4, 1, 2]], dtype=torch.uint8)
    logits = expand(indices, torch.tensor([weights]), num_vectors=5, dtype=dtype)
    assert logits.dtype == dtype
    chosen = logits.topk(3, dim=-1)
    assert set(chosen.indices[0].tolist()) == {1, 2, 4}
    full = logits.double().softmax(-1)[0, indices[0].long()]
    assert full.isfinite().all()
    expected = [*weights, max(0.0, 1 - sum(weights))]
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # the weights are float32
    assert full.tolist() == pytest.approx([w / sum(expected) for w in expected], abs=8 * eps)


def test_one_vector_per_position_needs_no_weights() -> None:
    logits, bank = normal(2, 3, 6), normal(6, 4)
    indices, weights = compress(logits, topk=1)
    assert weights.shape == (2, 3, 0)
    assert torch.equal(compose(expand(indices, weights, 6), bank, topk=1), bank[logits.argmax(-1)])


def test_only_rebuilt_logits_are_topk_only() -> None:
    logits = normal(4, 6)
    assert not is_topk_only(logits)
    assert is_topk_only(expand(*compress(logits, 2), 6))
    assert not is_topk_only(expand(*compress(logits, 6), 6)), "nothing was left out"


# Counts given by Hugging Face PEFT 0.21.2 for one or three linears of 8 -> 12 (2 + 3 tiles of
# length 4) at r = 3.
@pytest.mark.parametrize(
    ("linears", "num_vectors", "topk", "total"),
    [
        (1, 10, 1, 43),
        (1, 10, 2, 62),
        (1, 10, 3, 81),
        (1, 255, 2, 1042),
        (1, 256, 2, 1054),
        (1, 32768, 2, 131117),
        (3, 300, 2, 1290),
        (3, 40000, 3, 160225),
        (3, 300, None, 1200 + 3 * 15 * 300),
    ],
)
def test_savable_parameters_count_float32_numbers(
    linears: int, num_vectors: int, topk: int | None, total: int
) -> None:
    positions = (3 * 2, 3 * 3) * linears
    counts = [savable_parameters(n, num_vectors, topk) for n in positions]
    assert int(sum(counts) + 4 * num_vectors) == total


def test_savable_parameters_is_what_compress_writes() -> None:
    logits = normal(3, 2, 300)
    written = sum(tensor.numel() * tensor.element_size() for tensor in compress(logits, 4))
    assert savable_parameters(logits.numel() // 300, 300, topk=4) == written / 4


@pytest.mark.parametrize("topk", [1, 2, 5])
def test_long_rows_are_searched_by_blocks(topk: int) -> None:
    logits = torch.randn(3, 2, 2 * bank_module._LONG, requires_grad=True)
    with torch.no_grad():
        logits[0, :, 7:] = -torch.inf  # all but one block
        logits[1, 0, 64::64] = 9.0  # ties
    expected, ours = logits.topk(topk), bank_module.fast_topk(logits, topk)
    assert torch.equal(ours[0], expected.values)
    assert torch.equal(logits.gather(-1, ours[1]), ours[0])
    assert all(len(set(row.tolist())) == topk for row in ours[1].flatten(0, 1))
    of_ours, of_expected = (
        torch.autograd.grad(values.sum(), logits)[0] for values in (ours[0], expected.values)
    )
    assert torch.equal(of_ours[2], of_expected[2])
