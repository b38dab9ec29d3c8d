# SPDX-License-Identifier: Apache-2.0
"""Whatever the base layer takes an adapted one takes: inputs of every form against the dense
formula, in float64.
"""

import pytest
import torch
from helpers.dense import CASES, IN, OUT, call_of, dense, model_of, numbers, samples_of
from helpers.methods import METHODS
from helpers.textbook import adapted_weight
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft import get_peft_model


class Subclass(torch.Tensor):
    """A tensor that is not torch's own."""


def samples_of_two_lengths(layout):
    return torch.nested.nested_tensor([numbers(2, IN), numbers(3, IN)], layout=layout)


INPUTS = {
    "a vector": lambda: numbers(IN),
    "rows": lambda: numbers(3, IN),
    "one row": lambda: numbers(1, IN),
    "no rows": lambda: numbers(0, IN),
    "no samples": lambda: numbers(0, 4, IN),
    "no tokens": lambda: numbers(2, 0, IN),
    "tokens": lambda: numbers(3, 4, IN),
    "images": lambda: numbers(2, 3, 2, IN),
    "other strides": lambda: numbers(IN, 3).T,
    "tokens first": lambda: numbers(4, 3, IN).transpose(0, 1),
    "an expanded row": lambda: numbers(1, IN).expand(3, IN),
    "expanded tokens": lambda: numbers(3, 1, IN).expand(3, 4, IN),
    "a subclass": lambda: numbers(3, IN).as_subclass(Subclass),
    "a parameter": lambda: nn.Parameter(numbers(3, 4, IN)),
    "jagged": lambda: samples_of_two_lengths(torch.jagged),
    "jagged, with heads": lambda: torch.nested.nested_tensor(
        [numbers(2, 3, IN), numbers(4, 3, IN)], layout=torch.jagged
    ),
    "nested": lambda: samples_of_two_lengths(torch.strided),
}


def assert_right(case, model, x, found, expected):
    """The output's values, and the gradients of all that trains and of the input."""
    assert found.layout is x.layout
    assert isinstance(found, type(x)) or type(x) is nn.Parameter
    found = samples_of(found)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.as_subclass(torch.Tensor), other)
    if not found or not found[0].requires_grad:
        return
    sources = [parameter for parameter in model.parameters() if parameter.requires_grad] + [
        x
    ] * x.requires_grad
    outcomes = []
    for outputs in (found, expected):
        total = sum(y.square().sum() for y in outputs)
        if total.requires_grad:
            outcomes.append(torch.autograd.grad(total, sources, allow_unused=True))
    for one, other in zip(*outcomes, strict=True) if len(outcomes) == 2 else ():
        if one is None or other is None:
            assert one is other is None or not (one if other is None else other).count_nonzero()
        elif one.is_nested:
            for own, right in zip(one.unbind(), other.unbind(), strict=True):
                torch.testing.assert_close(own, right)
        else:
            torch.testing.assert_close(
                one.as_subclass(torch.Tensor), other.as_subclass(torch.Tensor)
            )


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, kind):
    for train in (False, True):
        model = model_of(case)
        layer = model.base_model.model[0]
        x = INPUTS[kind]()
        call, tasks = call_of(case, x)
        if train:
            x = x.detach().requires_grad_()
        with torch.set_grad_enabled(train):
            found = model(x, **call)
            expected = dense(case, layer, x, tasks)
        assert_right(case, model, x, found, expected)


@pytest.mark.parametrize("case", sorted(METHODS))
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_rows(case, layout):
    """The output of a linear layer is dense."""
    model = model_of(case)
    x = numbers(3, IN) * (numbers(3, IN) > 0)
    call, tasks = call_of(case, x)
    expected = torch.stack(dense(case, model.base_model.model[0], x, tasks))
    sparse = x.to_sparse(layout=layout)
    torch.testing.assert_close(model(sparse, **call), expected)
    names = ["default", "__base__", "default"]
    expected[1] = model.base_model.model[0].base_layer(x[1])
    torch.testing.assert_close(model(sparse, adapter_names=names, **call), expected)


