# SPDX-License-Identifier: Apache-2.0
"""What Poly's layers need to know of the call that runs them: which task each sample has, which
tokens are its prompt.

A base model does not hand `task_ids` down to its layers, so they travel beside it. One `Routing`
belongs to a model and is read by all its layers. The model's own `forward`, as it is called, takes
the arguments out of the call, checks them once and puts them in place for as long as it runs;
`generate` does the same for all the forwards it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...base.calls.adapter_batch import ADAPTER_BATCHES, AdapterBatch
from ...base.calls.arguments import argument_shapes, bind_arguments, generation_option
from ...base.calls.rows import IN_ORDER, CallRows, RowOwners, call_rows, generation_rows
from ...base.calls.stack import CallStack
from ...base.containers import walk
from ...base.errors import PeftNotSupportedError, PeftValueError
from ...base.tracing import shapes
from .deciding import Deciding
from .pooling import pool
from .task_ids import as_task_ids, has_values

# Arguments of a call that are for the routing and not for the model.
CALL_ARGUMENTS = ("task_ids", "routing_mask")
# Arguments by which a call that has no `task_ids` probably means them.
_MISNAMED = ("task_id", "tasks", "task", "task_names", "task_name", "taskids")


@dataclass(eq=False)
class Call:
    """One call of the model.

    Args:
        rows: What it knows of its rows.
        deciding: The tokens that decide where the input routes.
        task_ids: `[samples]` or `[1]`, checked; None where no adapter routes by task.
        decisions: In `generate`, the weights each layer chose when it saw the prompt; None in a
            plain forward.
    """

    rows: CallRows
    deciding: Deciding
    task_ids: Tensor | None = None
    decisions: dict[tuple[int, str], Tensor] | None = None

    @cached_property
    def has_one_task(self) -> bool:
        """Whether all samples have the same task. To know it waits for the device."""
        ids = self.task_ids
        return (
            ids is not None and not torch.compiler.is_compiling() and bool((ids == ids[:1]).all())
        )


class Routing:
    """The calls in progress on one model.

    Attributes:
        configs: Config of every Poly adapter on the model, by name.
        probe: Any of the layers, to see which adapters are active.
        merged_tasks: By name of the adapters that are merged somewhere, the tasks they were merged
            for.
        is_encoder_decoder, is_causal: What kind of model it is.
        noted: Task ids of calls that began while `noting`; None at other times.
    """

    def __init__(self, model: nn.Module) -> None:
        self.configs: dict[str, Any] = {}
        self.probe: Any = None
        self.merged_tasks: dict[str, list[int]] = {}
        self._merged_layers: dict[Any, dict[str, int]] = {}
        config = getattr(model, "config", None)
        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        writes = getattr(model, "can_generate", None)
        named = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        self.is_causal = not self.is_encoder_decoder and (
            named or (callable(writes) and bool(writes()))
        )
        self.stack: CallStack[Call] = CallStack()
        self.noted: list[Tensor] | None = None

    @property
    def call(self) -> Call | None:
        """The innermost call in progress, or the one whose backward is."""
        return self.stack.current

    @property
    def pools(self) -> bool:
        """Whether any adapter routes by a sample's input."""
        return any(
            config.routes_by_input and config.routing_level != "token"
            for config in self.configs.values()
        )

    @contextmanager
    def noting(self) -> Iterator[list[Tensor]]:
        """A context that gives the task ids of the calls that begin in it, where they can be read."""
        before, self.noted = self.noted, []
        try:
            yield self.noted
        finally:
            self.noted = before

    def note_merges(self, layer: Any, tasks: dict[str, int]) -> None:
        """Take note of the adapters that a layer has merged, each for a task."""
        self._merged_layers.pop(layer, None)
        if tasks:
            self._merged_layers[layer] = tasks
        every = [pair for own in self._merged_layers.values() for pair in own.items()]
        self.merged_tasks = {
            name: sorted({task for other, task in every if other == name}) for name, _ in every
        }

    def forward(
        self,
        function: Any,
        model: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: tuple[str, ...],
        part: bool = False,
    ) -> Any:
        """A forward of the model, or of a part of it that is called by itself too, as a call of its
        own. Without arguments of its own it is for the samples of the call that it lies in.
        """
        arguments = bind_arguments(names, args, kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in CALL_ARGUMENTS}
        outer = (
            self.stack.current if part else self.stack.running
        )  # a part may be among what backward runs again
        if outer is None or any(name in kwargs for name in CALL_ARGUMENTS):
            call = self._begin(model, arguments, call_rows(model, arguments, CALL_ARGUMENTS))
            if self.pools:
                call.deciding.note(arguments, call.rows, False, self.is_encoder_decoder)
            return self.stack.run(call, lambda: function(model, *args, **rest))
        rows = outer.rows.nested(
            argument_shapes(arguments), is_generating=outer.decisions is not None
        )
        call = Call(rows, outer.deciding.inside(), outer.task_ids, outer.decisions)
        if self.pools and not outer.decisions:
            call.deciding.note(arguments, rows, True, self.is_encoder_decoder)
        with self.stack.during(call):
            return function(model, *args, **rest)

    @contextmanager
    def generating(self, model: Any, arguments: dict[str, Any]) -> Iterator[None]:
        """A call of `generate` in progress.

        Raises:
            PeftNotSupportedError: Routing by input can't know the prompt when it has to decide.
        """
        own = any(name in arguments for name in CALL_ARGUMENTS)
        outer = self.stack.running
        if outer is not None and outer.decisions is not None and not own:
            yield  # a `PeftModel` began this call
            return
        rows = generation_rows(model, arguments, CALL_ARGUMENTS)
        call = (
            self._begin(model, arguments, rows)
            if outer is None or own
            else Call(outer.rows, outer.deciding, outer.task_ids)
        )
        call.decisions = {}
        if self.pools:
            if generation_option(model, arguments, "prefill_chunk_size") is not None:
                raise PeftNotSupportedError(
                    "Routing by input decides by the whole prompt, which `prefill_chunk_size` cuts "
                    "up; leave that out, or use "
                    "`routing_level='token'`."
                )
            call.deciding = Deciding(self.is_causal)
            call.deciding.note(arguments, rows, False, self.is_encoder_decoder)
            call.deciding.prompt = None if self.is_encoder_decoder else rows.tokens("main")
        with self.stack.during(call):
            yield

    def using(self, task_ids: Any, x: Tensor) -> AbstractContextManager[Call]:
        """A call of one layer by itself."""
        arguments = {"x": x, "task_ids": task_ids}
        rows = call_rows(None, arguments, CALL_ARGUMENTS)
        rows.fixed = IN_ORDER
        return self.stack.during(self._begin(None, arguments, rows))

    def narrowed(self, samples: list[int], owner: Tensor | None) -> AbstractContextManager[Any]:
        """The present call as a layer's adapter sees it that some of the samples run with.

        Args:
            samples: Their numbers.
            owner: The number of each row's sample; None where each sample has the same number of
                rows, one after the other.
        """
        call = self.call
        if call is None:
            return nullcontext()
        ids = call.task_ids
        ids = ids if ids is None or ids.shape[0] == 1 else ids[samples]
        if owner is not None:
            place = torch.zeros(call.rows.samples or 0, dtype=torch.long, device=owner.device)
            place[samples] = torch.arange(len(samples), device=owner.device)
            owner = place[owner]
        deciding = call.deciding.inside()
        for stream, mask in deciding.masks.items():
            each = mask.shape[0] // (call.rows.samples or 1)
            deciding.masks[stream] = mask[
                [sample * each + i for sample in samples for i in range(each)]
            ]
        return self.stack.during(
            Call(
                call.rows.subset(len(samples), RowOwners(owner=owner)),
                deciding,
                ids,
                call.decisions,
            )
        )

    def masked(self, mask: Tensor, stream: str) -> AbstractContextManager[Any]:
        """Begin the present call anew for a layer that sees samples padded, with a mask of tokens."""
        call = self.call or Call(CallRows(None), Deciding())
        deciding = call.deciding.inside()
        deciding.masks[stream] = mask
        return self.stack.during(replace(call, deciding=deciding))

    def _begin(self, model: Any, arguments: Mapping[str, Any], rows: CallRows) -> Call:
        """A call with its task ids checked.

        Raises:
            PeftTypeError: Task ids of a wrong type.
            PeftValueError: Task ids missing, of a wrong number, or out of range.
        """
        call = Call(rows, Deciding(self.is_causal))
        if self.probe is None or self.probe.disable_adapters:
            return call
        task_ids = arguments.get("task_ids")
        misnamed = (
            next((name for name in _MISNAMED if name in arguments), None)
            if task_ids is None
            else None
        )
        tensors = (
            value
            for name, value in arguments.items()
            if isinstance(value, Tensor) and name not in CALL_ARGUMENTS
        )
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        chosen = ADAPTER_BATCHES.current
        active = self.probe.active_adapters
        if self.merged_tasks:
            self._check_merged(task_ids, active, rows.samples, device)
            if task_ids is None:
                active = [name for name in active if name not in self.merged_tasks]
        if chosen is not None and not self.merged_tasks:
            call.task_ids = self._ids_by_adapter(task_ids, chosen, device, misnamed)
        elif (by_task := self._by_task(active)) and (
            task_ids is not None or self._has_layers(model)
        ):
            call.task_ids = as_task_ids(task_ids, by_task, rows.samples, device, misnamed=misnamed)
        if (
            self.noted is not None
            and call.task_ids is not None
            and not torch.compiler.is_compiling()
            and has_values(call.task_ids)
        ):
            self.noted.append(call.task_ids)
        if (
            rows.samples is None
            and call.task_ids is not None
            and (count := shapes(call.task_ids)[0][0]) > 1
        ):
            rows.samples = count
        return call

    def _has_layers(self, model: Any) -> bool:
        """Whether any of the layers are still in the model: some clients put the layers below them
        back by themselves.
        """
        inner = (
            (module for _, module in walk(model))
            if isinstance(model, nn.Module)
            else iter([self.probe])
        )
        return any(vars(module).get("routing") is self for module in inner)

    def _by_task(self, adapter_names: Iterable[str]) -> list[Any]:
        """Configs of those of the adapters that route by task."""
        known = (self.configs[name] for name in adapter_names if name in self.configs)
        return [config for config in known if config.routes_by_task]

    def _ids_by_adapter(
        self, task_ids: Any, chosen: AdapterBatch, device: torch.device, misnamed: str | None
    ) -> Tensor | None:
        """Task ids where each sample has an adapter of its own; those of samples whose adapter has
        no tasks are not looked at.
        """
        if not self._by_task(chosen.samples):
            return None
        several = isinstance(task_ids, (list, tuple)) or (
            isinstance(task_ids, Tensor) and task_ids.dim() > 0
        )
        several = several and len(task_ids) != 1
        if several and len(task_ids) != chosen.size:
            raise PeftValueError(
                f"`task_ids` has {len(task_ids)} entries; expected {chosen.size}, one for each "
                "sample."
            )
        result = torch.zeros(chosen.size, dtype=torch.long, device=device)
        for name, samples in chosen.samples.items():
            for config in self._by_task([name]):
                own = task_ids
                if several:
                    own = (
                        task_ids[samples]
                        if isinstance(task_ids, Tensor)
                        else [task_ids[i] for i in samples]
                    )
                result[samples] = as_task_ids(
                    own, [config], len(samples), device, misnamed=misnamed
                )
        return result

    def _check_merged(
        self, task_ids: Any, active: Iterable[str], batch: int | None, device: torch.device
    ) -> None:
        """Task ids in a call of a merged model must say what was merged; where active adapters read
        them, of those only.
        """
        if task_ids is None:
            return
        reading = self._by_task(active)
        for name in [
            name for name in self.merged_tasks if not reading or self.configs[name] in reading
        ]:
            tasks = self.merged_tasks[name]
            same = as_task_ids(task_ids, [self.configs[name]], batch, device) == (
                tasks[0] if len(tasks) == 1 else -1
            )
            message = f"Task {' or '.join(map(str, tasks))} is merged into the weights; call `unmerge_adapter` before using other tasks."
            if torch.compiler.is_compiling():
                torch._assert_async(same.all(), message)
            elif not torch._C._functorch.is_functorch_wrapped_tensor(same) and not same.all():
                raise PeftValueError(message)

    def share_by_input(self, x: Tensor, layer: Any) -> RowOwners:
        """How a layer's input is shared out among the rows of the forward, each of which decides
        for itself.

        Raises:
            PeftValueError: Nothing tells.
        """
        call = self.call
        if call is None:
            return IN_ORDER
        rows = call.rows.by_row()
        shared = rows.owners(x, layer.layout)
        mixes = x.dim() == 2 or shapes(x)[0][1] in (rows.samples, call.rows.samples)
        if (shared is None and mixes and rows.samples != 1) or (
            shared is not None and shared.owner is not None
        ):
            raise rows.error(x, layer, "Use `routing_level='token'`")
        return IN_ORDER if shared is None else shared

    def pooled(self, x: Tensor, layer: Any, shared: RowOwners) -> Tensor:
        """A layer's input `[rows, *leading, in]` averaged over the tokens that decide,
        `[samples, in]`.

        Raises:
            PeftValueError: The mask is for another number of tokens than the layer sees.
        """
        call = self.call
        if call is None:
            return pool(x, None)
        rows_of_call = call.rows.by_row()
        rows = rows_of_call.samples
        if shared.sequence_first:
            x = x.transpose(0, 1)
        sizes = shapes(x)[0]
        if len(sizes) == 2 and rows and sizes[0] != rows:
            x = x.view(rows, -1, sizes[1])  # the model flattened its tokens
        if x.dim() == 2:
            return x
        x = x.flatten(1, -2)
        return pool(x, call.deciding.mask_for(x, layer.layout.stream, rows_of_call))


