# SPDX-License-Identifier: Apache-2.0
"""Pass `task_ids` from a call of a model to its layers that route.

A base model does not pass `task_ids` on to its layers, so they are kept beside the call:

1. `Routing.attach` wraps the methods by which a model is called: its `forward` and `generate`, and
   the `forward` of parts that are called directly (an encoder, a language model inside it).
2. Each wrapped method, and a layer called by itself, makes one `RoutedCall` of its arguments: the
   checked task ids, the numbers of rows, the prompt tokens. A forward inside another call, each
   step of `generate` for example, has that call's task ids and its own numbers of rows.
3. `Routing.stack` keeps the call while it runs, and again while backward recomputes its layers.
4. A layer asks `Routing.tasks` for the task of each of its rows; if its adapter routes by input, it
   asks `Routing.chosen_by_input` for the choice of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ...base.calls.adapter_batch import ADAPTER_BATCHES, AdapterBatch
from ...base.calls.arguments import argument_shapes, entry_modules, generation_option
from ...base.calls.rows import IN_ORDER, CallRows, RowOwners, call_rows, generation_rows
from ...base.calls.stack import CallStack
from ...base.calls.wrapped_methods import (
    Handler,
    MethodCall,
    is_wrapped,
    unwrap_methods,
    wrap_method,
)
from ...base.containers import walk
from ...base.errors import PeftNotSupportedError, PeftValueError
from ...base.tracing import shapes
from ..layer import BaseTunerLayer
from .pooling import pool
from .prompt_tokens import ANSWERED, PromptTokens, owners_by_input
from .task_ids import HasTasks, as_task_ids, has_values

# Arguments of a call that are for the routing and not for the base model.
CALL_ARGUMENTS = ("task_ids", "routing_mask")
# The attribute of a module with wrapped methods that holds its routing. A deep copy of the module
# has its own, while functions that a client has bound again are shared with the copy.
_ROUTING = "_peft_routing"
# Likely wrong names of `task_ids`, for the message that they are missing.
_MISNAMED = ("task_id", "tasks", "task", "task_names", "task_name", "taskids")


class RoutingConfig(HasTasks, Protocol):
    """The members of an adapter's config that routing reads."""

    task_type: str | None

    @property
    def routes_by_input(self) -> bool:
        """True if a layer routes by its input."""

    @property
    def routing_level(self) -> str:
        """The input that routes: each "token", the prompt of a "sample", or all tokens of a
        "sequence".
        """

    def reads_task_ids(self, training: bool) -> bool:
        """Return whether a layer routes by the task ids of a call."""


class TaskRows(NamedTuple):
    """The tasks of a layer's rows.

    Attributes:
        ids: `[samples]`, or `[1]` for one task.
        owners: The sample of each row.
    """

    ids: Tensor
    owners: RowOwners


@dataclass(eq=False)
class RoutedCall:
    """A call of the model in progress.

    Args:
        rows: The numbers of samples, rows and tokens.
        prompt: The tokens that route a sample, where routing is by input.
        task_ids: `[samples]` or `[1]`, checked; None if no adapter routes by task.
        choices: In `generate`, the choice for the prompt by id of the layer and name of the
            adapter, which later tokens reuse; None in other calls.
    """

    rows: CallRows
    prompt: PromptTokens
    task_ids: Tensor | None = None
    choices: dict[tuple[int, str], tuple[Tensor, ...]] | None = None

    @cached_property
    def has_one_task(self) -> bool:
        """True if all samples have the same task; reading it waits for the device."""
        ids = self.task_ids
        return ids is not None and bool((ids == ids[:1]).all())


