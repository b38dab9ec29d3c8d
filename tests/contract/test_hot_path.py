# SPDX-License-Identifier: Apache-2.0
"""What a layer does on the way: gradients of functions of our own, who may look on, and how large
the tensors are that it makes.
"""

import copy

import pytest
import torch
from helpers.methods import METHODS
from helpers.variants import CASES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft import get_peft_model
from peft.ops import fused_linear
from peft.ops.dispatch import can_fuse
from peft.ops.fused_linear import Chain, Ends, add_product, linear_with_chain


@pytest.fixture(params=[0, 10**9], ids=["kept", "again"])
def product(request, monkeypatch):
    """The first product of an adapter is kept for backward, or computed once more."""
    monkeypatch.setattr(fused_linear, "_SMALL", request.param)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("leading", "first", "last"),
    [((3,), (4, 2), (2, 6)), ((2, 3), (4, 2), (2, 6)), ((2, 3), (2, 4, 2), (2, 2, 6))],
)
def test_products_taken_together(leading, first, last, bias, product):
    """Values and first and second derivatives of a layer and an adapter that share their memory,
    against finite differences.
    """
    layer = nn.Linear(4, 6, bias, dtype=torch.float64)
    operands = (
        normal(*leading, 4),
        normal(*first),
        normal(*last),
        *(p.detach().requires_grad_() for p in layer.parameters()),
    )

    def together(x, first, last, *parameters):
        twin = copy.copy(layer)
        twin._parameters = dict(zip(("weight", "bias"), (*parameters, None)[:2], strict=True))
        assert can_fuse(twin, x)
        chain = Chain(x, first, (last,), lambda h, last: Ends(h.tanh(), last))
        return linear_with_chain(twin, x, chain)

    x, A, B, *parameters = operands
    h = x.view(2, 3, 4) @ A if A.dim() == 3 else x @ A
    torch.testing.assert_close(
        together(*operands), nn.functional.linear(x, *parameters) + h.tanh() @ B
    )
    assert torch.autograd.gradcheck(together, operands)
    assert torch.autograd.gradgradcheck(together, operands)


@pytest.mark.parametrize("middle", [lambda h, b: h + b, lambda h, b: h], ids=["sum", "same"])
def test_gradients_that_share_memory_with_others_are_not_written_to(middle):
    """A function of a method of one's own, whose gradients are the one given: finite differences."""
    layer = nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False)
    x, b = normal(5, 4), normal(5, 4)

    def added(x, b):
        return linear_with_chain(layer, x, Chain(x, None, (b,), middle))

    assert torch.autograd.gradcheck(added, (x, b))
    y, given = added(x, b), torch.ones(5, 4, dtype=torch.float64)
    y.backward(given)
    assert given.eq(1).all()


@pytest.mark.parametrize("p", [(6, 2), (2, 3, 2)])
def test_product_added_in_place(p):
    """First and second derivatives, and that the memory is used."""
    q = (2, 4) if len(p) == 2 else (2, 2, 4)

    def added(result, p, q):
        result = result * 1
        place = result.data_ptr()
        result = add_product(result, p, q, in_place=True)
        assert result.data_ptr() == place
        return result

    assert torch.autograd.gradcheck(added, (normal(2, 3, 4), normal(*p), normal(*q)))
    assert torch.autograd.gradgradcheck(added, (normal(2, 3, 4), normal(*p), normal(*q)))


@pytest.mark.parametrize("peft_type", sorted(METHODS))
def test_an_output_that_a_replaced_forward_keeps_is_left_alone(peft_type):
    method, kept = METHODS[peft_type], []
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), method.config(target_modules=["0"])
    ).eval()
    base = model.get_submodule("base_model.model.0.base_layer")

    def forward(x):
        kept.append(nn.functional.linear(x, base.weight, base.bias))
        return kept[-1]

    base.forward = forward
    x = torch.randn(3, 8)
    with torch.no_grad():
        model(x, **method.call)
    torch.testing.assert_close(kept[-1], nn.functional.linear(x, base.weight, base.bias))


