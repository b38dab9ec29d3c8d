# SPDX-License-Identifier: Apache-2.0
"""Fit a few numbers of a model to a few examples: the checked loss, steps of Adam, and a context in
which nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from math import isfinite
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..base.errors import PeftTypeError, PeftValueError
from ..base.plain_values import plain
from ..base.progress import remark, track
from ..base.validation import at_least, choice
from ..base.validation import number as finite_number
from .measuring import in_mode

# A function that returns the loss, or batches for a model whose output has a `loss`.
Loss: TypeAlias = Callable[[], Tensor] | Iterable[Mapping[str, object]]


@dataclass(frozen=True)
class Subject:
    """The numbers that are fitted, in words for messages.

    Attributes:
        name: After "Fitting": "task 3".
        state: What is left as it was: "the routing of task 3".
        remedy: A sentence's end for a loss that does not depend on them: "have it run …".
    """

    name: str
    state: str
    remedy: str


class FewShotLoss:
    """A model's loss on a few examples.

    Args:
        loss: A function without arguments, or batches.
        run: Run the model with a batch, and return its output.
        subject: The numbers that are fitted.

    Attributes:
        batches: Number of batches, 1 for a function.

    Raises:
        PeftTypeError: `loss` is neither.
    """

    def __init__(
        self, loss: Loss, run: Callable[[Mapping[str, object]], object], subject: Subject
    ) -> None:
        self.subject, self.batches, self._remedy = subject, 1, ""
        if callable(loss):
            self._next: Callable[[], object] = loss
            return
        batches = list(loss) if isinstance(loss, Iterable) else []
        if not batches or not all(isinstance(batch, Mapping) for batch in batches):
            raise PeftTypeError(
                "`loss` must be a function without arguments, or batches: keyword arguments for "
                "the model."
            )
        turns, self.batches = cycle(batches), len(batches)
        self._next = lambda: getattr(run(next(turns)), "loss", None)
        self._remedy = "The model's output has no `loss`; batches need `labels`."

    def of_next(self) -> Tensor:
        """Return the loss of the next batch, `[]`."""
        return self._checked(self._next())

    def _checked(self, value: object) -> Tensor:
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.reshape(())
        if value is None and self._remedy:
            raise PeftTypeError(self._remedy)
        got = f"{value!r}, a {type(value).__name__}"
        if isinstance(value, Tensor):
            got = f"a tensor of shape {list(value.shape)}"
        raise PeftTypeError(
            "`loss` must return a tensor of one number that gradients flow through; it returned "
            f"{got}. Return the loss itself, without `.item()` or `float()`."
        )

    def of_all(self) -> float:
        """Return the sum over all batches."""
        return sum(float(self.of_next().detach()) for _ in range(self.batches))

    def mean_number(self) -> float:
        """Return the mean over all batches; a function may return a number without gradient."""
        total = 0.0
        for _ in range(self.batches):
            value = self._next()
            number = None if isinstance(value, Tensor) else plain(value)  # NumPy's too
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                total += number
            else:
                total += float(self._checked(value).detach())
        return total / self.batches

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the gradients of a loss, which must depend on one of the parameters."""
        gradients: Sequence[Tensor | None] = [None]
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise PeftValueError(
                f"`loss` does not depend on {self.subject.state}: {self.subject.remedy}, with the "
                "adapter and gradients on and nothing detached."
            )
        return gradients

    def not_finite(self, cause: str, step: int, lr: float) -> PeftValueError:
        """Return the error for a loss or a gradient that is not finite."""
        remedy = f"use a smaller `lr` than {lr}, or look" if step else "look"
        return PeftValueError(
            f"{cause} after {step} steps; {self.subject.state} is left as it was. To fit it, "
            f"{remedy} for what makes the loss so: "
            "values of the examples, labels that are all left out, a 16-bit dtype."
        )


def checked_options(
    steps: int, lr: float, init: str | None, starts: Sequence[str]
) -> tuple[int, float]:
    """Return the number of steps and the learning rate, checked; `init` must be None or in
    `starts`.
    """
    steps, lr = plain(steps), plain(lr)
    offences = [
        *at_least("steps", steps, 0),
        *finite_number("lr", lr, positive=True),
        *choice("init", init, (None, *starts)),
    ]
    if offences:
        raise PeftValueError(" ".join(offences))
    return steps, float(lr)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in evaluation mode and its parameters are frozen; afterwards both
    are as before.
    """
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    with in_mode(model, training=False):
        for p, _ in parameters:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p, required in parameters:
                p.requires_grad_(required)


def descend(
    loss: FewShotLoss,
    parameters: Sequence[Tensor],
    steps: int,
    lr: float,
    penalty: Callable[[], Tensor] | None = None,
    bound: float | None = None,
) -> list[float]:
    """Take steps with Adam, and leave the parameters at the least loss. With several batches leave
    them at the last, since losses of different batches do not compare.

    Args:
        loss: The loss.
        parameters: The numbers that are fitted.
        steps: Number of steps, each with one batch.
        lr: Learning rate.
        penalty: A term to add to each loss.
        bound: Largest absolute value of each number; a step beyond ends there.

    Returns:
        The loss before each step, and last the one after all steps.

    Raises:
        PeftValueError: A loss or a gradient is not finite, or the loss does not depend on the
            parameters.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr)
    keep_last, losses = loss.batches > 1, list[float]()
    best, kept = float("inf"), [p.detach().clone() for p in parameters]
    turns = track(range(steps + 1), f"Fitting {loss.subject.name}", unit="step")
    for step in turns:
        value, extra = loss.of_next(), None if penalty is None else penalty()
        losses.append(float(value.detach() + (0 if extra is None else extra.detach())))
        remark(turns, f"loss {losses[-1]:.4g}")
        if not isfinite(losses[-1]):
            raise loss.not_finite(f"`loss` is {losses[-1]}", step, lr)
        if losses[-1] < best or keep_last:
            best, kept = losses[-1], [p.detach().clone() for p in parameters]
        if step < steps:
            for p, gradient in zip(parameters, loss.gradients(value, parameters), strict=True):
                if gradient is not None and not gradient.isfinite().all():
                    cause = f"`loss` is {losses[-1]}, but has gradients that are NaN or infinite"
                    raise loss.not_finite(cause, step, lr)
                p.grad = gradient
            if extra is not None:
                extra.backward()  # adds to the gradients
            optimizer.step()
            if bound is not None:
                with torch.no_grad():
                    for p in parameters:
                        p.clamp_(-bound, bound)
    with torch.no_grad():
        for p, values in zip(parameters, kept, strict=True):
            p.copy_(values)
    return losses
