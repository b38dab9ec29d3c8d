# SPDX-License-Identifier: Apache-2.0
"""Activated LoRA: an adapter that acts on the tokens from its last invocation on.

What lies before is computed as by the base model, so that its key-value cache serves both, and all
activated adapters. The layers see activations, not token ids. So `Activation` wraps the methods by
which a model is called, and finds the tokens once a call:

1. A forward looks for the invocation in its own tokens. With a cache, it goes on with the state
   that the forward before it left with the cache.
2. `generate` looks in the whole prompt; each step compares its tokens' places with the result.
3. `alora_offsets` tells the tokens in place of a search.

`ActiveCall` holds the result while the call runs, and again while backward recomputes its layers. A
layer asks it for the scale of each of its rows, which is zero for inactive ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...base.calls.adapter_batch import ADAPTER_BATCHES, AdapterBatch
from ...base.calls.arguments import argument_shapes, entry_modules
from ...base.calls.rows import CallRows, call_rows, generation_rows
from ...base.calls.stack import CallStack
from ...base.calls.token_values import values_of_rows
from ...base.calls.wrapped_methods import MethodCall, unwrap_methods, wrap_method
from ...base.containers import walk
from ...base.errors import PeftNotSupportedError, warn
from ...core.layer import BaseTunerLayer
from .cached_starts import (
    are_places,
    cache_of,
    carried_starts,
    for_rows,
    leave_starts,
    rows_and_tokens,
    token_ids,
    tokens_seen,
)
from .invocation import (
    NEVER,
    active_tokens,
    active_tokens_of_texts,
    invocation_starts,
    starts_of_offsets,
)

CALL_ARGUMENTS = ("alora_offsets",)
# The attribute of a module with wrapped methods that holds its `Activation`.
_ACTIVATION = "_peft_activation"


@dataclass(eq=False)
class ActiveCall:
    """A call in progress.

    Args:
        owner: The model's activation.
        rows: The counts of the call.
        starts: `[rows]` by adapter: the place of each row's first active token in its text.
        masks: `[rows, tokens]` by adapter, true at active tokens; empty in `generate` itself.
        chosen: The mask of each row's own adapter, where the call chose one for each sample.
        length: Number of tokens of the prompt of a call of `generate`, in which each forward is a
            call too; None for other calls.
        later: In `generate`, the call of a forward with one token after the prompt. It serves all
            of them, since the state of a row does not change any more.
        acts_on_all: True in a layer that selects the rows itself: adapters act on all of them.
    """

    owner: Activation | None
    rows: CallRows
    starts: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    chosen: Tensor | None = None
    length: int | None = None
    later: ActiveCall | None = None
    acts_on_all: bool = False
    _scales_by_input: dict[object, Tensor] = field(default_factory=dict, repr=False)

    def scales(
        self,
        layer: BaseTunerLayer,
        adapter_name: str | None,
        x: Tensor,
        dtype: torch.dtype,
        scale: float | Tensor,
        flat: bool,
    ) -> Tensor | float:
        """Return `scale` for rows of a layer's input on which an adapter acts and 0 for others,
        `[*leading, 1]`, or `[rows, 1]` if `flat`; 0.0 if the call does not tell. No name stands for
        each row's own adapter.
        """
        mask = self.chosen if adapter_name is None else self.masks.get(adapter_name)
        if mask is None:
            return scale if self.acts_on_all else 0.0
        layout = layer.layout
        # Each expert has tokens of its own; under `torch.compile` sizes may be no keys.
        if layout.expert or isinstance(scale, Tensor) or torch.compiler.is_compiling():
            return self._scales(layer, mask, x, dtype, scale, flat)
        leading = x.shape[: x.dim() - layout.features]
        key = adapter_name, id(layout), leading, x.device, dtype, scale, flat
        scales = self._scales_by_input.get(key)
        if scales is None:
            scales = self._scales(layer, mask, x, dtype, scale, flat)
            self._scales_by_input[key] = scales
        return scales

    def _scales(
        self,
        layer: BaseTunerLayer,
        mask: Tensor,
        x: Tensor,
        dtype: torch.dtype,
        scale: float | Tensor,
        flat: bool,
    ) -> Tensor:
        scales = values_of_rows(mask, x, layer, self.rows).to(dtype)
        scales = scales if isinstance(scale, float) and scale == 1 else scales * scale
        return scales.reshape(-1, 1) if flat else scales.unsqueeze(-1)


ACTIVE_CALLS: CallStack[ActiveCall] = CallStack()


class Activation:
    """The activated adapters of a model.

    Attributes:
        invocations: The tokens of each adapter's invocation, by name.
        layer: One of the layers, to read which adapters are active.
    """

    def __init__(self) -> None:
        self.invocations: dict[str, list[int]] = {}
        self.layer: BaseTunerLayer | None = None
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, object]:
        """Leave out the copies on devices."""
        return {**vars(self), "_tensors": {}}

    @classmethod
    def attach(
        cls, model: nn.Module, adapter_name: str, invocation: list[int], layer: BaseTunerLayer
    ) -> None:
        """Add an activated adapter; with the first, wrap the methods by which a model is called."""
        self = vars(model).get(_ACTIVATION)
        if self is None:
            self = cls()
            body = getattr(model, "base_model", None)
            parts = {id(part): part for part in (*entry_modules(model), body)}
            for part in parts.values():
                if isinstance(part, nn.Module):
                    vars(part)[_ACTIVATION] = self
                    wrap_method(part, "forward", CALL_ARGUMENTS, _forward)
            wrap_method(model, "generate", CALL_ARGUMENTS, _generate)
        self.invocations[adapter_name] = invocation
        self.layer = layer

    @staticmethod
    def detach(model: nn.Module, adapter_name: str | None = None) -> None:
        """Forget an adapter, by default all; without any, the model has its own methods again."""
        self = vars(model).get(_ACTIVATION)
        if self is None:
            return
        if adapter_name is None:
            self.invocations.clear()
        self.invocations.pop(adapter_name, None)
        if not self.invocations:
            unwrap_methods(model, _forward, _generate)
            for _, module in walk(model):
                vars(module).pop(_ACTIVATION, None)

    def forward(self, method: MethodCall) -> object:
        """Run a forward of the model, or of a part that clients call, with its tokens known."""
        outer = self._enclosing(method.module)
        given = method.kwargs.get("alora_offsets")
        if outer is not None and outer.length is None and given is None:
            return method.run(CALL_ARGUMENTS)
        names = self._names()
        if not names:
            return method.run(CALL_ARGUMENTS)
        arguments = method.arguments()
        if outer is not None and given is None:
            call = self._step(outer, arguments, names)
            with ACTIVE_CALLS.during(call):
                return method.run(CALL_ARGUMENTS)
        call = self._new_call(method.module, arguments, names)
        output = ACTIVE_CALLS.run(call, lambda: method.run(CALL_ARGUMENTS))
        leave_starts(arguments, output, call.starts)
        return output

    def generate(self, method: MethodCall) -> object:
        """Run `generate`, with the tokens of its prompt known."""
        model, arguments, names = method.module, method.arguments(), self._names()
        if not names:
            return method.run(CALL_ARGUMENTS)
        rows = generation_rows(model, arguments, CALL_ARGUMENTS)
        if rows.is_guided:
            raise PeftNotSupportedError(
                "`guidance_scale` runs the model on a second prompt, in which an activated LoRA "
                "has no invocation; leave it out."
            )
        ids, sizes = token_ids(arguments), rows_and_tokens(arguments)
        call = ActiveCall(self, rows, length=0 if sizes is None else sizes[1])
        if ids is None and arguments.get("alora_offsets") is None:
            warn(
                "Cannot calculate aLoRA offsets during generate as input_ids are not available. "
                "Disabling aLoRA. Pass `alora_offsets` to use it."
            )
        else:
            call.starts = self._starts(arguments, names, ids, 0)
        return ACTIVE_CALLS.run(call, lambda: method.run(CALL_ARGUMENTS))

    def _enclosing(self, module: nn.Module) -> ActiveCall | None:
        """Return the call of this model that a call of `module` lies in.

        Backward recomputes parts of a model. If it runs the model itself, that is another call.
        """
        call = ACTIVE_CALLS.current
        if call is not None and call.rows.root is module and call.length is None:
            call = ACTIVE_CALLS.running
        return call if call is not None and call.owner is self else None

    def _names(self) -> list[str]:
        """Return the activated adapters that a call can use."""
        batch = ADAPTER_BATCHES.current
        assert self.layer is not None
        names = self.layer.active_adapters if batch is None else batch.samples
        return [name for name in names if name in self.invocations]

    def _new_call(
        self, model: nn.Module, arguments: Mapping[str, object], names: list[str]
    ) -> ActiveCall:
        """Return the call of a forward by itself."""
        call = ActiveCall(self, call_rows(model, arguments, CALL_ARGUMENTS))
        ids, sizes = token_ids(arguments), rows_and_tokens(arguments)
        given, carried = arguments.get("alora_offsets"), carried_starts(arguments)
        if sizes is None or (ids is None and given is None and not carried):
            warn(
                "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling "
                "aLoRA for this forward pass. Pass `alora_offsets` to use it."
            )
            return call
        rows, tokens = sizes
        positions = arguments.get("position_ids")
        is_first = cache_of(arguments) is None
        if ids is not None and given is None and is_first and are_places(positions, tokens):
            for name in names:
                invocation = self._invocation(name, ids.device)
                call.masks[name] = active_tokens_of_texts(ids, invocation, positions)
                call.starts[name] = torch.where(call.masks[name][:, -1], 0, NEVER)
        else:
            seen = tokens_seen(arguments, tokens)
            starts = self._starts(arguments, names, ids, seen)
            for name in names:
                start = starts.get(name)
                if name in carried:
                    in_cache = for_rows(carried[name], rows)
                    # A cache that was cropped or reset no longer has the invocation.
                    in_cache = torch.where(in_cache < seen, in_cache, NEVER)
                    start = (
                        in_cache if start is None else torch.where(start < NEVER, start, in_cache)
                    )
                if start is not None:
                    call.starts[name] = start
                    call.masks[name] = active_tokens(start, tokens, seen)
        self._choose(call)
        return call

    def _step(
        self, outer: ActiveCall, arguments: Mapping[str, object], names: list[str]
    ) -> ActiveCall:
        """Return the call of a forward inside `generate`."""
        sizes, shapes = rows_and_tokens(arguments), argument_shapes(arguments)
        if sizes is None:
            return ActiveCall(self, outer.rows.nested(shapes, is_generating=True))
        rows, tokens = sizes
        seen = tokens_seen(arguments, tokens)
        is_late = tokens == 1 and isinstance(seen, int) and seen >= (outer.length or 0)
        if is_late and outer.later is not None and outer.later.rows.rows == rows:
            return outer.later
        call = ActiveCall(self, outer.rows.nested(shapes, is_generating=True))
        for name in names:
            if name in outer.starts:
                call.starts[name] = for_rows(outer.starts[name], rows)
                call.masks[name] = active_tokens(call.starts[name], tokens, seen)
        self._choose(call)
        if is_late:
            outer.later = call
        return call

    def _starts(
        self,
        arguments: Mapping[str, object],
        names: list[str],
        ids: Tensor | None,
        seen: int | Tensor,
    ) -> dict[str, Tensor]:
        """Return the starts of adapters, counted from the beginning of the text."""
        given, sizes = arguments.get("alora_offsets"), rows_and_tokens(arguments)
        if given is not None and sizes is not None:
            device = next(v.device for v in arguments.values() if isinstance(v, Tensor))
            starts = dict.fromkeys(names, starts_of_offsets(given, *sizes, device))
        elif ids is not None:
            starts = {n: invocation_starts(ids, self._invocation(n, ids.device)) for n in names}
        else:
            return {}
        if isinstance(seen, int) and seen == 0:
            return starts
        return {n: torch.where(s < NEVER, s + seen, NEVER) for n, s in starts.items()}

    def _invocation(self, name: str, device: torch.device) -> Tensor:
        """Return an adapter's invocation on a device, moved there once."""
        if torch.compiler.is_compiling():
            return torch.tensor(self.invocations[name], device=device)
        if (name, device) not in self._tensors:
            self._tensors[name, device] = torch.tensor(self.invocations[name], device=device)
        return self._tensors[name, device]

    def _choose(self, call: ActiveCall) -> None:
        """Set the mask of each row's own adapter; other adapters act on all of their rows."""
        batch = ADAPTER_BATCHES.current
        if batch is None or batch.only is not None or not call.masks:
            return
        for name, mask in call.masks.items():
            runs_it = for_rows(_has_adapter(batch, name, mask.device), mask.shape[0])
            mask = mask | ~runs_it[:, None]
            call.chosen = mask if call.chosen is None else call.chosen & mask


