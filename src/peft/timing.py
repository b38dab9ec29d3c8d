# SPDX-License-Identifier: Apache-2.0
"""`time_adapter`: seconds that a step of a model takes with and without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from .base.errors import PeftNotSupportedError, PeftTypeError, PeftValueError
from .base.plain_values import JsonObject
from .base.progress import track
from .base.registry import PeftType
from .base.tables import table
from .base.validation import at_least, check_flags
from .config import PeftConfig
from .mapping_func import get_peft_model

# Steps that are not counted, at the start of each series.
_WARM_UP = 2
# Parts of the names of transformers' classes whose labels are tokens.
_WITH_TOKEN_LABELS = ("CausalLM", "LMHead", "ConditionalGeneration")


@dataclass(repr=False)
class StepTimes:
    """Seconds that a step takes with and without an adapter. Print it for a table.

    Attributes:
        method: The adapter's method.
        device: The device.
        forward: Medians of a forward in evaluation: without and with the adapter.
        training: The same of forward and backward, without the adapter through all of the model's
            parameters; None if it was not measured.
        rounds: Number of steps in each series. The series without the adapter is run before and
            after the one with it.
    """

    method: str
    device: str
    forward: tuple[float, float]
    training: tuple[float, float] | None
    rounds: int

    def to_dict(self) -> JsonObject:
        """Return the times as values of JSON."""
        series = {"forward": self.forward, "training": self.training}
        return {
            "method": self.method,
            "device": self.device,
            "rounds": self.rounds,
            **{
                name: None
                if times is None
                else {"base": times[0], "adapter": times[1], "ratio": times[1] / times[0]}
                for name, times in series.items()
            },
        }

    def __repr__(self) -> str:
        ratio = self.forward[1] / self.forward[0]
        return f"<StepTimes: {self.method}, forward {ratio:.3f} times; print it for a table>"

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("step", "without", "with", "ratio")]
        for name, times in (("forward", self.forward), ("forward, backward", self.training)):
            if times is not None:
                shown = [f"{seconds * 1e3:.2f} ms" for seconds in times]
                rows.append((name, *shown, f"{times[1] / times[0]:.3f}"))
        title = f"{self.method} on {self.device}, medians of {self.rounds} steps"
        return f"{title}\n{table(rows, right=[1, 2, 3])}"


def time_adapter(
    model: nn.Module,
    config: PeftConfig,
    inputs: Mapping[str, object],
    *,
    rounds: int = 10,
    training: bool = False,
    adapter_inputs: Mapping[str, object] | None = None,
) -> StepTimes:
    """Return the seconds that a step of a model takes with and without a new adapter.

    The model is as it was afterwards.

    Args:
        model: A base model, on the device and in the dtype of the measurement.
        config: The adapter's config.
        inputs: Keyword arguments of the model's call.
        rounds: Number of steps of each kind.
        training: Measure forward and backward too; the model's output needs a `loss` then, or is
            summed up.
        adapter_inputs: Further arguments for the model with the adapter, such as `task_ids`.

    Raises:
        PeftTypeError: `inputs` is not a mapping.
        PeftValueError: `rounds` is not an integer of at least 1, or the config does not fit.

    Example:
        >>> from peft import LoraConfig
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> times = time_adapter(
        ...     model, LoraConfig(r=2, target_modules=["0"]), {"input": torch.ones(2, 8)}, rounds=2
        ... )
        >>> times.forward[1] > 0, isinstance(model[0], nn.Linear)
        (True, True)
    """
    for problem in at_least("rounds", rounds):
        raise PeftValueError(problem)
    check_flags(training=training)
    if not isinstance(inputs, Mapping):
        raise PeftTypeError(f"`inputs` must be keyword arguments by name, not {inputs!r}.")
    required = {p: p.requires_grad for p in model.parameters()}
    trained = {p: p.is_floating_point() for p in required} if training else required
    mode = model.training
    try:
        _set_gradients(trained)
        before = _series(model, inputs, rounds, training)
        adapted = get_peft_model(model, config)
        try:
            within = _series(adapted, {**inputs, **(adapter_inputs or {})}, rounds, training)
        finally:
            adapted.unload()
        _set_gradients(trained)
        after = _series(model, inputs, rounds, training)
    finally:
        _set_gradients(required)
        model.train(mode)
    times = [
        (median([*before_it, *after_it]), median(with_it))
        for before_it, with_it, after_it in zip(before, within, after, strict=True)
    ]
    device = next(model.parameters()).device
    return StepTimes(
        method=PeftType(config.peft_type).value,
        device=str(device),
        forward=times[0],
        training=times[1] if training else None,
        rounds=rounds,
    )


def example_inputs(model: nn.Module, batch: int = 1, length: int = 128) -> dict[str, Tensor]:
    """Return random inputs of a transformers model: tokens, or images.

    Raises:
        PeftNotSupportedError: The model takes neither.
    """
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    text = getattr(config, "text_config", None) or config
    device = next(model.parameters()).device
    tokens = getattr(text, "vocab_size", None)
    if name == "input_ids" and tokens:
        ids = torch.randint(0, tokens, (batch, length), device=device)
        predicts_tokens = any(part in type(model).__name__ for part in _WITH_TOKEN_LABELS)
        return {"input_ids": ids, **({"labels": ids} if predicts_tokens else {})}
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.rand(batch, channels, height, width).to(device, dtype)}
    raise PeftNotSupportedError(
        f"There are no example inputs for {type(model).__name__}; pass your own to `time_adapter`."
    )


def _series(
    model: nn.Module, inputs: Mapping[str, object], rounds: int, training: bool
) -> list[list[float]]:
    """Return the seconds of each forward, and with `training` of each forward and backward."""
    model.eval()
    with torch.no_grad():
        result = [_seconds(lambda: model(**inputs), rounds, model, "forward")]
    if training:
        model.train()
        result.append(_seconds(lambda: _train_step(model, inputs), rounds, model, "training"))
        model.zero_grad(set_to_none=True)
    return result


def _train_step(model: nn.Module, inputs: Mapping[str, object]) -> None:
    output = model(**inputs)
    loss = getattr(output, "loss", None)
    if loss is None:
        first = output if isinstance(output, Tensor) else next(iter(output.values()))
        loss = first.float().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)


def _seconds(step: Callable[[], object], rounds: int, model: nn.Module, kind: str) -> list[float]:
    """Return the seconds of each of some steps, without those that warm up."""
    device = next(model.parameters()).device
    result = []
    for _ in track(range(rounds + _WARM_UP), f"Measuring {kind}", unit="step"):
        begin = perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        result.append(perf_counter() - begin)
    return result[_WARM_UP:]


def _set_gradients(required: Mapping[nn.Parameter, bool]) -> None:
    for parameter, before in required.items():
        parameter.requires_grad_(before)
