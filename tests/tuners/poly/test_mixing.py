# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of Poly against slow loops in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft.core.routing.pooling import pool, prompt_mask
from peft.tuners.poly import mixing
from peft.tuners.poly.gating import gates, normalize
from peft.tuners.poly.inventory import grow_skills
from peft.tuners.poly.mixing import (
    decoding_chain,
    mix,
    mixing_matrix,
    poly_delta,
    rank_space_pays,
    skill_columns,
    task_factors,
)

few = settings(max_examples=25, deadline=None)
either_path = pytest.mark.parametrize("rank_space", [False, True], ids=["matrices", "rank-space"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def skills(
    n_splits: int, n_skills: int, n_in: int, n_out: int, r: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    A = normal(n_splits, n_skills, n_in // n_splits, r, seed=seed)
    return A, normal(n_splits, n_skills, r, n_out // n_splits, seed=seed + 1)


def mixed(weights: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """`A_w [in, r]` and `B_w [r, out]` of one sample: sums over skills, stacked and concatenated
    over splits.
    """
    n_splits, n_skills = weights.shape
    stacked = [sum(weights[q, s] * A[q, s] for s in range(n_skills)) for q in range(n_splits)]
    joined = [sum(weights[q, s] * B[q, s] for s in range(n_skills)) for q in range(n_splits)]
    return torch.cat(stacked, dim=0), torch.cat(joined, dim=1)  # type: ignore[arg-type]


def delta_by_loop(x: Tensor, weights: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """One row, and with weights per token one token, after the other."""
    rows = []
    for i, row in enumerate(x):
        if weights.dim() > 3:
            rows.append(delta_by_loop(row, weights[i], A, B, scale))
        else:
            A_w, B_w = mixed(weights[i // (len(x) // len(weights))], A, B)
            rows.append(row @ A_w @ B_w * scale)
    return torch.stack(rows)


@contextmanager
def path(rank_space: bool) -> Iterator[None]:
    """Overrule the cost model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "rank_space_pays", lambda *sizes: rank_space)
        yield


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of any leading sizes, weights per sample (of k rows) or per token, and skills."""
    size = st.integers(1, 3)
    n_splits, n_skills, r, seed = draw(size), draw(size), draw(size), draw(st.integers(0, 2**16))
    n_in, n_out = n_splits * draw(size), n_splits * draw(size)
    A, B = skills(n_splits, n_skills, n_in, n_out, r, seed)
    leading = draw(st.lists(size, max_size=2))
    batch = draw(size)
    if leading and draw(st.booleans()):
        weights = normal(batch, *leading, n_splits, n_skills, seed=seed + 2)
        return normal(batch, *leading, n_in, seed=seed + 3), weights, A, B
    weights = normal(batch, n_splits, n_skills, seed=seed + 2)
    return normal(batch * draw(size), *leading, n_in, seed=seed + 3), weights, A, B


@given(problems(), st.booleans(), st.booleans())
@few
def test_delta_is_the_loop(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], rank_space: bool, tracked: bool
) -> None:
    with path(rank_space), torch.set_grad_enabled(tracked):
        delta = poly_delta(*problem, 0.5)
    torch.testing.assert_close(delta, delta_by_loop(*problem, 0.5))


@pytest.mark.parametrize("n_splits", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("in_columns", [False, True])
def test_decoding_is_the_loop(n_splits: int, tokens: int, in_columns: bool) -> None:
    A, B = skills(n_splits, 3, 4, 6, 2)
    x, weights = normal(5, tokens, 4), normal(5, n_splits, 3)
    columns = skill_columns(A) if in_columns else None
    with torch.no_grad():
        chain = decoding_chain(x, mixing_matrix(weights, 0.5), A, B, tokens, columns)
    torch.testing.assert_close(
        chain.delta().reshape(5, tokens, 6), delta_by_loop(x, weights, A, B, 0.5)
    )


@given(problems())
@few
def test_mix_is_the_loop(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, weights, A, B = problem
    weights = weights.flatten(0, -3)
    A_w, B_w = mix(weights, A, B, scale=0.5)
    for b, sample in enumerate(weights):
        expected_A, expected_B = mixed(sample, A, B)
        torch.testing.assert_close(A_w[b], expected_A)
        torch.testing.assert_close(B_w[b], expected_B * 0.5)


@either_path
@pytest.mark.parametrize("token_level", [False, True])
def test_gradients_reach_everything(rank_space: bool, token_level: bool) -> None:
    A, B = skills(n_splits=2, n_skills=3, n_in=4, n_out=6, r=2)
    x, weights = normal(4, 3, 4), normal(4, 3, 2, 3) if token_level else normal(2, 2, 3)
    arguments = [tensor.clone().requires_grad_() for tensor in (x, weights, A, B)]
    with path(rank_space):
        assert torch.autograd.gradcheck(lambda *tensors: poly_delta(*tensors, 0.5), arguments)


@either_path
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("leading", [(4,), (4, 3), (4, 2, 3), (4, 0), (0, 3)])
def test_any_leading_sizes(rank_space: bool, tracked: bool, leading: tuple[int, ...]) -> None:
    A, B = skills(2, 3, 4, 6, 3)
    with path(rank_space), torch.set_grad_enabled(tracked):
        delta = poly_delta(normal(*leading, 4), normal(leading[0], 2, 3), A, B, 0.5)
    assert delta.shape == (*leading, 6)


@either_path
def test_every_row_of_a_sample_keeps_its_weights(rank_space: bool) -> None:
    A, B = skills(2, 3, 4, 6, 2)
    x, weights = normal(6, 5, 4), normal(2, 2, 3)
    with path(rank_space):
        grouped = poly_delta(x, weights, A, B)
        repeated = poly_delta(x, weights.repeat_interleave(3, dim=0), A, B)
    torch.testing.assert_close(grouped, repeated)


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (
            (3, 4),
            (2, 1, 2),
            r"3 rows \(shape \(3, 4\)\) does not fit routing weights for 2 samples",
        ),
        ((2, 3, 4), (3, 1, 2), "2 rows .* 3 samples"),
        ((2, 4), (0, 1, 2), "2 rows .* 0 samples"),
        (
            (2, 3, 4),
            (2, 2, 1, 2),
            r"weights of shape \(2, 2, 1, 2\) do not fit an input of shape \(2, 3, 4\)",
        ),
    ],
)
def test_rows_that_belong_to_no_sample_are_refused(
    x: tuple[int, ...], weights: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        poly_delta(torch.zeros(x), torch.zeros(weights), *skills(1, 2, 4, 4, 2))


class Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_rank_space_holds_nothing_larger_than_all_skills_at_rank_r() -> None:
    rows, tokens, n_splits, n_skills, r, width = 2, 50, 2, 4, 3, 8
    A, B = skills(n_splits, n_skills, width, width, r)
    x, weights = normal(rows, tokens, width), normal(rows, tokens, n_splits, n_skills)
    with Largest() as largest:
        poly_delta(x, weights, A, B)
    assert largest.numel <= rows * tokens * n_splits * n_skills * r


def test_matrices_are_mixed_once_per_sample_not_per_row() -> None:
    batch, k, n_in, n_out, r = 2, 16, 64, 64, 2
    A, B = skills(1, 4, n_in, n_out, r)
    x, weights = normal(batch * k, 1, n_in), normal(batch, 1, 4)
    assert not rank_space_pays(batch, k, n_in + n_out, 1, 4)
    with Largest() as largest:
        poly_delta(x, weights, A, B)
    assert largest.numel <= max(x.numel(), 4 * n_in * r)


def test_cost_model_sends_few_tokens_and_token_level_through_rank_space() -> None:
    width = 2 * 4096
    assert rank_space_pays(batch=64, tokens=1, features=width, n_splits=1, n_skills=4)
    assert not rank_space_pays(batch=1, tokens=1, features=width, n_splits=1, n_skills=4)
    assert not rank_space_pays(batch=8, tokens=512, features=width, n_splits=1, n_skills=4)
    assert rank_space_pays(batch=8 * 512, tokens=1, features=width, n_splits=1, n_skills=8)
    assert rank_space_pays(batch=8 * 512, tokens=1, features=width, n_splits=64, n_skills=8)
    assert [rank_space_pays(32, n, width, 1, 4) for n in (6, 7)] == [True, False]
    assert [rank_space_pays(32, n, width, 1, 8) for n in (3, 4)] == [True, False]


@either_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_skills_take_float32_weights(rank_space: bool, dtype: torch.dtype) -> None:
    A, B = skills(2, 3, 8, 6, 2)
    x, weights = normal(4, 3, 8), normalize(normal(4, 2, 3).sigmoid())
    with path(rank_space):
        delta = poly_delta(x.to(dtype), weights.float(), A.to(dtype), B.to(dtype), 0.5)
    assert delta.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        delta.double(), delta_by_loop(x, weights, A, B, 0.5), atol=tolerance, rtol=tolerance
    )


@either_path
def test_autocast_multiplies_in_half_precision(rank_space: bool) -> None:
    A, B = skills(2, 3, 8, 6, 2)
    x, weights = normal(4, 3, 8), normalize(normal(4, 2, 3).sigmoid())
    leaves = [tensor.float().requires_grad_() for tensor in (x, weights, A, B)]
    with path(rank_space), torch.autocast("cpu", dtype=torch.bfloat16):
        delta = poly_delta(*leaves, 0.5)
    assert delta.dtype == torch.bfloat16
    torch.testing.assert_close(
        delta.double(), delta_by_loop(x, weights, A, B, 0.5), atol=0.1, rtol=0.1
    )
    delta.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.compile
@pytest.mark.parametrize("tokens", [1, 40])
def test_delta_compiles_without_a_graph_break(tokens: int) -> None:
    A, B = skills(2, 4, 64, 64, 2)
    x, weights = normal(16, tokens, 64), normal(8, 2, 4)
    compiled = torch.compile(poly_delta, fullgraph=True, backend="eager", dynamic=True)
    torch.testing.assert_close(compiled(x, weights, A, B, 0.5), poly_delta(x, weights, A, B, 0.5))


@pytest.mark.compile
def test_routing_compiles_without_a_graph_break() -> None:
    def route(
        logits: Tensor, x: Tensor, mask: Tensor, labels: Tensor, training: bool
    ) -> tuple[Tensor, Tensor]:
        return normalize(gates(logits, training)), pool(x, prompt_mask(mask, labels))

    arguments = (
        normal(2, 3),
        normal(2, 4, 5),
        torch.ones(2, 4),
        torch.tensor([[-100, 1, 2, 3]] * 2),
    )
    for training in (False, True):
        compiled = torch.compile(route, fullgraph=True, backend="eager")
        torch.manual_seed(0)
        ours = compiled(*arguments, training)
        torch.manual_seed(0)
        assert all(map(torch.equal, ours, route(*arguments, training)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_gates_are_relaxed_bernoulli_to_the_bit(dtype: torch.dtype) -> None:
    logits = normal(40, 3, 5, dtype=dtype) * 15
    torch.manual_seed(1)
    ours = gates(logits, training=True)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    reference = torch.distributions.RelaxedBernoulli(
        torch.ones((), dtype=dtype), logits=logits
    ).rsample()
    assert torch.equal(ours, reference)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_half_precision_logits_are_sampled_in_float32(dtype: torch.dtype, training: bool) -> None:
    logits = (normal(200, 4) * 20).to(dtype).requires_grad_()
    torch.manual_seed(2)
    half = gates(logits, training)
    torch.manual_seed(2)
    assert torch.equal(half, gates(logits.float(), training))
    half.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_training_gates_are_reparameterised() -> None:
    def sample(logits: Tensor) -> Tensor:
        torch.manual_seed(3)
        return gates(logits, training=True)

    assert torch.autograd.gradcheck(sample, normal(4, 3).requires_grad_())


@given(st.lists(st.lists(st.floats(-100, 100), min_size=3, max_size=3), min_size=1, max_size=4))
@few
def test_eval_gates_normalize_to_the_formula(rows: list[list[float]]) -> None:
    weights = normalize(gates(torch.tensor(rows, dtype=torch.float64), training=False))
    for row, ours in zip(rows, weights.tolist(), strict=True):
        opened = [1 / (1 + math.exp(-logit)) for logit in row]
        assert ours == pytest.approx([gate / (sum(opened) + 1e-12) for gate in opened])


def test_closed_gates_give_zero_weights() -> None:
    assert torch.equal(normalize(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("n_splits", [1, 2])
def test_one_task_is_a_lora(n_splits: int) -> None:
    A, B = skills(n_splits, 3, 8, 6, 2)
    weights, x = normal(n_splits, 3), normal(5, 8)
    factor_A, factor_B = task_factors(weights, A, B, 0.5)
    assert (factor_A.shape, factor_B.shape) == ((2, 8), (6, 2))
    assert factor_A.is_contiguous()
    assert factor_B.is_contiguous()
    weight = factor_B @ factor_A
    assert torch.linalg.matrix_rank(weight) == 2
    torch.testing.assert_close(x @ weight.T, poly_delta(x, weights.expand(5, -1, -1), A, B, 0.5))


def task_deltas(logits: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Weight updates of all tasks in eval, `[n_tasks, out, in]`."""
    weights = normalize(gates(logits.view(len(logits), *A.shape[:2]), training=False))
    factors = [task_factors(task, A, B) for task in weights]
    return torch.stack([factor_B @ factor_A for factor_A, factor_B in factors])


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 10),
    st.sampled_from([1e-3, 3.0, 60.0]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
@few
def test_growth_keeps_every_task(
    n_splits: int,
    n_skills: int,
    extra: int,
    spread: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    A, B = (
        tensor.to(dtype)
        for tensor in skills(n_splits, n_skills, 2 * n_splits, 3 * n_splits, 2, seed)
    )
    logits = normal(5, n_splits * n_skills, seed=seed, dtype=dtype) * spread
    grown = grow_skills(logits, A, B, extra, torch.Generator().manual_seed(seed))
    assert grown[0].shape == (5, n_splits * (n_skills + extra))
    assert grown[1].shape == (n_splits, n_skills + extra, 2, 2)
    assert grown[2].shape == (n_splits, n_skills + extra, 2, 3)
    assert all(tensor.dtype == dtype and tensor.isfinite().all() for tensor in grown)
    torch.testing.assert_close(grown[1][:, :n_skills], A)
    rounding = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(
        task_deltas(*grown), task_deltas(logits, A, B), atol=rounding, rtol=rounding
    )


def test_growth_splits_gates_between_twins() -> None:
    A, B = skills(1, 3, 2, 2, 1)
    logits = torch.tensor([[-1.0, 2.0, 0.0], [0.0, 3.0, -40.0]], dtype=torch.float64)
    grown, new_A, _ = grow_skills(logits, A, B, 1, torch.Generator().manual_seed(0))
    assert torch.equal(new_A[:, 3], A[:, 1]), "the most used skill is cloned"
    assert torch.equal(grown[:, [0, 2]], logits[:, [0, 2]])
    torch.testing.assert_close(
        grown[:, 1].sigmoid() + grown[:, 3].sigmoid(), logits[:, 1].sigmoid()
    )
    share = grown[:, 3].sigmoid() / logits[:, 1].sigmoid()
    assert ((share > 0.25) & (share < 0.75)).all()
    assert share[0] != share[1]


def test_new_skills_learn() -> None:
    A, B = skills(2, 3, 4, 6, 2)
    leaves = [
        tensor.detach().requires_grad_() for tensor in grow_skills(normal(4, 6), A, B, extra=2)
    ]
    logits, A, B = leaves
    weights = normalize(gates(logits.view(4, 2, 5), training=False))
    poly_delta(normal(4, 3, 4), weights, A, B).square().sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    for gradient in (logits.grad.view(4, 2, 5)[..., 3:], A.grad[:, 3:], B.grad[:, 3:]):  # type: ignore[union-attr,index]
        assert (gradient != 0).all()


def test_growth_by_nothing_is_nothing() -> None:
    A, B = skills(1, 2, 2, 2, 1)
    logits = normal(3, 2)
    assert grow_skills(logits, A, B, 0) == (logits, A, B)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**12 - 1))
@few
def test_pool_is_the_mean_over_real_tokens(rows: int, tokens: int, bits: int) -> None:
    mask = torch.tensor(
        [[bits >> (row * tokens + t) & 1 for t in range(tokens)] for row in range(rows)]
    )
    x = normal(rows, tokens, 3)
    expected = torch.zeros(rows, 3, dtype=torch.float64)
    for row in range(rows):
        real = [x[row, t] for t in range(tokens) if mask[row, t]]
        if real:
            expected[row] = sum(real) / len(real)  # type: ignore[call-overload]
    for junk in (0.0, math.nan, math.inf):
        padded = torch.where(mask.bool().unsqueeze(-1), x, junk).requires_grad_()
        pooled = pool(padded, mask)
        torch.testing.assert_close(pooled, expected)
        (gradient,) = torch.autograd.grad(pooled.sum(), padded)
        assert gradient.isfinite().all()
        assert (gradient[mask == 0] == 0).all()


@pytest.mark.parametrize("leading", [(), (4,), (4, 2), (0,)])
def test_pool_without_a_mask_is_the_mean(leading: tuple[int, ...]) -> None:
    x = normal(3, *leading, 5)
    expected = x.reshape(3, -1, 5).nanmean(dim=1).nan_to_num() if leading else x
    torch.testing.assert_close(pool(x), expected)
    if leading:
        torch.testing.assert_close(pool(x, torch.ones(3, math.prod(leading))), expected)


def test_pool_does_not_overflow_half_precision() -> None:
    x = torch.full((1, 1000, 2), 1000.0, dtype=torch.float16)
    for mask in (None, torch.ones(1, 1000)):
        assert torch.equal(pool(x, mask), torch.full((1, 2), 1000.0, dtype=torch.float16))


def test_pool_refuses_a_mask_of_another_size() -> None:
    with pytest.raises(
        ValueError, match=r"mask of shape \(2, 5\) does not fit .* \(2, 4, 3\): .* \(2, 4\)"
    ):
        pool(torch.zeros(2, 4, 3), torch.ones(2, 5))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=6), st.booleans())
@few
def test_prompt_mask_is_the_real_tokens_before_the_answer(
    tokens: list[tuple[bool, bool]], all_real: bool
) -> None:
    tokens = [(real or all_real, supervised) for real, supervised in tokens]
    expected = [False] * len(tokens)
    for t, (real, supervised) in enumerate(tokens):
        if real and supervised:
            break
        expected[t] = real
    if not any(expected):
        for t, (real, _) in enumerate(tokens):
            if real:
                expected[t] = True
                break
    mask = None if all_real else torch.tensor([[int(real) for real, _ in tokens]])
    labels = torch.tensor([[7 if supervised else -100 for _, supervised in tokens]])
    assert prompt_mask(mask, labels).tolist() == [expected]
