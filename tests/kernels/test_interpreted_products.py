# SPDX-License-Identifier: Apache-2.0
"""Products in mixed precision against float64 and against plain operations, interpreted on the CPU."""

import contextlib
import threading
from unittest import mock

import pytest
import torch
from torch import nn

import peft
from peft.ops import mixed_precision, triton_support
from peft.ops import mixed_precision_triton as kernels
from peft.ops.fused_linear import add_product

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("interpreter")]

# The interpreter cuts bfloat16 where a GPU rounds.
ROUNDED = {torch.float16: 2**-11, torch.bfloat16: 2**-7}
dtypes = pytest.mark.parametrize("dtype", ROUNDED)


@contextlib.contextmanager
def plain():
    """Without kernels."""
    with mock.patch.object(mixed_precision, "has_triton", return_value=False):
        yield


@contextlib.contextmanager
def counted():
    """Which kernels run, but for their trial, which is in a thread of its own."""
    calls, here = [], threading.current_thread()

    def noted(name, own):
        def run(*arguments):
            if threading.current_thread() is here:
                calls.append(name)
            return own(*arguments)

        return run

    with contextlib.ExitStack() as stack:
        for name in ("down", "across", "up"):
            stack.enter_context(
                mock.patch.object(kernels, name, noted(name, getattr(kernels, name)))
            )
        yield calls


@pytest.fixture(scope="module", autouse=True)
def _all_sizes():
    """Kernels whatever the size."""
    with mock.patch.object(mixed_precision, "_MIN_ELEMENTS", 1):
        yield


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def tensors(shape, dtype, last=None):
    """A wide matrix, a thin one for each of its sides, and one that makes it wide again."""
    (*lead, rows, k), m = shape[:-1], shape[-1]
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*lead, *size, generator=generator)  # noqa: E731
    # Numbers of very different sizes, so that no part of them is of no account.
    return (
        draw(rows, k).to(dtype),
        draw(k, m) * 10 ** draw(k, m),
        draw(rows, m) * 10 ** draw(rows, m),
        draw(m, last or k),
    )


SHAPES = [(37, 50, 5), (70, 300, 16), (3, 20, 40, 8), (130, 70, 33), (2, 40, 50, 128), (1, 1, 1)]


@dtypes
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_as_exact_as_float32(shape, parts, dtype):
    wide, thin, other, _ = tensors(shape, dtype)
    transposed = thin.mT.contiguous().mT
    kernels._plan_down.cache_clear(), kernels._plan_across.cache_clear()
    in_parts = mock.patch.object(
        kernels, "_splits", lambda blocks, most, programs: min(most, parts)
    )
    with in_parts, counted() as calls:
        for factor in (thin, transposed):
            exact = 0.5 * wide.double() @ thin.double()
            found = mixed_precision.down(wide, factor, 0.5)
            assert found.dtype == torch.float32 and error(found, exact) < 1e-6
            exact = 2 * other.double().mT @ wide.double()
            found = mixed_precision.across(
                other if factor is thin else other.mT.contiguous().mT, wide, 2.0
            )
            assert found.dtype == torch.float32 and error(found, exact) < 1e-6
    assert calls == ["down", "across"] * 2


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_added_and_rounded_once(shape, dtype):
    wide, _, p, q = tensors(shape, dtype)
    exact = wide.double() + p.double() @ q.double()
    with counted() as calls:
        new = mixed_precision.add(wide, p, q, in_place=False)
        alone = mixed_precision.up(p, q.mT.contiguous().mT, wide)
        same = mixed_precision.add(wide, p, q)
    assert calls == ["up"] * 3 and same is wide and torch.equal(new, same)
    for found, expected in ((new, exact), (alone, p.double() @ q.double())):
        assert found.dtype == dtype and found.shape == wide.shape
        assert (
            (found.double() - expected).abs()
            <= ROUNDED[dtype] * 1.01 * expected.abs() + 1e-5 * expected.abs().max()
        ).all()


def test_one_matrix_for_all_samples():
    wide, _, _, q = tensors((3, 20, 40, 8), torch.float16)
    one, many = torch.randn(8, 40).expand(3, 8, 40), torch.randn(20, 8).expand(3, 20, 8)
    with counted() as calls:
        assert error(mixed_precision.down(wide, one.mT), wide.double() @ one.double().mT) < 1e-6
        assert error(mixed_precision.across(many, wide), many.double().mT @ wide.double()) < 1e-6
        assert (
            error(
                mixed_precision.add(wide, many, q, in_place=False),
                wide.double() + many.double() @ q.double(),
            )
            < 1e-3
        )
    assert calls == ["down", "across", "up"]


