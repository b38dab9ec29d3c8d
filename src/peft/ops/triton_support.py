# SPDX-License-Identifier: Apache-2.0
"""Run a Triton kernel in place of plain operations on devices where both agree.

On a GPU a chain of small operations takes the time of its launches. `with_kernel` gives a function
of plain operations a kernel that computes the same in one launch, from the file `<name>_triton.py`
beside its own `<name>.py`. Such a file needs Triton, so it is imported at the first use of the
kernel. The plain operations stay: they are the reference, and serve all other cases.

Eager mode calls a kernel directly, which takes the least time. A compiler can't look into one: to
`torch.compile` and `torch.export` the function is an operator, `torch.ops.peft.<name>`, which
chooses between kernel and plain operations when it runs, as eager mode does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..base.errors import PeftWarning
from . import dispatch
from .derivatives import gradients_again
from .dispatch import PLAIN_TENSORS, can_trace, is_batched, is_eager

Result = Tensor | tuple[Tensor, ...]
"""One tensor, or several."""

Plain = TypeVar("Plain", bound=Callable[..., Result])
Example = Callable[[torch.device], tuple[object, ...]]

_LIBRARY = torch.library.Library("peft", "FRAGMENT")


class Trial(NamedTuple):
    """A comparison of a function that runs kernels with plain operations, on an example."""

    ours: Callable[..., Result]
    plain: Callable[..., Result]
    example: Example


# The outcome of each trial, by its function with kernels and the device.
_TRIED: dict[tuple[Callable[..., Result], torch.device], bool] = {}


def define(
    schema: str,
    compute: Callable[..., object],
    fake: Callable[..., object],
    autograd: tuple[Callable[..., object], Callable[..., None]] | None = None,
) -> Callable[..., Any]:
    """Define an operator `torch.ops.peft.<name>` and return it.

    Args:
        schema: `name(arguments) -> results`, in torch's notation.
        compute: Returns new contiguous tensors, without a record for gradients.
        fake: Returns tensors of the shapes and dtypes of the results, given some without values.
        autograd: `backward` and `setup_context` of an autograd function.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peft::{name}", fake, lib=_LIBRARY)
    if autograd is not None:
        backward, save = autograd
        torch.library.register_autograd(f"peft::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.peft, name).default


def with_kernel(
    name: str,
    arguments: str,
    results: str,
    example: Example,
    reference: Callable[..., Result] | None = None,
) -> Callable[[Plain], Plain]:
    """Give a function of plain operations a kernel that replaces it where possible.

    The module `…_triton` beside the function's own has `forward` with the function's arguments,
    `backward` with the results' gradients and which of the operands' are wanted as further ones,
    and `fits`, which returns whether the kernels support given arguments. Before their first use on
    a device they are tried on an example there, values and gradients.

    Args:
        name, arguments, results: The operator's, in torch's notation: all tensors come first.
        example: Makes arguments to try the kernel with on a device.
        reference: The plain operations to compare with, by default the function itself.
    """

    def decorate(plain: Plain) -> Plain:
        own = _WithKernel(name, arguments, plain)
        own.trial = Trial(own.launch, reference or plain, example)
        own.operator = define(
            f"{name}({arguments}) -> {results}", own.compute, own.fresh, (own.backward, own.save)
        )
        own.of_gradients = define(
            f"{name}_backward({arguments}, Tensor[] gradients, bool[] wanted) -> Tensor[]",
            own.gradients,
            lambda *args: [
                torch.empty_like(tensor, memory_format=torch.contiguous_format)
                for tensor, want in zip(args, args[-1], strict=False)
                if want
            ],
        )
        return cast(Plain, functools.wraps(plain)(lambda *args: own.run(*args)))

    return decorate


class _Context(Protocol):
    """Attributes of an autograd context that this file uses."""

    options: tuple[object, ...]
    kernels: ModuleType | None  # of a call outside the operator
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _WithKernel:
    """A function of plain operations, its kernel and its operator."""

    trial: Trial
    operator: Callable[..., Result]
    of_gradients: Callable[..., Result]

    def __init__(self, name: str, arguments: str, plain: Callable[..., Result]) -> None:
        self.plain, self.module = plain, f"{plain.__module__}_triton"
        self.operands = arguments.count("Tensor")
        own = {"forward": self.forward, "backward": self.backward}
        function = cast(type[torch.autograd.Function], type(name, (torch.autograd.Function,), own))
        self.launch = function.apply

    def run(self, *args: Tensor) -> Result:
        """Compute the function by the kernel if it can, else by plain operations."""
        if torch.compiler.is_compiling():
            return (self.operator if can_trace(args[0]) else self.plain)(*args)
        kernels = self.kernels(args)
        if kernels is None:
            return self.plain(*args)
        if torch.is_grad_enabled():
            for tensor in args[: self.operands]:
                if tensor is not None and tensor.requires_grad:
                    return self.launch(*args)
        return kernels.forward(*args)

    def kernels(self, args: tuple[Tensor, ...]) -> ModuleType | None:
        """Return the module whose kernels can compute the function, or None."""
        if not can_launch(*args[: self.operands]):
            return None
        kernels = importlib.import_module(self.module)
        return kernels if kernels.fits(*args) and agrees(self.trial, args[0].device) else None

    def compute(self, *args: Tensor) -> Result:
        """Compute the function as the operator does."""
        kernels = self.kernels(args)
        return self.fresh(*args) if kernels is None else kernels.forward(*args)

    def fresh(self, *args: Tensor) -> Result:
        """Compute the function by plain operations, as new contiguous tensors."""
        results = self.plain(*args)
        return tuple(map(_copied, results)) if isinstance(results, tuple) else _copied(results)

    def forward(self, ctx: _Context, *args: Tensor) -> Result:
        """Launch the kernel, with a record for gradients."""
        self.save(ctx, args, None)
        ctx.kernels = importlib.import_module(self.module)
        return ctx.kernels.forward(*args)

    def save(self, ctx: _Context, inputs: tuple[Tensor, ...], output: object) -> None:
        """Keep the arguments for backward."""
        ctx.save_for_backward(*inputs[: self.operands])
        ctx.options, ctx.kernels = inputs[self.operands :], None

    def backward(self, ctx: _Context, *of_results: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients for the arguments, which can be differentiated again."""
        args: tuple[Any, ...] = *ctx.saved_tensors, *ctx.options
        wanted = ctx.needs_input_grad[: self.operands]
        if torch.is_grad_enabled() or any(map(is_batched, of_results)):
            gradients = self.plain_gradients(args, of_results, wanted)
        else:
            make = self.of_gradients if ctx.kernels is None else ctx.kernels.backward
            computed = iter(make(*args, of_results, wanted))
            gradients = [next(computed) if want else None for want in wanted]
        return *gradients, *[None] * len(ctx.options)

    def gradients(self, *args: Any) -> Sequence[Tensor]:
        """Compute the wanted gradients, without a record for gradients."""
        *inputs, of_results, wanted = args
        kernels = self.kernels(tuple(inputs))
        if kernels is not None:
            return kernels.backward(*args)
        for i, want in enumerate(wanted):
            inputs[i] = inputs[i].detach().requires_grad_() if want else inputs[i]
        by_input = self.plain_gradients(tuple(inputs), of_results, wanted)
        return [
            _copied(torch.zeros_like(tensor) if gradient is None else gradient)
            for tensor, gradient, want in zip(inputs, by_input, wanted, strict=False)
            if want
        ]

    def plain_gradients(
        self, args: tuple[Tensor, ...], of_results: Sequence[Tensor], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients for the operands by plain operations."""
        operands, options = args[: self.operands], args[self.operands :]
        return gradients_again(
            lambda *inputs: self.plain(*inputs, *options), operands, wanted, of_results
        )


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def can_launch(first: Tensor, *others: Tensor | None) -> bool:
    """Return whether kernels can read tensors as they are; nothing waits for the device.

    They can in eager mode (transforms must see the operations), if all are plain and on one GPU of
    compute capability 8 or more, and Triton is installed.
    """
    device = first.device
    if not has_triton(device) or not is_eager():
        return False
    for tensor in (first, *others):
        if tensor is not None and (type(tensor) not in PLAIN_TENSORS or tensor.device != device):
            return False
    return True


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Return whether Triton is installed and made for a device: a GPU with bfloat16."""
    is_fit = dispatch.INTERPRETED
    if device.type == "cuda":
        is_fit = torch.cuda.get_device_capability(device) >= (8, 0)
    return is_fit and importlib.util.find_spec("triton") is not None


def agrees(trial: Trial, device: torch.device) -> bool:
    """Return whether a function with kernels computes the same on a device as plain operations.

    Values and gradients of an example are compared once on each device. If they differ, or the
    kernel raises, a warning says so and it is not used there.
    """
    agreed = _TRIED.get((trial.ours, device))
    if agreed is None:
        if torch._C._current_graph_task_id() != -1 or (
            device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            return False  # not tried inside a backward, or while a graph is captured
        difference = _difference(trial, device)
        agreed = _TRIED[trial.ours, device] = difference is None
        if not agreed:
            warnings.warn(
                f"The kernels of {trial.plain.__module__} are not used on {device}, but plain "
                f"operations: {difference}",
                PeftWarning,
                stacklevel=2,
            )
    return agreed


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the tensor's device is the current one, where Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def _difference(trial: Trial, device: torch.device) -> str | None:
    """Return the difference that a trial shows, or None; runs in a thread of its own."""
    outcome: list[str | None] = []

    def run() -> None:
        try:
            both = (_values_and_gradients(f, trial, device) for f in (trial.ours, trial.plain))
            pairs = zip(*both, strict=True)
            same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)
            outcome.append(None if same else "results differ")
        except Exception as error:  # a compiler raises errors of any kind
            outcome.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


def _values_and_gradients(
    function: Callable[..., Result], trial: Trial, device: torch.device
) -> list[Tensor]:
    """Return results for the example and its gradients, without advancing the random numbers."""
    cuda = device.type == "cuda"
    with (
        torch.cuda.device(device) if cuda else nullcontext(),
        torch.random.fork_rng([device.index] if cuda else []),
    ):
        arguments = trial.example(device)
        results = function(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        trained = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        return [
            *results,
            *torch.autograd.grad(results, trained, [result.detach().cos() for result in results]),
        ]