@pytest.mark.parametrize("case", sorted(METHODS))
@pytest.mark.parametrize("train", [False, True])
def test_several_adapters_and_precisions(case, train):
    """Of inputs that go different roads, a sum of adapters; in float32, and in bfloat16 with
    adapters in float32.
    """
    for kind in ("a vector", "no rows", "tokens", "tokens first", "jagged", "nested"):
        model = model_of(case, ("one", "two"))
        model.base_model.set_adapter(["one", "two"])
        x = INPUTS[kind]()
        call, tasks = call_of(case, x)
        expected = dense(case, model.base_model.model[0], x, tasks, ("one", "two"))
        with torch.set_grad_enabled(train):
            assert_right(case, model, x, model(x, **call), expected)
            for dtype, base, tolerance in (
                (torch.float32, torch.float32, 1e-5),
                (torch.float32, torch.bfloat16, 0.1),
            ):
                model.to(dtype).base_model.model[0].base_layer.to(base)
                found = samples_of(model(x.to(base), **call))
                assert len(found) == len(expected)
                for one, other in zip(found, expected, strict=True):
                    assert one.dtype == base
                    torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_without_values(case):
    """The meta device and fake tensors, inside `vmap` and of inference mode."""
    model, x = model_of(case), numbers(3, IN)
    call, tasks = call_of(case, x)
    expected = torch.stack(dense(case, model.base_model.model[0], x, tasks))
    torch.testing.assert_close(
        torch.vmap(lambda x: model(x, **({"task_ids": 1} if call else {})))(x)[1], expected[1]
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(x.clone(), **call), expected)
        inference = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(model(inference, **call), expected)
    torch.testing.assert_close(model.requires_grad_(False)(inference, **call), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(3, IN, dtype=torch.float64), **call).shape == (3, OUT)
    model = model.to("meta").requires_grad_()
    for shape in ((IN,), (3, IN), (3, 4, IN), (0, IN)):
        y = model(
            torch.empty(shape, dtype=torch.float64, device="meta"),
            **({"task_ids": 1} if call else {}),
        )
        assert y.is_meta
        assert y.shape == (*shape[:-1], OUT)
        y.sum().backward()


class Scaled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x):
        return super().forward(x) + x.sum() * 0


