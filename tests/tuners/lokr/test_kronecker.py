# SPDX-License-Identifier: Apache-2.0
"""Structured Kronecker products against a slow, obvious reference in float64."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from peft.ops.dispatch import can_fuse
from peft.ops.fused_linear import linear_with_chain
from peft.tuners.lokr.kronecker import (
    KroneckerFactors,
    contraction_order,
    dense_left,
    dense_right,
    kronecker_chain,
    kronecker_conv,
    kronecker_linear,
    kronecker_weight,
)
from peft.tuners.lokr.shapes import factor_shapes, factorization

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FORMS = [(w1, w2) for w1 in ("full", "low") for w2 in ("full", "low", "tucker")]
SLOW = [HealthCheck.too_slow]
quick = settings(
    max_examples=80, deadline=None, database=None, derandomize=True, suppress_health_check=SLOW
)


# The reference: sums written out as loops, one `torch.kron` per kernel position, dense products.


def reference_left(f):
    if f.w1 is not None:
        return f.w1
    w1 = torch.zeros(f.w1_a.shape[0], f.w1_b.shape[1], dtype=torch.float64)
    for i, j, k in itertools.product(
        range(w1.shape[0]), range(w1.shape[1]), range(f.w1_a.shape[1])
    ):
        w1[i, j] += f.w1_a[i, k] * f.w1_b[k, j]
    return w1


def reference_right(f, kernel):
    taps = list(itertools.product(*map(range, kernel)))
    if f.w2 is not None:
        return f.w2
    if f.t2 is None:
        d = f.w2_b.shape[1] // len(taps)
        w2 = torch.zeros(f.w2_a.shape[0], d, *kernel, dtype=torch.float64)
        for p, q, (n, tap) in itertools.product(range(w2.shape[0]), range(d), enumerate(taps)):
            w2[(p, q, *tap)] = sum(
                f.w2_a[p, k] * f.w2_b[k, q * len(taps) + n] for k in range(f.w2_a.shape[1])
            )
        return w2
    ranks = range(f.t2.shape[0])
    w2 = torch.zeros(f.w2_a.shape[1], f.w2_b.shape[1], *kernel, dtype=torch.float64)
    for p, q, tap in itertools.product(range(w2.shape[0]), range(w2.shape[1]), taps):
        at = (*tap, 0) if len(kernel) == 1 else tap
        w2[(p, q, *tap)] = sum(
            f.t2[(i, j, *at)] * f.w2_a[i, p] * f.w2_b[j, q] for i in ranks for j in ranks
        )
    return w2


def reference_weight(f, kernel, scale=1.0, flat=False):
    w1, w2 = reference_left(f), reference_right(f, kernel)
    out, ins = w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1]
    if flat:  # as Hugging Face PEFT 0.21.2 computes a Conv1d with a full W2
        assert len(kernel) == 1
        return scale * torch.kron(w1, w2).reshape(out, ins, *kernel)
    weight = torch.zeros(out, ins, *kernel, dtype=torch.float64)
    for tap in itertools.product(*map(range, kernel)):
        weight[(..., *tap)] = scale * torch.kron(w1, w2[(..., *tap)])
    return weight


def make(form, sizes, ranks, kernel=(), seed=0, dtype=torch.float64):
    """Random factors of the given form; `sizes` is (a, b, c, d), `ranks` those of W1 and W2."""
    (a, b, c, d), (r1, r2), taps = sizes, ranks, math.prod(kernel)
    shapes = {"w1": (a, b)} if form[0] == "full" else {"w1_a": (a, r1), "w1_b": (r1, b)}
    if form[1] == "full":
        shapes |= {"w2": (c, d, *kernel)}
    elif form[1] == "low":
        shapes |= {"w2_a": (c, r2), "w2_b": (r2, d * taps)}
    else:
        shapes |= {
            "w2_a": (r2, c),
            "w2_b": (r2, d),
            "t2": (r2, r2, *kernel, *([1] if len(kernel) == 1 else [])),
        }
    rng = torch.Generator().manual_seed(seed)
    return KroneckerFactors(
        **{k: torch.randn(v, generator=rng, dtype=dtype) for k, v in shapes.items()}
    )


def randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SIZES = st.tuples(*[st.integers(1, 5)] * 4)
RANKS = st.tuples(*[st.integers(1, 4)] * 2)


@st.composite
def convolutions(draw, dims=(1, 2, 3)):
    """Factors of a convolution, its options, and a space its kernel fits in."""
    n = draw(st.sampled_from(dims))
    small = st.integers(1, 3)
    kernel, stride, dilation = (draw(st.tuples(*[small] * n)) for _ in range(3))
    pads = st.integers(0, 2)
    padding = draw(st.one_of(pads, st.tuples(*[pads] * n), st.sampled_from(["same", "valid"])))
    stride = draw(st.sampled_from([1, 2, stride])) if padding != "same" else 1
    reaches = [g * (k - 1) + 1 for g, k in zip(dilation, kernel, strict=True)]
    space = [draw(st.integers(reach, reach + 3)) for reach in reaches]
    sizes = draw(SIZES)
    out = sizes[0] * sizes[2]
    groups = draw(st.sampled_from([g for g in range(1, out + 1) if out % g == 0]))
    f = make(draw(st.sampled_from(FORMS)), sizes, draw(RANKS), kernel, draw(st.integers(0, 99)))
    x = randn(draw(st.integers(0, 3)), groups * sizes[1] * sizes[3], *space)
    return (
        x,
        f,
        kernel,
        {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
    )


# Sizes


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((128,), (8, 16)),
        ((128, 4), (4, 32)),
        ((127,), (1, 127)),
        ((128, 16), (16, 8)),
        ((128, 12), (8, 16)),
        ((250, 16), (10, 25)),
        ((36,), (6, 6)),
        ((1, 8), (1, 1)),
        ((12, 0), (1, 12)),
    ],
)
def test_factorization_table(args, expected):
    assert factorization(*args) == expected


def test_factorization_is_the_closest_divisor_from_below():
    for n, factor in itertools.product(range(1, 200), (-1, *range(1, 20))):
        limit = n if factor == -1 else factor
        divisors = [m for m in range(1, n + 1) if n % m == 0 and m <= limit and m * m <= n]
        expected = factor if factor > 0 and n % factor == 0 else max(divisors)
        assert factorization(n, factor) == (expected, n // expected)


TUCKER = {"use_effective_conv2d": True}


@pytest.mark.parametrize(  # as found in adapters made by Hugging Face PEFT 0.21.2
    ("layer", "options", "expected"),
    [
        ((32, 32), {"r": 2}, {"w1": (4, 4), "w2_a": (8, 2), "w2_b": (2, 8)}),
        (
            (32, 32),
            {"r": 3, "decompose_both": True},
            {"w1": (4, 4), "w2_a": (8, 3), "w2_b": (3, 8)},
        ),
        (
            (32, 32),
            {"r": 1, "decompose_both": True},
            {"w1_a": (4, 1), "w1_b": (1, 4), "w2_a": (8, 1), "w2_b": (1, 8)},
        ),
        ((32, 32), {"r": 4, "decompose_both": True}, {"w1": (4, 4), "w2": (8, 8)}),
        ((32, 32), {"r": 2, "decompose_factor": 8}, {"w1": (8, 8), "w2": (4, 4)}),
        ((24, 16, (3,)), {"r": 8}, {"w1": (4, 4), "w2": (6, 4, 3)}),
        ((24, 16, (3,)), {"r": 2}, {"w1": (4, 4), "w2_a": (6, 2), "w2_b": (2, 12)}),
        (
            (24, 16, (3,)),
            {"r": 2} | TUCKER,
            {"w1": (4, 4), "w2_a": (2, 6), "w2_b": (2, 4), "t2": (2, 2, 3, 1)},
        ),
        ((24, 16, (1,)), {"r": 2} | TUCKER, {"w1": (4, 4), "w2_a": (6, 2), "w2_b": (2, 4)}),
        ((24, 16, (1,)), {"r": 8} | TUCKER, {"w1": (4, 4), "w2": (6, 4, 1)}),
        ((24, 16, (1, 1)), {"r": 8}, {"w1": (4, 4), "w2": (6, 4, 1, 1)}),
        ((24, 16, (1, 1)), {"r": 2} | TUCKER, {"w1": (4, 4), "w2_a": (6, 2), "w2_b": (2, 4)}),
        (
            (24, 16, (3, 1)),
            {"r": 2} | TUCKER,
            {"w1": (4, 4), "w2_a": (2, 6), "w2_b": (2, 4), "t2": (2, 2, 3, 1)},
        ),
        (
            (24, 4, (3, 3)),
            {"r": 2},
            {"w1": (4, 2), "w2_a": (6, 2), "w2_b": (2, 18)},
        ),  # 16 channels in 4 groups
        (
            (24, 4, (3, 3)),
            {"r": 2} | TUCKER,
            {"w1": (4, 2), "w2_a": (2, 6), "w2_b": (2, 2), "t2": (2, 2, 3, 3)},
        ),
        ((24, 4, (3, 3)), {"r": 3} | TUCKER, {"w1": (4, 2), "w2": (6, 2, 3, 3)}),
    ],
)
def test_factor_shapes(layer, options, expected):
    assert factor_shapes(*layer, **options) == expected


# Dense forms


@quick
@given(convolutions(), st.floats(-2, 2))
def test_weights(case, scale):
    _, f, kernel, _ = case
    torch.testing.assert_close(dense_left(f), reference_left(f))
    torch.testing.assert_close(dense_right(f, kernel), reference_right(f, kernel))
    torch.testing.assert_close(
        kronecker_weight(f, kernel, scale), reference_weight(f, kernel, scale)
    )
    if len(kernel) == 1:
        expected = reference_weight(f, kernel, scale, flat=True)
        torch.testing.assert_close(kronecker_weight(f, kernel, scale, flat=True), expected)


def test_tucker_rank_one_and_kernel_of_one_tap():
    for kernel in [(1,), (1, 1), (3,), (3, 1)]:
        f = make(("low", "tucker"), (3, 2, 4, 5), (1, 1), kernel)
        torch.testing.assert_close(kronecker_weight(f, kernel), reference_weight(f, kernel))


# Linear


@quick
@given(
    st.sampled_from(FORMS[:2] + FORMS[3:5]),
    SIZES,
    RANKS,
    st.lists(st.integers(0, 3), max_size=3),
    st.floats(-2, 2),
)
def test_linear(form, sizes, ranks, lead, scale):
    f = make(form, sizes, ranks)
    x = randn(*lead, sizes[1] * sizes[3])
    expected = F.linear(x, reference_weight(f, (), scale))
    torch.testing.assert_close(kronecker_linear(x, f, scale), expected)
    torch.testing.assert_close(
        kronecker_linear(x, f, torch.tensor(scale, dtype=torch.float64)), expected
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(3, 3, 4, 4), (3, 2, 5, 4), (2, 3, 4, 5), (4, 4, 2, 2)])
@pytest.mark.parametrize("form", [("full", "full"), ("full", "low"), ("low", "full")])
def test_layer_and_product_in_one_memory(form, sizes, bias):
    """Values and first and second derivatives, all and one at a time, against finite differences
    and the dense product.
    """
    f, (a, b, c, d) = make(form, sizes, (2, 1)), sizes
    layer = torch.nn.Linear(b * d, a * c, bias, dtype=torch.float64)
    used = [(name, t.requires_grad_()) for name, t in f._asdict().items() if t is not None]
    x = randn(2, 3, b * d).requires_grad_()

    def together(x, *factors):
        assert can_fuse(layer, x)
        own = KroneckerFactors(**{n: t for (n, _), t in zip(used, factors, strict=True)})
        return linear_with_chain(layer, x, kronecker_chain(x, own, 0.5))

    operands = (x, *[tensor for _, tensor in used])
    dense = F.linear(x, layer.weight + reference_weight(detached(f), (), 0.5), layer.bias)
    y = together(*operands)
    torch.testing.assert_close(y, dense)
    with torch.no_grad():
        torch.testing.assert_close(together(*operands), dense)
    assert torch.autograd.gradcheck(together, operands)
    assert torch.autograd.gradgradcheck(together, operands)
    # Gradients for the layer, and for one operand alone, of an output that is read once.
    layer.zero_grad()
    together(*operands).sum().backward()
    of_layer = torch.ones_like(y).flatten(0, 1).T @ x.detach().flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad, of_layer)
    together_grads = [operand.grad for operand in operands]
    for i, operand in enumerate(operands):
        alone = [t if t is operand else t.detach() for t in operands]
        (found,) = torch.autograd.grad(together(*alone).sum(), operand)
        torch.testing.assert_close(found, together_grads[i])


def detached(f):
    return KroneckerFactors(*[None if t is None else t.detach() for t in f])


def test_linear_takes_strided_input():
    f = make(("full", "low"), (3, 2, 4, 5), (1, 2))
    x = randn(10, 7).T
    torch.testing.assert_close(kronecker_linear(x, f), F.linear(x, reference_weight(f, ())))


# Convolution


@quick
@given(convolutions(), st.floats(-2, 2))
def test_conv(case, scale):
    x, f, kernel, options = case
    expected = CONV[len(kernel)](x, reference_weight(f, kernel, scale), **options)
    torch.testing.assert_close(
        kronecker_conv(x, f, kernel=kernel, scale=scale, **options), expected
    )
    if x.shape[0]:
        torch.testing.assert_close(
            kronecker_conv(x[0], f, kernel=kernel, scale=scale, **options), expected[0]
        )


@quick
@given(convolutions(dims=(1,)), st.floats(-2, 2))
def test_flat_conv(case, scale):
    x, f, kernel, options = case
    expected = F.conv1d(x, reference_weight(f, kernel, scale, flat=True), **options)
    torch.testing.assert_close(
        kronecker_conv(x, f, kernel=kernel, scale=scale, flat=True, **options), expected
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 8, 12, 24])
def test_conv_groups_that_do_and_do_not_fit_the_blocks(form, groups):
    f = make(form, (4, 2, 6, 3), (2, 2), (2, 3))
    x = randn(2, groups * 6, 5, 6)
    expected = F.conv2d(x, reference_weight(f, (2, 3)), groups=groups, stride=2, padding=1)
    torch.testing.assert_close(
        kronecker_conv(x, f, kernel=(2, 3), groups=groups, stride=2, padding=1), expected
    )


@pytest.mark.parametrize("form", FORMS)
def test_conv_takes_channels_last(form):
    f = make(form, (2, 2, 3, 3), (2, 2), (3, 3))
    x = randn(2, 6, 5, 5).to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        kronecker_conv(x, f, kernel=(3, 3)), F.conv2d(x, reference_weight(f, (3, 3)))
    )


# Cost


def cheapest(i, j, w1, w2, spatial, taps, stride):
    """Multiplications of the best order from state `(i, j)` on, by trying all."""
    if i == len(w1) - 1 and j == len(w2) - 1:
        return 0
    space = (w1, w2, spatial, taps, stride)
    positions = stride if j <= spatial else 1
    costs = [
        w1[i] * w1[k] * w2[j] * positions + cheapest(k, j, *space) for k in range(i + 1, len(w1))
    ]
    for k in range(j + 1, len(w2)):
        each = stride if k <= spatial else taps if j <= spatial else 1
        costs.append(w1[i] * w2[j] * w2[k] * each + cheapest(i, k, *space))
    return min(costs)


@quick
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=3),
    st.lists(st.integers(1, 40), min_size=2, max_size=4),
    st.sampled_from([(-1, 1, 1), (0, 9, 4), (0, 3, 1), (1, 9, 4)]),
)
def test_contraction_order_is_the_cheapest(w1, w2, space):
    spatial, taps, stride = space if space[0] < len(w2) - 1 else (-1, 1, 1)
    cost, order = contraction_order(tuple(w1), tuple(w2), spatial=spatial, taps=taps, stride=stride)
    assert cost == cheapest(0, 0, w1, w2, spatial, taps, stride)
    assert order[-1] == (len(w1) - 1, len(w2) - 1)


def test_contraction_order_keeps_small_ranks_and_multiplies_out_large_ones():
    assert contraction_order((4, 4), (64, 2, 64))[1] == ((0, 1), (1, 1), (1, 2))
    assert contraction_order((4, 4), (64, 60, 64))[1] == ((0, 2), (1, 2))
    assert contraction_order((9, 2), (64, 64))[1] == ((1, 0), (1, 1))
    assert contraction_order((2, 9), (64, 64))[1] == ((0, 1), (1, 1))


@pytest.mark.parametrize("w2", ["full", "low", "tucker"])
def test_stated_cost_is_the_cost(w2):
    sizes, ranks, n = (4, 2, 12, 10), (1, 2), 3
    rights = {"full": (10, 12), "low": (10, 2, 12), "tucker": (10, 2, 2, 12)}[w2]
    if w2 != "tucker":
        with FlopCounterMode(display=False) as counter:
            kronecker_linear(randn(n, 20), make(("low", w2), sizes, ranks))
        assert counter.get_total_flops() == 2 * n * contraction_order((2, 4), rights)[0]
    with FlopCounterMode(display=False) as counter:
        kronecker_conv(
            randn(n, 20, 8, 8),
            make(("low", w2), sizes, ranks, (3, 3)),
            kernel=(3, 3),
            stride=2,
            padding=1,
        )
    cost, _ = contraction_order((2, 1, 4), rights, spatial=int(w2 == "tucker"), taps=9, stride=4)
    assert counter.get_total_flops() == 2 * n * 16 * cost


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def leaves(f):
    return [t.requires_grad_() for t in f if t is not None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flat", [False, True])
def test_nothing_dense_is_allocated_forward_or_backward(form, flat):
    sizes, dense = (6, 6, 8, 8), 48 * 48
    for kernel, x in [((), randn(3, 48)), ((3,), randn(2, 48, 6)), ((3, 3), randn(1, 48, 4, 4))]:
        if not kernel and (form[1] == "tucker" or flat):
            continue
        f = make(form, sizes, (2, 2), kernel)
        parameters = leaves(f)
        with Largest() as largest:
            if kernel:
                y = kronecker_conv(x.requires_grad_(), f, kernel=kernel, scale=0.5, flat=flat)
            else:
                y = kronecker_linear(x.requires_grad_(), f, 0.5)
            torch.autograd.grad(y.sum(), [x, *parameters])
        assert 0 < largest.numel < dense


# Autograd, autocast, compilation


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    def check(function, f, x, scale):
        names = [n for n in f._fields if getattr(f, n) is not None]

        def call(x, scale, *tensors):
            return function(x, KroneckerFactors(**dict(zip(names, tensors, strict=True))), scale)

        assert torch.autograd.gradcheck(
            call, (x.requires_grad_(), scale.requires_grad_(), *leaves(f))
        )

    scale = torch.tensor(0.7, dtype=torch.float64)
    if form[1] != "tucker":
        for sizes in [(2, 3, 3, 2), (5, 2, 1, 2)]:
            check(kronecker_linear, make(form, sizes, (1, 1)), randn(2, sizes[1] * sizes[3]), scale)
    for groups, flat in [(1, False), (2, False), (4, False), (3, True)]:
        check(
            lambda x, f, s, groups=groups, flat=flat: kronecker_conv(
                x, f, kernel=(2,), stride=2, padding=1, groups=groups, scale=s, flat=flat
            ),
            make(form, (2, 2, 6, 1), (1, 1), (2,)),
            randn(1, 2 * groups, 3),
            scale,
        )


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    f = make(form, (2, 3, 4, 3), (1, 1), (3,), dtype=torch.float32)
    x = randn(2, 9, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kronecker_conv(x, f, kernel=(3,), scale=0.5)
        assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(), kronecker_conv(x, f, kernel=(3,), scale=0.5), atol=0.1, rtol=0.1
    )
    if form[1] != "tucker":
        f = make(form, (2, 3, 4, 3), (1, 1), dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert kronecker_linear(x[..., 0], f).dtype == torch.bfloat16


@pytest.mark.compile
@pytest.mark.parametrize("form", [("full", "full"), ("low", "low"), ("full", "tucker")])
def test_compiles_to_one_graph(form):
    kernel = (3,)
    linear = make((form[0], form[1].replace("tucker", "low")), (2, 3, 4, 2), (1, 1))
    conv = make(form, (2, 3, 4, 2), (1, 1), kernel)

    def both(x):
        y = kronecker_linear(x.mT, linear, 0.5).mT
        return y + kronecker_conv(x, conv, kernel=kernel, padding=1, scale=0.5)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")
        for batch, length in [(2, 5), (3, 7), (4, 9)]:
            x = randn(batch, 6, length)
            torch.testing.assert_close(compiled(x), both(x))