def conduct_forward(
    function: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]
) -> Any:
    """A call of a model's forward."""
    routing: Routing | None = getattr(model, "_poly_routing", None)
    return (
        function(model, *args, **kwargs)
        if routing is None
        else routing.forward(function, model, args, kwargs, names)
    )


def conduct_part(
    function: Any, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]
) -> Any:
    """A call of the forward of a part that a model has called by itself."""
    routing: Routing | None = getattr(part, "_poly_routing", None)
    return (
        function(part, *args, **kwargs)
        if routing is None
        else routing.forward(function, part, args, kwargs, names, part=True)
    )


def conduct_body(
    function: Any, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]
) -> Any:
    """Begin a call where a model's body is given the routing's arguments. The model's own forward
    takes them out; what a client has put in its place, to fuse the head with a loss, hands them on.
    """
    if any(name in kwargs for name in CALL_ARGUMENTS):
        return conduct_part(function, part, args, kwargs, names)
    return function(part, *args, **kwargs)


def conduct_generate(
    function: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]
) -> Any:
    """A call of a model's `generate`."""
    routing: Routing | None = getattr(model, "_poly_routing", None)
    if routing is None:
        return function(model, *args, **kwargs)
    with routing.generating(model, bind_arguments(names, args, kwargs)):
        return function(
            model,
            *args,
            **{name: value for name, value in kwargs.items() if name not in CALL_ARGUMENTS},
        )