class Routing:
    """The routing of one model's adapters, shared by its layers.

    Attributes:
        configs: Config of each adapter that routes, by name.
        layer: One of the layers, to read which adapters are active; None before the first.
        merged_tasks: The tasks for which an adapter is merged, by name of the adapter.
        is_encoder_decoder, is_causal: The kind of model.
        stack: The calls in progress.
        recorded: Task ids of the calls inside `recording`; None outside it.
        watches: The readers that ask for `real_tokens` now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.configs: dict[str, RoutingConfig] = {}
        self.layer: BaseTunerLayer | None = None
        self.merged_tasks: dict[str, list[int]] = {}
        self._merged_layers: dict[BaseTunerLayer, dict[str, int]] = {}
        config = getattr(model, "config", None)
        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        can_generate = getattr(model, "can_generate", None)
        named = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        self.is_causal = not self.is_encoder_decoder and (
            named or (callable(can_generate) and bool(can_generate()))
        )
        self.stack: CallStack[RoutedCall] = CallStack()
        self.recorded: list[Tensor] | None = None
        self.watches: list[object] = []

    def attach(
        self, model: nn.Module, adapter_name: str, config: RoutingConfig, layer: BaseTunerLayer
    ) -> None:
        """Add an adapter; with the first, wrap the methods by which the model is called."""
        if self.layer is None:
            _unwrap(model)
            parts = [module for module in entry_modules(model) if module is not model]
            for part in parts:
                self._wrap(part, "forward", (), _forward)
            body = getattr(model, "base_model", None)
            if isinstance(body, nn.Module) and all(body is not m for m in (model, *parts)):
                self._wrap(body, "forward", (), _body_forward)
            self._wrap(model, "forward", CALL_ARGUMENTS, _forward)
            self._wrap(model, "generate", CALL_ARGUMENTS, _generate)
        self.configs[adapter_name] = config
        self.layer = layer
        self.is_causal |= config.task_type == "CAUSAL_LM"

    def detach(self, model: nn.Module) -> None:
        """Remove all adapters, and give the model its own methods back."""
        _unwrap(model)
        self.configs.clear()
        self.layer = None

    def ensure_wrapped(self, model: nn.Module) -> None:
        """Wrap the model's `forward` again if a client has replaced it, as TRL does."""
        can_wrap = self.layer is not None and not torch.compiler.is_compiling()
        if can_wrap and not is_wrapped(model, "forward"):
            self._wrap(model, "forward", CALL_ARGUMENTS, _forward)

    def _wrap(
        self, module: nn.Module, method: str, names: tuple[str, ...], handler: Handler
    ) -> None:
        vars(module)[_ROUTING] = self
        wrap_method(module, method, names, handler)

    def forward(self, method: MethodCall) -> object:
        """Run a forward of the model, or of a part of it, as a call."""
        if self.layer is None:  # a client still holds the method of a model without adapters
            return method.run()
        arguments, outer = method.arguments(), self._enclosing(method.module)
        if outer is None or _has_own(method):
            rows = call_rows(method.module, arguments, CALL_ARGUMENTS)
            call = self._new_call(method.module, arguments, rows)
            if self._pools:
                call.prompt.update(arguments, rows, is_nested=False)
            return self.stack.run(call, lambda: method.run(CALL_ARGUMENTS))
        rows = outer.rows.nested(argument_shapes(arguments), outer.choices is not None)
        call = RoutedCall(rows, outer.prompt.copy(), outer.task_ids, outer.choices)
        if self._pools and not outer.choices:
            call.prompt.update(arguments, rows, is_nested=True)
        with self.stack.during(call):
            return method.run(CALL_ARGUMENTS)

    def body_forward(self, method: MethodCall) -> object:
        """Run a forward of the model's body; it is a call only if it is given `task_ids`.

        The model's own forward takes them out. A client's replacement of it, which fuses head and
        loss, passes them on to the body.
        """
        return self.forward(method) if _has_own(method) else method.run()

    def generate(self, method: MethodCall) -> object:
        """Run `generate` as a call."""
        model, arguments, has_own = method.module, method.arguments(), _has_own(method)
        outer = self._enclosing(model)
        if self.layer is None or not (outer is None or outer.choices is None or has_own):
            return method.run()
        rows = generation_rows(model, arguments, CALL_ARGUMENTS)
        if outer is None or has_own:
            call = self._new_call(model, arguments, rows)
        else:
            call = RoutedCall(outer.rows, outer.prompt, outer.task_ids)
        call.choices = {}
        if self._pools:
            if generation_option(model, arguments, "prefill_chunk_size") is not None:
                raise PeftNotSupportedError(
                    "Routing by input decides by the whole prompt, which `prefill_chunk_size` cuts "
                    "up; leave that out, or use `routing_level='token'`."
                )
            call.prompt = PromptTokens(self.is_causal, self.is_encoder_decoder)
            call.prompt.update(arguments, rows, is_nested=False)
            call.prompt.length = None if self.is_encoder_decoder else rows.tokens("main")
        return self.stack.run(call, lambda: method.run(CALL_ARGUMENTS))

    def layer_call(self, task_ids: object, x: Tensor) -> AbstractContextManager[RoutedCall]:
        """Return the context of a call of one layer by itself."""
        arguments = {"x": x, "task_ids": task_ids}
        rows = call_rows(None, arguments, CALL_ARGUMENTS)
        rows.fixed = IN_ORDER
        return self.stack.during(self._new_call(None, arguments, rows))

    def subset(self, samples: list[int], owner: Tensor | None) -> AbstractContextManager[object]:
        """Return a context in which the current call has only the samples of some indices. `owner`
        is the sample of each row of the layer's input; None if each has as many consecutive rows.
        """
        call = self.stack.current
        if call is None:
            return nullcontext()
        ids = call.task_ids
        ids = ids if ids is None or ids.shape[0] == 1 else ids[samples]
        if owner is not None:
            place = torch.zeros(call.rows.samples or 0, dtype=torch.long, device=owner.device)
            place[samples] = torch.arange(len(samples), device=owner.device)
            owner = place[owner]
        prompt = call.prompt.copy()
        for stream, mask in prompt.masks.items():
            each = mask.shape[0] // (call.rows.samples or 1)
            prompt.masks[stream] = mask[[s * each + i for s in samples for i in range(each)]]
        rows = call.rows.subset(len(samples), RowOwners(owner=owner))
        return self.stack.during(RoutedCall(rows, prompt, ids, call.choices))

    def padded(self, mask: Tensor, stream: str) -> AbstractContextManager[object]:
        """Return a context in which samples of a stream are padded: `mask [rows, tokens]` is true
        at real tokens.
        """
        call = self.stack.current or RoutedCall(CallRows(None), PromptTokens())
        prompt = call.prompt.copy()
        prompt.masks[stream] = prompt.masks[stream + ANSWERED] = mask
        return self.stack.during(replace(call, prompt=prompt))

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Context that yields a list of the task ids of each call in it."""
        before, self.recorded = self.recorded, []
        try:
            yield self.recorded
        finally:
            self.recorded = before

    def note_merges(self, layer: BaseTunerLayer, tasks: dict[str, int]) -> None:
        """Store the task for which each merged adapter of a layer is merged."""
        self._merged_layers.pop(layer, None)
        if tasks:
            self._merged_layers[layer] = tasks
        pairs = [pair for merged in self._merged_layers.values() for pair in merged.items()]
        self.merged_tasks = {
            name: sorted({task for other, task in pairs if other == name}) for name, _ in pairs
        }

    def tasks(self, x: Tensor, layer: BaseTunerLayer, n_tasks: int) -> TaskRows:
        """Return the tasks of the rows of a layer's input `[rows, *leading, in]`."""
        call = self.stack.current
        if call is None or call.task_ids is None:
            if n_tasks == 1:
                return TaskRows(torch.zeros(1, dtype=torch.long, device=x.device), IN_ORDER)
            raise PeftValueError(
                "task_ids should not be None: pass them to the model's call, one id for each "
                "sample."
            )
        ids, samples = call.task_ids, call.rows.samples
        ids = ids if ids.device == x.device else ids.to(x.device)
        is_one = shapes(ids)[0][0] == 1
        if not is_one or (layer.training and samples):  # in training each sample draws its gates
            owners = call.rows.owners(x, layer.layout)
            if owners is not None:
                return TaskRows(ids.expand(samples or 0) if is_one else ids, owners)
            if not is_one and (torch.compiler.is_compiling() or not call.has_one_task):
                raise call.rows.error(x, layer, "Give all samples of a call the same task")
        return TaskRows(ids[:1], IN_ORDER)

    def chosen_by_input(
        self,
        x: Tensor,
        layer: BaseTunerLayer,
        adapter_name: str,
        decide: Callable[[Tensor], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """Return the choice for the rows of a layer's input `[rows, *leading, in]`, routed by their
        prompts or sequences. `decide` returns tensors `[samples, …]`, of weights for example, for
        the mean over these, `[samples, in]`.
        """
        call = self.stack.current
        if call is None:
            return decide(pool(x))
        rows = call.rows.by_row()
        owners = owners_by_input(x, layer, rows, call.rows.samples)
        stream, kept = layer.layout.stream, call.choices
        config = self.configs.get(adapter_name)
        if config is not None and config.routing_level == "sequence":
            stream += ANSWERED
        if kept is None:  # no `id` here, which the compiler would take for a constant of each layer
            chosen = decide(call.prompt.pool(x, stream, rows, owners))
        else:
            key = id(layer), adapter_name
            if key not in kept:
                kept[key] = decide(call.prompt.pool(x, stream, rows, owners))
            chosen = kept[key]
        return tuple([owners.expand(values, x) for values in chosen])

    def real_tokens(self, x: Tensor, layer: BaseTunerLayer) -> Tensor | None:
        """Return a mask of a layer's input `[rows, tokens, in]`, true at real tokens, in a call
        with `watches`; None if all are, or it is unknown.
        """
        call = self.stack.current
        mask = None if call is None else call.prompt.masks.get(layer.layout.stream + ANSWERED)
        if mask is None or x.dim() != 3 or mask.shape[0] != x.shape[0]:
            return None
        return mask[:, -x.shape[1] :] if mask.shape[1] >= x.shape[1] else None

    @property
    def _pools(self) -> bool:
        """True if any adapter routes a sample by the mean of its prompt."""
        return bool(self.watches) or any(
            config.routes_by_input and config.routing_level != "token"
            for config in tuple(self.configs.values())  # other threads may add adapters
        )

    def _enclosing(self, module: nn.Module) -> RoutedCall | None:
        """Return the call that a call of `module` lies in.

        Backward recomputes parts of a model. If it runs the model itself, that is another call.
        """
        call = self.stack.current
        return self.stack.running if call is not None and call.rows.root is module else call

    def _new_call(
        self, model: nn.Module | None, arguments: Mapping[str, object], rows: CallRows
    ) -> RoutedCall:
        """Return a call with its task ids checked."""
        call = RoutedCall(rows, PromptTokens(self.is_causal, self.is_encoder_decoder))
        if self.layer is None or self.layer.disable_adapters:
            return call
        ids = call.task_ids = self._checked_task_ids(model, arguments, rows.samples, self.layer)
        if ids is None:
            return call
        if self.recorded is not None and not torch.compiler.is_compiling() and has_values(ids):
            self.recorded.append(ids)
        if rows.samples is None and (count := shapes(ids)[0][0]) > 1:
            rows.samples = count
        return call

    def _checked_task_ids(
        self,
        model: nn.Module | None,
        arguments: Mapping[str, object],
        samples: int | None,
        layer: BaseTunerLayer,
    ) -> Tensor | None:
        """Return the task ids of a call as a tensor, None if no active adapter routes by task."""
        task_ids, misnamed = arguments.get("task_ids"), None
        if task_ids is None:
            misnamed = next((name for name in _MISNAMED if name in arguments), None)
        tensors = (
            value
            for name, value in arguments.items()
            if isinstance(value, Tensor) and name not in CALL_ARGUMENTS
        )
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        active: Iterable[str] = layer.active_adapters
        if self.merged_tasks:
            self._check_merged(task_ids, active, samples, device)
            if task_ids is None:
                active = [name for name in active if name not in self.merged_tasks]
        batch = ADAPTER_BATCHES.current
        if batch is not None and not self.merged_tasks:
            return self._ids_by_adapter(task_ids, batch, device, misnamed)
        by_task = self._by_task(active)
        if by_task and (task_ids is not None or self._has_layers(model)):
            return as_task_ids(task_ids, by_task, samples, device, misnamed=misnamed)
        return None

    def _has_layers(self, model: nn.Module | None) -> bool:
        """Return whether any layer is still in the model; clients may put the base layers back."""
        modules = [self.layer] if model is None else (module for _, module in walk(model))
        return any(vars(module).get("routing") is self for module in modules)

    def _by_task(self, adapter_names: Iterable[str]) -> list[RoutingConfig]:
        """Return the configs of the adapters that route by task."""
        known = (self.configs[name] for name in adapter_names if name in self.configs)
        training = self.layer is not None and self.layer.training
        return [config for config in known if config.reads_task_ids(training)]

    def _ids_by_adapter(
        self, task_ids: object, batch: AdapterBatch, device: torch.device, misnamed: str | None
    ) -> Tensor | None:
        """Return task ids where each sample has an adapter; 0 if that does not route by task."""
        if not self._by_task(batch.samples):
            return None
        each = _one_by_one(task_ids)
        if each is not None and len(each) != batch.size:
            raise PeftValueError(
                f"`task_ids` has {len(each)} entries; expected {batch.size}, one for each sample."
            )
        result = torch.zeros(batch.size, dtype=torch.long, device=device)
        for name, samples in batch.samples.items():
            for config in self._by_task([name]):
                own = task_ids
                if each is not None:
                    own = each[samples] if isinstance(each, Tensor) else [each[i] for i in samples]
                result[samples] = as_task_ids(
                    own, [config], len(samples), device, misnamed=misnamed
                )
        return result

    def _check_merged(
        self, task_ids: object, active: Iterable[str], samples: int | None, device: torch.device
    ) -> None:
        """Check that task ids are those that are merged into the weights.

        If active adapters read the ids, only merged adapters among these are checked.
        """
        if task_ids is None:
            return
        reading = [name for name in active if self._by_task([name])]
        for name, tasks in self.merged_tasks.items():
            if reading and name not in reading:
                continue
            ids = as_task_ids(task_ids, [self.configs[name]], samples, device)
            same = ids == (tasks[0] if len(tasks) == 1 else -1)
            message = (
                f"Task {' or '.join(map(str, tasks))} is merged into the weights; call "
                "`unmerge_adapter` before using other tasks."
            )
            if torch.compiler.is_compiling():
                torch._assert_async(same.all(), message)
            elif not torch._C._functorch.is_functorch_wrapped_tensor(same) and not same.all():
                raise PeftValueError(message)


def _one_by_one(task_ids: object) -> Tensor | list[object] | None:
    """Return task ids in a list, an array or a tensor as they come; None for one id for all."""
    if isinstance(task_ids, (str, bytes, Set, Mapping)) or not getattr(task_ids, "ndim", 1):
        return None
    if isinstance(task_ids, Tensor):
        return task_ids if len(task_ids) != 1 else None
    if isinstance(task_ids, Collection) and len(task_ids) != 1:
        return list(task_ids)
    return None


def _unwrap(model: nn.Module) -> None:
    """Unwrap the methods of a model, also those that a `Routing` without layers wrapped."""
    unwrap_methods(model, _forward, _body_forward, _generate)
    for _, module in walk(model):
        vars(module).pop(_ROUTING, None)  # a client may still hold a method; it then just runs


def _forward(method: MethodCall) -> object:
    return (vars(method.module).get(_ROUTING) or Routing(method.module)).forward(method)


def _body_forward(method: MethodCall) -> object:
    return (vars(method.module).get(_ROUTING) or Routing(method.module)).body_forward(method)


def _generate(method: MethodCall) -> object:
    return (vars(method.module).get(_ROUTING) or Routing(method.module)).generate(method)


def _has_own(method: MethodCall) -> bool:
    """Return whether a call is given arguments for the routing."""
    return any(name in method.kwargs for name in CALL_ARGUMENTS)