def row_scales(
    layer: BaseTunerLayer,
    adapter_name: str | None,
    x: Tensor,
    dtype: torch.dtype,
    scale: float | Tensor = 1.0,
    flat: bool = False,
) -> Tensor | float:
    """Return `ActiveCall.scales` of the call in progress; 0.0 outside a call of the model."""
    call = ACTIVE_CALLS.current
    return 0.0 if call is None else call.scales(layer, adapter_name, x, dtype, scale, flat)


def on_all_rows() -> AbstractContextManager[object]:
    """Return a context in which adapters act on all rows, for a layer that selects them itself."""
    return ACTIVE_CALLS.during(ActiveCall(None, CallRows(None), acts_on_all=True))


def _forward(method: MethodCall) -> object:
    activation = vars(method.module).get(_ACTIVATION)
    return method.run(CALL_ARGUMENTS) if activation is None else activation.forward(method)


def _generate(method: MethodCall) -> object:
    activation = vars(method.module).get(_ACTIVATION)
    return method.run(CALL_ARGUMENTS) if activation is None else activation.generate(method)


def _has_adapter(batch: AdapterBatch, name: str, device: torch.device) -> Tensor:
    """Return which samples of a batch run with an adapter, `[samples]`."""
    own = set(batch.samples[name])
    flags = tuple(int(sample in own) for sample in range(batch.size))
    return batch.index_tensor(flags, device).bool()
