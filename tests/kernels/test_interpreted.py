# SPDX-License-Identifier: Apache-2.0
"""Kernels against formulas in float64 and against the plain operations, interpreted on the CPU."""

import contextlib
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft
from peft.ops import triton_support
from peft.tuners.poly import gating
from peft.tuners.poly import gating_triton as poly_kernels
from peft.tuners.poly import mixing_triton as mixing_kernels
from peft.tuners.poly.gating import Gating, mixing_weights
from peft.tuners.poly.mixing import mix
from peft.tuners.vblora import bank_triton as vblora_kernels
from peft.tuners.vblora.bank import compose_factors

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("interpreter")]

# The interpreter cuts bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def assert_near(found, expected, tolerance):
    scale = expected.abs().max().clamp(min=1e-3).item()
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * scale)


@contextlib.contextmanager
def plain():
    """Without kernels."""
    with mock.patch.object(triton_support, "can_launch", return_value=False):
        yield


@pytest.fixture(scope="module", autouse=True)
def _tried(interpreter):
    """That they agree is found out at their first use."""
    compose_factors(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.zeros(2, 2), 1)
    gating.task_weights(torch.zeros(1, 2), torch.tensor([0]), 1, Gating(), False)
    mix(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


@contextlib.contextmanager
def counted():
    """How often kernels compute results."""
    calls: list[int] = []
    with contextlib.ExitStack() as stack:
        for module in (vblora_kernels, poly_kernels, mixing_kernels):
            own = module.forward
            stack.enter_context(
                mock.patch.object(
                    module, "forward", lambda *a, own=own: (calls.append(1), own(*a))[1]
                )
            )
        yield calls


# --- VB-LoRA
# --------------------------------------------------------------------------------------------------------
#
#


def factors(logits_A, logits_B, bank, topk):
    """By the words of the paper, one tile after the other."""
    (r, tiles_A, _), tiles_B, v = logits_A.shape, logits_B.shape[0], bank.shape[1]
    A, B = (
        torch.zeros(r, tiles_A * v, dtype=torch.float64),
        torch.zeros(tiles_B * v, r, dtype=torch.float64),
    )
    for j in range(r):
        for t in range(tiles_A):
            A[j, t * v : (t + 1) * v] = tile(logits_A[j, t], bank, topk)
        for t in range(tiles_B):
            B[t * v : (t + 1) * v, j] = tile(logits_B[t, j], bank, topk)
    return A, B


def tile(logits, bank, topk):
    best = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:topk]
    exponentials = [(logits[i] - logits[best[0]]).exp() for i in best]
    return sum(e * bank[i] for e, i in zip(exponentials, best, strict=True)) / sum(exponentials)


def problem(num_vectors, length, r, tiles_A, tiles_B, topk, dtype, seed=0):
    """Logits without ties, in any precision: what is chosen is well above the rest. And a bank."""
    generator = torch.Generator().manual_seed(seed)
    logits = []
    for shape in ((r, tiles_A), (tiles_B, r)):
        rows = torch.rand(*shape, num_vectors, generator=generator) - 2
        order = torch.rand(*shape, num_vectors, generator=generator).argsort(-1)[..., :topk]
        logits.append(rows.scatter(-1, order, torch.arange(topk).expand(order.shape) / 4))
    bank = torch.randn(num_vectors, length, generator=generator)
    return [tensor.to(dtype).requires_grad_() for tensor in (*logits, bank)]


SIZES = [(10, 8, 2, 1, 3, 2), (7, 5, 1, 2, 1, 1), (130, 16, 2, 2, 1, 4), (5, 3, 2, 1, 1, 5)]