@pytest.mark.parametrize("case", sorted(METHODS))
def test_other_layers(case):
    """Conv1D of transformers, a subclass, no bias."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(OUT, IN)
    for base in (conv1d, Scaled(IN, OUT), nn.Linear(IN, OUT, bias=False)):
        for kind in ("a vector", "no rows", "no tokens", "tokens", "other strides"):
            model = model_of(case, base=nn.Sequential(base))
            layer, x = model.base_model.model[0], INPUTS[kind]()
            call, tasks = call_of(case, x)
            found = samples_of(model(x, **call))
            assert len(found) == len(samples_of(x))
            for one, sample, task in zip(found, samples_of(x), tasks, strict=False):
                bias = 0 if layer.get_base_layer().bias is None else layer.get_base_layer().bias
                expected = (
                    sample @ adapted_weight(layer, sample, task)[0].T + bias
                    if sample.numel()
                    else sample.new_zeros(0, OUT)
                )
                torch.testing.assert_close(one, expected)
            model.base_model.disable_adapter_layers()


CONVOLUTIONS = {
    "LORA": {},
    "LORA dora": {"use_dora": True},
    "LOHA": {},
    "LOHA tucker": {"use_effective_conv2d": True},
    "LOKR": {},
    "LOKR both": {"decompose_both": True, "r": 1},
    "LOKR tucker": {"use_effective_conv2d": True},
    "LOKR rows": {"weight_decompose": True},
    "LOKR columns": {"weight_decompose": True, "wd_on_output": False},
}
IMAGES = {
    "a batch": lambda: numbers(2, IN, 5, 6),
    "one image": lambda: numbers(IN, 5, 6),
    "no images": lambda: numbers(0, IN, 5, 6),
    "channels last": lambda: numbers(2, IN, 5, 6).to(memory_format=torch.channels_last),
    "expanded": lambda: numbers(1, IN, 5, 6).expand(2, -1, -1, -1),
    "a subclass": lambda: numbers(2, IN, 5, 6).as_subclass(Subclass),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
    """The same for convolutions, against one with the dense weight."""
    options = {"stride": 2, "padding": 1, "dtype": torch.float64}
    method = METHODS[case.split()[0]]
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(IN, OUT, 3, **options)),
        method.config(target_modules=["0"], **CONVOLUTIONS[case]),
    ).eval()
    model.double()
    layer = model.base_model.model[0]
    for kind, make in IMAGES.items():
        x = make().requires_grad_()
        expected = nn.functional.conv2d(
            x, adapted_weight(layer, x)[0], layer.get_base_layer().bias, 2, 1
        )
        found = model(x)
        assert type(found) is type(x), kind
        torch.testing.assert_close(found, expected)
        sources = [x, *(p for p in model.parameters() if p.requires_grad)]
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), sources),
            torch.autograd.grad(expected.square().sum(), sources),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
    assert torch.vmap(model)(numbers(3, IN, 5, 6)).shape == (3, OUT, 3, 3)
    assert model.to("meta")(torch.empty(2, IN, 5, 6, dtype=torch.float64, device="meta")).shape == (
        2,
        OUT,
        3,
        3,
    )


def test_embeddings():
    """Of tokens in any number of dimensions, none of them too."""
    model = model_of("LORA", base=nn.Sequential(nn.Embedding(7, OUT)))
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_embedding_A["default"])
    W = (
        layer.base_layer.weight
        + (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T * 1.5
    )
    jagged = torch.nested.nested_tensor(
        [torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged
    )
    for x in (
        torch.tensor(3),
        torch.tensor([1, 6, 1]),
        torch.zeros(2, 0, dtype=torch.long),
        torch.tensor([[0, 1], [2, 3]]),
    ):
        torch.testing.assert_close(model(x), W[x])
    torch.testing.assert_close(model(jagged).values(), W[jagged.values()])


@pytest.mark.parametrize("case", sorted(METHODS))
def test_samples_with_adapters_of_their_own(case):
    """Where a layer gets no rows, as an expert to which no token was sent."""
    model = model_of(case, ("one", "two"), base=Experts())
    x = numbers(3, IN)
    call, tasks = call_of(case, x)
    names = ["one", "__base__", "two"]
    layer = model.base_model.model.layers[0]
    found = model(x, adapter_names=names, **call)
    for y, sample, name, task in zip(found, x, names, tasks, strict=False):
        W, bias = layer.get_base_layer().weight, layer.get_base_layer().bias
        W = W if name == "__base__" else adapted_weight(layer, sample, task, name)[0]
        torch.testing.assert_close(y, sample @ W.T + bias)


class Experts(nn.Module):
    """All tokens go to the first of two experts; the other is run all the same."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(IN, OUT), nn.Linear(IN, OUT)])

    def forward(self, x):
        assert self.layers[1](x[:0]).shape == (0, OUT)
        return self.layers[0](x)


def test_an_empty_batch_of_tasks():
    """No ids for no samples, or one for all; none for some is an error that says so."""
    model, x = model_of("POLY"), numbers(0, IN)
    for ids in ([], (), torch.zeros(0, dtype=torch.long), [1], 1):
        assert model(x, task_ids=ids).shape == (0, OUT)
    for ids in ([], torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"`task_ids` has shape \[0\]; expected 2 ids"):
            model(numbers(2, IN), task_ids=ids)
    with pytest.raises(ValueError, match="expected 0 ids"):
        model(x, task_ids=[0, 1])