def outcome(model, x, call, seed=0):
    """Output and all gradients, the input's too."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x, **call)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return [y.detach(), x.grad, *gradients.values()]


@pytest.mark.parametrize("trained_base", [False, True])
@pytest.mark.parametrize("name", sorted(CASES))
def test_same_whoever_looks_on(name, trained_base):
    """A hook on the base layer, which has it called by itself, sees it called and changes no
    number.
    """
    case = CASES[name]
    model = case.model().double().train()
    for layer in model.base_model.tuner_layers():
        layer.get_base_layer().requires_grad_(trained_base)
    x, call, seen = case.input().double(), case.call(0, 2, 1), []
    plain = outcome(model, x, call)
    hooks = []
    for layer in model.base_model.tuner_layers():
        base = layer.get_base_layer()
        hooks += [base.register_forward_hook(lambda *_: seen.append("forward"))]
        hooks += [base.register_full_backward_hook(lambda *_: seen.append("backward"))]
    watched = outcome(model, x, call)
    assert seen.count("forward") >= 2 and seen.count("backward") >= 2
    assert len(plain) == len(watched)
    for one, other in zip(plain, watched, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_output_that_a_hook_keeps(method):
    """What a hook on the base layer has kept is not written to."""
    case, kept = CASES[method], []
    model = case.model()
    base = next(iter(model.base_model.tuner_layers())).get_base_layer()
    base.register_forward_hook(lambda module, args, output: kept.append(output))
    x = case.input()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model(x.clone().requires_grad_(grad), **case.call(0, 2, 1))
        torch.testing.assert_close(kept[-1], nn.functional.linear(x, base.weight, base.bias))


class Sizes(TorchDispatchMode):
    """Notes the size of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in inputs
            ):
                self.made[str(function)] = max(
                    self.made.get(str(function), 0),
                    tensor.untyped_storage().nbytes() // tensor.itemsize,
                )
        return result


# "LOHA whole" is for small layers, on which it builds the product.
LINEAR = sorted(name for name, case in CASES.items() if not case.conv and name != "LOHA whole")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_no_tensor_of_the_weights_size(name, grad):
    """Neither forward nor backward makes a tensor of `out · in` elements, nor of more than some
    times the activations'; a decomposed adapter, which measures the rows of the base weight, some
    of the length of a block for each row.
    """
    case, width, rows = CASES[name], 256, 3
    model = get_peft_model(
        nn.Sequential(nn.Linear(width, width)), case.config(target_modules=["0"])
    )
    model.train(grad)
    x = torch.randn(rows, width, requires_grad=grad)
    with Sizes() as sizes, torch.set_grad_enabled(grad):
        y = model(x, **case.call(0, 2, 1))
        if grad:
            y.sum().backward()
    inventory = max(p.numel() for name, p in model.named_parameters() if p.requires_grad)
    assert (
        max(sizes.made.values()) <= max(inventory, 4 * rows * width, width**1.5) < width * width
    ), sizes.made


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in LINEAR
        if not ("dropout" in name or "decomposed" in name or CASES[name].method == "POLY")
    ],
)
def test_little_is_kept_for_backward(name):
    """Beyond the layer's input: the adapter's factors, and less than an eighth of the input's size."""
    case, width, rows = CASES[name], 128, 192
    model = get_peft_model(
        nn.Sequential(nn.Linear(width, width)), case.config(target_modules=["0"])
    ).train()
    layer = next(iter(model.base_model.tuner_layers()))
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    x, kept = torch.randn(rows, width, requires_grad=True), {}
    known.add(x.untyped_storage().data_ptr())

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(x, **case.call(0, 2, 1))
    own = sum(p.numel() for p in layer.adapter_parameters("default"))
    assert sum(kept.values()) < rows * width / 8 + 2 * own, kept
    y.sum().backward()


def test_no_tensor_of_the_weights_size_is_found():
    """The measure sees one that is made."""
    with Sizes() as sizes:
        torch.randn(3, 256) @ (torch.randn(256, 2) @ torch.randn(2, 256))
    assert max(sizes.made.values()) == 256 * 256