@dtypes
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_gradients(shape, in_place, dtype):
    """Those of the first product, and those of adding the last one."""
    wide, thin, _, q = tensors(shape, dtype)
    base = torch.randn_like(wide)
    thin = thin / 100  # the gradient for `wide` has to be a number in float16
    ours = [tensor.clone().requires_grad_() for tensor in (wide, thin, q, base)]
    exact = [tensor.double().requires_grad_() for tensor in (wide, thin, q, base)]

    def outcome(x, first, last, base, add):
        return add(base * 1, mixed_precision.down(x, first, 0.5), last)

    with counted() as calls:
        found = outcome(*ours, lambda base, p, q: add_product(base, p, q, in_place))
        g = torch.randn_like(found)
        found.backward(g)
    assert sorted(calls) == ["across"] * 2 + ["down"] * 2 + ["up"] * 2
    expected = outcome(*exact, lambda base, p, q: base + p @ q)
    expected.backward(g.double())
    for one, other in zip(ours, exact, strict=True):
        assert one.grad.dtype == one.dtype
        assert error(one.grad, other.grad) < (
            1e-6 if one.dtype == torch.float32 else ROUNDED[dtype]
        )


def test_derivatives_of_derivatives():
    wide, thin, _, q = tensors((6, 9, 2), torch.float16)
    outcomes = []
    for way in (contextlib.nullcontext(), plain()):
        with way:
            x, F, last = (tensor.clone().requires_grad_() for tensor in (wide, thin / 100, q))
            y = add_product(torch.zeros_like(wide), mixed_precision.down(x, F), last, in_place=True)
            grads = torch.autograd.grad(y.float().sin().sum(), (x, F, last), create_graph=True)
            sum(g.float().square().sum() for g in grads).backward()
            outcomes.append([x.grad, F.grad, last.grad])
    torch.testing.assert_close(*outcomes, rtol=2e-2, atol=2e-2)


# --- what takes no kernels
# --------------------------------------------------------------------------------------------


def refused(x, F):
    yield x.float(), F
    yield x, F.bfloat16()
    yield x.T.contiguous().T, F
    yield x.as_subclass(type("Own", (torch.Tensor,), {})), F


def test_plain_operations_for_all_else():
    x, F, p, q = tensors((8, 12, 3), torch.float16)
    with counted() as calls:
        for wide, thin in refused(x, F):
            assert not mixed_precision.can_stay(wide, thin.dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert not mixed_precision.can_stay(x, torch.float32)
            mixed_precision.down(x.bfloat16(), F)
        with mock.patch.object(mixed_precision, "_MIN_ELEMENTS", 10**6):
            assert not mixed_precision.can_stay(x, torch.float32)
            assert error(mixed_precision.down(x, F), x.double() @ F.double()) < 1e-6
            assert error(mixed_precision.across(p, x), p.double().mT @ x.double()) < 1e-6
            assert torch.equal(mixed_precision.up(p, q, x), (p @ q).half())
            assert torch.equal(mixed_precision.add(x, p, q, in_place=False), (x + p @ q).half())
            assert torch.equal(mixed_precision.add(x.clone(), p, q), (x + p @ q).half())
            assert add_product(x, p, q, in_place=True).dtype == torch.float32
        wide_rank = torch.randn(12, 129)
        assert error(mixed_precision.down(x, wide_rank), x.double() @ wide_rank.double()) < 1e-6
        assert calls == []
        assert mixed_precision.can_stay(x, torch.float32)


def looked_at(model, x):
    """Calls of a model that something else than autograd looks at."""
    yield lambda: torch.func.vmap(model)(x[None])
    yield lambda: torch.func.jvp(model, (x,), (x,))
    yield lambda: torch.jit.trace(model, x, check_trace=False)


def test_nobody_else_has_to_see_kernels():
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(16, 32)).half(), peft.LoraConfig(r=2, target_modules=["0"])
    )
    x = torch.randn(5, 16).half()
    with counted() as calls:
        for call in looked_at(model.base_model.model[0], x):
            call()
        assert calls == []
        model(x)
        assert calls == ["down", "up"]