@dtypes
@pytest.mark.parametrize("sizes", SIZES)
def test_factors_and_their_gradients(sizes, dtype):
    topk = sizes[-1]
    ours = problem(*sizes, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    plainly = [tensor.detach().clone().requires_grad_() for tensor in ours]
    found = compose_factors(*ours, topk)
    expected = factors(*exact, topk)
    with plain():
        eager = compose_factors(*plainly, topk)
    hand_down = [torch.randn(f.shape, generator=torch.Generator().manual_seed(7)) for f in expected]
    for outputs in (found, expected, eager):
        torch.autograd.backward(
            outputs, [h.to(o.dtype) for h, o in zip(hand_down, outputs, strict=True)]
        )
    for one, other, third in zip(found, expected, eager, strict=True):
        assert one.dtype == dtype
        assert_near(one, other, TOLERANCE[dtype])
        assert_near(one, third, TOLERANCE[dtype])
    for one, other, third in zip(ours, exact, plainly, strict=True):
        assert one.grad.dtype == dtype
        assert_near(one.grad, other.grad, TOLERANCE[dtype])
        assert_near(one.grad, third.grad, TOLERANCE[dtype])
    for logits in ours[:2]:
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(
            -1, logits.topk(topk).indices, True
        )
        assert (logits.grad[~chosen] == 0).all()


def test_gradients_for_some_alone():
    """What is frozen gets none, and the others theirs."""
    whole = problem(6, 4, 2, 1, 2, 2, torch.float32)
    sum(f.sin().sum() for f in compose_factors(*whole, 2)).backward()
    for trained in ([0], [1], [2], [0, 1]):
        some = [tensor.detach().requires_grad_(i in trained) for i, tensor in enumerate(whole)]
        sum(f.sin().sum() for f in compose_factors(*some, 2)).backward()
        for i, (one, other) in enumerate(zip(some, whole, strict=True)):
            assert (
                one.grad is None
                if i not in trained
                else torch.allclose(one.grad, other.grad, atol=1e-6)
            )


def test_infinities_ties_and_nan():
    bank = torch.eye(6)
    logits_A = torch.full((2, 1, 6), -math.inf)
    logits_A[0, 0, 4] = 3.0  # one finite entry: it has all the weight
    logits_A[1, 0, 1:] = 2.0  # ties: the lowest numbers
    logits_B = torch.zeros(1, 2, 6)
    logits_B[0, 1, 3] = math.nan
    A, B = compose_factors(logits_A.requires_grad_(), logits_B, bank, topk=2)
    half = torch.tensor([0.5, 0.5])
    assert torch.equal(A[0], bank[4])
    assert torch.equal(A[1, 1:3], half) and A[1].sum() == 1
    assert torch.equal(B[:2, 0], half) and B[:, 0].sum() == 1
    assert B[:, 1].isnan().any()
    A.square().sum().backward()
    assert logits_A.grad.isfinite().all()
    # Of equal greatest logits the first are taken; a zero with a sign is a zero.
    A, _ = compose_factors(
        torch.tensor([[[-1.0, 0.0, -0.0, -7.0, -8.0, -9.0]]]), logits_B[:, :1], bank, topk=2
    )
    assert torch.equal(A[0, 1:3], half)


def second_derivatives(function, *tensors):
    """Of what a function returns, for its arguments."""
    results = function(*tensors)
    total = sum(r.sin().sum() for r in (results if isinstance(results, tuple) else (results,)))
    firsts = torch.autograd.grad(total, tensors, create_graph=True)
    return torch.autograd.grad(sum(first.cos().sum() for first in firsts), tensors)


def test_second_derivatives_of_factors():
    tensors = problem(6, 4, 2, 1, 2, 2, torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    found = second_derivatives(lambda *t: compose_factors(*t, 2), *tensors)
    for one, other in zip(
        found, second_derivatives(lambda *t: factors(*t, 2), *exact), strict=True
    ):
        assert_near(one, other, 1e-5)


def refused(logits_A, logits_B, bank):
    """Calls that plain operations answer."""
    yield lambda: compose_factors(logits_A.double(), logits_B.double(), bank.double(), 2)
    yield lambda: compose_factors(logits_A.half(), logits_B, bank, 2)
    yield lambda: compose_factors(logits_A, logits_B, bank.T.contiguous().T, 2)
    yield lambda: compose_factors(
        logits_A, logits_B, bank.as_subclass(type("Own", (torch.Tensor,), {})), 2
    )
    yield lambda: torch.func.grad(
        lambda bank: compose_factors(logits_A, logits_B, bank, 2)[0].sum()
    )(bank)
    yield lambda: torch.func.vmap(lambda bank: compose_factors(logits_A, logits_B, bank, 2)[0])(
        bank[None]
    )
    yield lambda: torch.jit.trace(
        lambda bank: compose_factors(logits_A, logits_B, bank, 2)[0], bank, check_trace=False
    )


def test_plain_operations_for_all_else():
    tensors = [tensor.detach() for tensor in problem(6, 4, 2, 1, 2, 2, torch.float32)]
    with counted() as calls:
        for call in refused(*tensors):
            call()
        torch.use_deterministic_algorithms(True)
        try:
            compose_factors(*tensors, 2)
        finally:
            torch.use_deterministic_algorithms(False)
        assert calls == []
        compose_factors(*tensors, 2)
        assert calls == [1]


def test_what_computes_something_else_is_not_used():
    """Were a compiler to get it wrong, plain operations would do it."""
    tensors = problem(6, 4, 2, 1, 2, 2, torch.float32)
    own = vblora_kernels.forward
    wrong = mock.patch.object(
        vblora_kernels, "forward", lambda *a: tuple(f * 1.01 for f in own(*a))
    )
    untried = mock.patch.dict(triton_support._TRIED, clear=True)
    with untried, wrong, pytest.warns(peft.PeftWarning, match="differ"):
        found = compose_factors(*tensors, 2)
    with plain():
        assert all(map(torch.equal, found, compose_factors(*tensors, 2)))


# --- Poly
# -----------------------------------------------------------------------------------------------------------
#
#


def task_weights(table, task_ids, n_splits, u):
    """The formula, with torch's clamping of a relaxed Bernoulli distribution in float32."""
    eps, tiny = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
    gates = table[task_ids].unflatten(-1, (n_splits, -1)).sigmoid()
    if u is not None:
        p, u = gates.clamp(eps, 1 - eps), u.double().clamp(eps, 1 - eps)
        gates = (p.log() - (1 - p).log() + u.log() - (1 - u).log()).sigmoid().clamp(tiny, 1 - eps)
    return gates / (gates.sum(-1, keepdim=True) + 1e-12)


@pytest.mark.parametrize("draw", [False, True])
def test_second_derivatives_of_weights(draw):
    table, task_ids = (
        torch.randn(3, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([2, 0, 2]),
    )
    torch.manual_seed(3)
    found = second_derivatives(
        lambda t: gating.task_weights(t, task_ids, 2, Gating(), draw),
        table.clone().requires_grad_(),
    )
    torch.manual_seed(3)
    u = torch.rand(3, 2, 4) if draw else None
    exact = second_derivatives(
        lambda t: task_weights(t, task_ids, 2, u), table.double().requires_grad_()
    )
    assert_near(found[0], exact[0], 1e-5)


@dtypes
@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize(
    ("n_tasks", "n_splits", "n_skills", "batch"), [(3, 4, 3, 5), (150, 4, 8, 4), (2, 1, 300, 2)]
)
def test_weights_and_their_gradients(n_tasks, n_splits, n_skills, batch, draw, dtype):
    generator = torch.Generator().manual_seed(0)
    table = (
        (torch.randn(n_tasks, n_splits * n_skills, generator=generator) * 4)
        .to(dtype)
        .requires_grad_()
    )
    exact, plainly = (
        table.detach().double().requires_grad_(),
        table.detach().clone().requires_grad_(),
    )
    task_ids = torch.randint(n_tasks, (batch,), generator=generator)
    task_ids[-1] = task_ids[0]  # two samples of one task
    hand_down = torch.randn(batch, n_splits, n_skills, generator=generator)

    torch.manual_seed(3)
    found = gating.task_weights(table, task_ids, n_splits, Gating(), draw)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    eager = mixing_weights(
        F.embedding(task_ids, plainly).unflatten(-1, (n_splits, -1)), Gating(), draw
    )
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    expected = task_weights(
        exact, task_ids, n_splits, torch.rand(batch, n_splits, n_skills) if draw else None
    )
    for weights in (found, expected, eager):
        weights.backward(hand_down.to(weights.dtype))
    assert found.dtype == torch.float32
    assert_near(found, expected, 2e-6)
    assert_near(found, eager, 2e-5)  # which rounds `sigmoid(l)` near 1
    assert table.grad.dtype == dtype
    assert_near(table.grad, exact.grad, TOLERANCE[dtype])
    assert_near(table.grad, plainly.grad, max(TOLERANCE[dtype], 2e-5))
    assert ((table.grad == 0) | (exact.grad != 0)).all()


@pytest.mark.parametrize("draw", [False, True])
def test_gates_at_their_ends(draw):
    """Far from zero gates are held where they are in plain operations, with no gradient; a row of
    closed gates has no weight.
    """
    values = torch.tensor(
        [[-100.0, 100.0, -16.0, 15.0], [-1e4, -1e4, -1e4, -1e4], [-15.0, -14.0, 14.0, 16.0]]
    )
    found, expected = (values.clone().requires_grad_() for _ in range(2))
    ids = torch.tensor([0, 1, 2])
    outputs = []
    for table, way in ((found, contextlib.nullcontext()), (expected, plain())):
        torch.manual_seed(1)
        with way:
            outputs.append(gating.task_weights(table, ids, 1, Gating(), draw))
        (outputs[-1] * torch.arange(12.0).view(3, 1, 4)).sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_one_id_for_all_and_a_task_that_is_not_there():
    table = torch.randn(3, 8)
    one = poly_kernels.forward(table, torch.tensor([2]).expand(4), None, 2)
    torch.testing.assert_close(
        one, mixing_weights(table[2].view(1, 2, 4), Gating(), False).expand(4, 2, 4)
    )
    found = poly_kernels.forward(table, torch.tensor([0, 3, -1, 2]), None, 2)
    assert found[1:3].isnan().all() and found[[0, 3]].isfinite().all()
    table[1, 5] = math.nan
    found = poly_kernels.forward(table, torch.tensor([1, 0]), torch.rand(2, 2, 4), 2)
    assert found[0, 1].isnan().any() and found[0, 0].isfinite().all() and found[1].isfinite().all()


def test_other_gates_are_plain_operations():
    table, ids = torch.randn(3, 8), torch.tensor([0, 2])
    with counted() as calls:
        for how, training in (
            (Gating(hard=True), False),
            (Gating(dropout=0.5), True),
            (Gating(always_on=1), True),
            (Gating(top_k=2), False),
        ):
            gating.task_weights(table, ids, 2, how, training)
        gating.task_weights(table.double(), ids, 2, Gating(), True)
        torch.func.grad(
            lambda table: gating.task_weights(table, ids, 2, Gating(), True).square().sum()
        )(table)
        assert calls == []
        for how, training in (
            (Gating(relaxed=False), True),
            (Gating(top_k=2), True),
            (Gating(dropout=0.5), False),
            (Gating(), False),
        ):
            torch.manual_seed(0)
            found = gating.task_weights(table, ids, 2, how, training)
            torch.manual_seed(0)
            torch.testing.assert_close(
                found, mixing_weights(table[ids].unflatten(-1, (2, 4)), how, training)
            )
        assert len(calls) == 4


def skills(batch, n_splits, n_skills, width, out, r, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (batch, n_splits, n_skills),
        (n_splits, n_skills, width, r),
        (n_splits, n_skills, r, out),
    )
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def mixed(weights, A, B, scale):
    A_w, B_w = (
        torch.einsum("bqs,qsdr->bqdr", weights, A),
        torch.einsum("bqs,qsrd->brqd", weights, B),
    )
    return A_w.flatten(1, 2), B_w.flatten(2) * scale


@dtypes
@pytest.mark.parametrize(
    "sizes", [(1, 1, 4, 40, 32, 8), (5, 2, 9, 23, 14, 3), (18, 2, 1, 1, 70, 2), (2, 1, 18, 5, 5, 1)]
)
def test_mixed_skills_and_their_gradients(sizes, dtype):
    ours = skills(*sizes, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    found, expected = mix(*ours, 0.5), mixed(*exact, 0.5)
    of_A, of_B = (
        torch.randn(f.shape, generator=torch.Generator().manual_seed(7)).to(dtype) for f in expected
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.is_contiguous()
        assert_near(one, other, TOLERANCE[dtype])
    for own in (of_A, of_A.mT.contiguous().mT):
        gradients = torch.autograd.grad(found, ours, (own, of_B), retain_graph=True)
        wanted = torch.autograd.grad(
            expected, exact, (own.double(), of_B.double()), retain_graph=True
        )
        for one, other in zip(gradients, wanted, strict=True):
            assert one.dtype == dtype
            assert_near(one, other, TOLERANCE[dtype])


def test_mixing_gradients_for_some_alone_and_second_ones():
    whole = skills(3, 2, 5, 9, 12, 2)
    everything = torch.autograd.grad(sum(f.sin().sum() for f in mix(*whole)), whole)
    for trained in ([0], [1], [2], [0, 2]):
        some = [tensor.detach().requires_grad_(i in trained) for i, tensor in enumerate(whole)]
        sum(f.sin().sum() for f in mix(*some)).backward()
        for i, (one, expected) in enumerate(zip(some, everything, strict=True)):
            assert (
                one.grad is None
                if i not in trained
                else torch.allclose(one.grad, expected, atol=1e-6)
            )
    exact, seconds = [tensor.detach().double().requires_grad_() for tensor in whole], []
    for tensors, function in ((whole, mix), (exact, mixed)):
        firsts = torch.autograd.grad(
            sum(f.sin().sum() for f in function(*tensors, 0.5)), tensors, create_graph=True
        )
        seconds.append(torch.autograd.grad(sum(first.cos().sum() for first in firsts), tensors))
    for one, other in zip(*seconds, strict=True):
        assert_near(one, other, 1e-5)


def test_mixing_under_autocast_gives_what_products_would():
    tensors = skills(3, 2, 5, 9, 12, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = mix(*tensors)
        with plain():
            expected = mix(*tensors)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        assert_near(one, other, TOLERANCE[torch.bfloat16])
    assert all(
        g.dtype == torch.float32 for g in torch.autograd.grad(sum(f.sum() for f in found), tensors)
    )


def test_other_mixing_is_plain_operations():
    weights, A, B = (tensor.detach() for tensor in skills(3, 2, 4, 6, 6, 2))
    with counted() as calls:
        mix(weights.double(), A.double(), B.double())
        mix(weights.mT.contiguous().mT, A, B)
        mix(weights[:0], A, B)
        torch.func.vmap(lambda weights: mix(weights, A, B)[0])(weights[None])
        assert calls == []
        mix(weights, A, B)
        assert calls == [1]


# --- whole models
# ---------------------------------------------------------------------------------------------------
#
#


CONFIGS = {
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=8, target_modules=["0", "2"]),
    "vblora padded": peft.VBLoRAConfig(
        r=2, num_vectors=9, vector_length=5, pad_last_tile=True, target_modules=["0", "2"]
    ),
    "poly": peft.PolyConfig(
        r=2, n_tasks=3, n_skills=3, n_splits=2, init_weights=False, target_modules=["0", "2"]
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_a_model_with_kernels_is_the_model_without(name, training):
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)), CONFIGS[name]
    ).train(training)
    call = {"task_ids": torch.tensor([2, 0, 2])} if name == "poly" else {}
    x, outcomes = torch.randn(3, 8, 16), []
    for way in (contextlib.nullcontext(), plain()):
        torch.manual_seed(5)
        with way, counted() as calls:
            y = model(x, **call)
        y.square().sum().backward()
        assert len(calls) == (len(outcomes) == 0) * (4 if name == "poly" else 2)
        with torch.no_grad(), way if len(outcomes) == 0 else plain():
            torch.manual_seed(5)
            quiet = model(x, **call)
        torch.testing.assert_close(quiet, y)
        outcomes.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    torch.testing.assert_close(*outcomes)