def test_what_computes_something_else_is_not_used():
    """Were a compiler to get it wrong, plain operations would do it."""
    x, F, _, _ = tensors((8, 12, 3), torch.bfloat16)
    own, exact = kernels.down, x.double() @ F.double()
    wrong = mock.patch.object(kernels, "down", lambda *a: own(*a) * 1.002)
    with mock.patch.dict(triton_support._TRIED, clear=True), wrong:
        with pytest.warns(peft.PeftWarning, match="differ"):
            assert error(mixed_precision.down(x, F), exact) < 1e-6
        assert error(mixed_precision.down(x, F), exact) < 1e-6


def test_each_size_of_blocks_is_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(
        mixed_precision, "agrees", lambda trial, device: tried.append(trial) or True
    )
    for length, width in [(4096, 8), (300, 3), (64, 8), (4096, 64), (4096, 8)]:
        assert mixed_precision._are_taken(
            torch.zeros(2, length).half(), length, width, torch.zeros(length, width)
        )
    assert tried[0] is tried[1] is tried[4] and len(set(tried)) == 3


# --- whole models
# -----------------------------------------------------------------------------------------------------
#
#

T = {"target_modules": ["0", "2"]}
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=3, init_lora_weights=False, **T),
    "lora, dropped": lambda: peft.LoraConfig(r=3, init_lora_weights=False, lora_dropout=0.3, **T),
    "loha": lambda: peft.LoHaConfig(r=1, init_weights=False, **T),
    "lokr": lambda: peft.LoKrConfig(r=2, init_weights=False, **T),
    "lokr, full": lambda: peft.LoKrConfig(r=99, init_weights=False, **T),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=8, **T),
    "poly": lambda: peft.PolyConfig(r=2, n_tasks=3, n_skills=3, init_weights=False, **T),
    "mhr": lambda: peft.PolyConfig(r=2, n_tasks=3, n_skills=3, n_splits=2, init_weights=False, **T),
    "by token": lambda: peft.PolyConfig(
        r=2, n_skills=3, poly_type="mope", routing_level="token", init_weights=False, **T
    ),
}


def outcomes(model, x, training, **call):
    """The output and all gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = model.train(training)(x, **call)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    ("name", "tokens"), [*((name, 8) for name in CONFIGS), ("poly", 2), ("mhr", 2)]
)
def test_a_model_with_kernels_is_the_model_without(name, tokens):
    """And is as near to the same in float64."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24)).half()
    model = peft.get_peft_model(base, CONFIGS[name]())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    call = {"task_ids": torch.tensor([2, 0, 2])} if name in ("poly", "mhr") else {}
    x = torch.randn(3, tokens, 16).half()
    with counted() as calls:
        found = outcomes(model, x, name == "lora, dropped", **call)
        with torch.no_grad():
            torch.manual_seed(5)
            quiet = model(x, **call)
    assert "up" in calls
    with plain():
        without = outcomes(model, x, name == "lora, dropped", **call)
    assert [t.dtype for t in found] == [t.dtype for t in without]
    for one, other in zip([*found, quiet], [*without, without[0]], strict=True):
        assert error(one, other.double()) < 4e-3
    exact = outcomes(model.double(), x.double(), name == "lora, dropped", **call)
    if name != "lora, dropped":  # whose draws are others in another precision
        ours, plainly = (
            sum(error(one, e) for one, e in zip(each, exact, strict=True))
            for each in (found, without)
        )
        assert ours <= 1.25 * plainly


def test_what_is_frozen_costs_nothing():
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(64, 32)).half(), peft.LoraConfig(r=2, target_modules=["0"])
    )
    layer, x = model.base_model.model[0], torch.randn(5, 64).half()
    layer.lora_A["default"].weight.requires_grad_(False)
    with counted() as calls:
        model(x).float().square().sum().backward()
    assert calls == ["down", "up", "across"]
    assert (
        layer.lora_A["default"].weight.grad is None
        and layer.lora_B["default"].weight.grad is not None
    )


def test_beside_another_kind_of_layer():
    """A layer whose call is not taken over has its output left as it is, and the part is added to
    it all the same.
    """

    class Own(nn.Linear):
        kept = None

        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    torch.manual_seed(0)
    base = nn.Sequential(Own(16, 32)).half()
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    x = torch.randn(5, 16).half()
    with counted() as calls:
        found = outcomes(model, x, False)
    assert sorted(calls) == ["across"] * 2 + ["down"] * 2 + ["up"] * 2
    inner = model.base_model.model[0].base_layer
    assert torch.equal(inner.kept, nn.functional.linear(x, inner.weight, inner.bias))
    with plain():
        for one, other in zip(found, outcomes(model, x, False), strict=True):
            assert error(one, other.double()) < 2e-3
