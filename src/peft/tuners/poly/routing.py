# SPDX-License-Identifier: Apache-2.0
"""What Poly's layers need to know of the call that runs them: which task each sample has, which tokens are its prompt.

A base model does not hand `task_ids` down to its layers, so they travel beside it. One `Routing` belongs to a model and is read by
all its layers. The model's own `forward`, as it is called, takes the arguments out of the call, checks them once and puts them in
place for as long as it runs; `generate` does the same for all the forwards it runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.adapter_batch import ADAPTER_BATCHES, AdapterBatch, first_input
from ...utils.call_stack import CallStack
from ...utils.error import PeftTypeError, PeftValueError
from ...utils.walk import walk
from .._eager import shapes, untraced
from .pooling import pool, prompt_mask

# Arguments of a call that are for the routing and not for the model.
CALL_ARGUMENTS = ("task_ids", "routing_mask")
# Projections in a decoder that read the encoder's output.
_CROSS_ATTENTION = re.compile(r".*(EncDecAttention|encoder_attn|cross_?attn|crossattention)\b.*\.(k|v|k_proj|v_proj|key|value)")


@dataclass(eq=False)
class Call:
    """One call of the model.

    Args:
        task_ids: `[batch]` or `[1]`, checked; None where no adapter routes by task.
        batch: Number of samples, if known.
        masks: Tokens to pool over, `[batch, tokens]` by stream ("main", "decoder").
        decisions: In `generate`, the weights each layer chose when it saw the prompt; None in a plain forward.
    """

    task_ids: Tensor | None = None
    batch: int | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    decisions: dict[tuple[int, str], Tensor] | None = None


class Routing:
    """The calls in progress on one model.

    Attributes:
        configs: Config of every Poly adapter on the model, by name.
        probe: Any of the layers, to see which adapters are active.
        merged_tasks: By name of the adapters that are merged somewhere, the tasks they were merged for.
        is_encoder_decoder, is_causal: What kind of model it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.configs: dict[str, Any] = {}
        self.probe: Any = None
        self.merged_tasks: dict[str, list[int]] = {}
        self._merged_layers: dict[Any, dict[str, int]] = {}
        config = getattr(model, "config", None)
        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.is_causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        self.stack: CallStack[Call] = CallStack()

    @property
    def call(self) -> Call | None:
        """The innermost call in progress, or the one whose backward is."""
        return self.stack.current

    def note_merges(self, layer: Any, tasks: dict[str, int]) -> None:
        """Take note of the adapters that a layer has merged, each for a task."""
        self._merged_layers.pop(layer, None)
        if tasks:
            self._merged_layers[layer] = tasks
        every = [pair for own in self._merged_layers.values() for pair in own.items()]
        self.merged_tasks = {name: sorted({task for other, task in every if other == name}) for name, _ in every}

    # --- calls of the model and of its parts ------------------------------------------------------------------------------

    def forward(
        self, function: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], part: bool = False
    ) -> Any:
        """A forward of the model, or of a part of it that is called by itself too, as a call of its
        own. Without arguments of its own it is for the samples of the call that it lies in.
        """
        own = {name: kwargs[name] for name in CALL_ARGUMENTS if name in kwargs}
        rest = {name: value for name, value in kwargs.items() if name not in own}
        outer = self.stack.current if part else self.stack.running  # a part may be among what backward runs again
        if outer is None or own:
            call = self._begin(model, args, kwargs)
            self._see_masks(call, kwargs, nested=outer is not None)
            return self.stack.run(call, lambda: function(model, *args, **rest))
        call = Call(outer.task_ids, outer.batch, dict(outer.masks), outer.decisions)
        self._see_masks(call, kwargs, nested=True)
        with self.stack.during(call):
            return function(model, *args, **rest)

    def generate(self, function: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model's `generate`."""
        with self.generating(model, args, kwargs):
            return function(model, *args, **kwargs)

    @contextmanager
    def generating(self, model: Any, args: tuple[Any, ...], arguments: dict[str, Any]) -> Iterator[None]:
        """A call of `generate` in progress; takes the routing's arguments out of `arguments`."""
        own = any(name in arguments for name in CALL_ARGUMENTS)
        outer = self.stack.running
        if outer is not None and outer.decisions is not None and not own:
            yield  # a `PeftModel` began this call
            return
        call = self._begin(model, args, arguments) if outer is None or own else Call(outer.task_ids, outer.batch, dict(outer.masks))
        call.decisions = {}
        self._see_masks(call, arguments, nested=False)
        for name in CALL_ARGUMENTS:
            arguments.pop(name, None)
        with self.stack.during(call):
            yield

    def using(self, task_ids: Any, x: Tensor) -> AbstractContextManager[Call]:
        """A call of one layer by itself."""
        return self.stack.during(self._begin(None, (x,), {"task_ids": task_ids}))

    def narrowed(self, samples: list[int]) -> AbstractContextManager[Any]:
        """The present call as a layer's adapter sees it that some of the samples run with."""
        call = self.call
        if call is None:
            return nullcontext()
        ids = call.task_ids
        ids = ids if ids is None or ids.shape[0] == 1 else ids[samples]
        masks = {stream: mask[samples] for stream, mask in call.masks.items()}
        return self.stack.during(Call(ids, len(samples), masks, call.decisions))

    def masked(self, mask: Tensor, stream: str) -> AbstractContextManager[Any]:
        """Begin the present call anew for a layer that sees samples padded, with a mask of tokens."""
        call = self.call or Call()
        return self.stack.during(replace(call, masks={**call.masks, stream: mask}))

    # --- arguments ----------------------------------------------------------------------------------------------------

    def _begin(self, model: Any, args: tuple[Any, ...], arguments: Mapping[str, Any]) -> Call:
        """A call with its task ids checked.

        Raises:
            PeftTypeError: Task ids of a wrong type.
            PeftValueError: Task ids missing, of a wrong number, or out of range.
        """
        inputs = first_input(args, arguments, CALL_ARGUMENTS)
        with untraced():
            call = Call(batch=None if inputs is None else inputs.size(0))  # a nested one may have no `shape`
        if self.probe is None or self.probe.disable_adapters:
            return call
        task_ids = arguments.get("task_ids")
        device = inputs.device if inputs is not None else torch.device("cpu")
        chosen = ADAPTER_BATCHES.current
        active = self.probe.active_adapters
        if self.merged_tasks:
            self._check_merged(task_ids, active, call.batch, device)
            if task_ids is None:
                active = [name for name in active if name not in self.merged_tasks]
        if chosen is not None and not self.merged_tasks:
            call.task_ids = self._ids_by_adapter(task_ids, chosen, device)
        elif (by_task := self._by_task(active)) and (task_ids is not None or self._has_layers(model)):
            call.task_ids = as_task_ids(task_ids, by_task, call.batch, device)
        return call

    def _has_layers(self, model: Any) -> bool:
        """Whether any of the layers are still in the model: some clients put the layers below them back by themselves."""
        inner = (module for _, module in walk(model)) if isinstance(model, nn.Module) else iter([self.probe])
        return any(vars(module).get("routing") is self for module in inner)

    def _by_task(self, adapter_names: Iterable[str]) -> list[Any]:
        """Configs of those of the adapters that route by task."""
        known = (self.configs[name] for name in adapter_names if name in self.configs)
        return [config for config in known if config.routes_by_task]

    def _ids_by_adapter(self, task_ids: Any, chosen: AdapterBatch, device: torch.device) -> Tensor | None:
        """Task ids where each sample has an adapter of its own; those of samples whose adapter has no tasks are not looked at."""
        if not self._by_task(chosen.samples):
            return None
        several = isinstance(task_ids, (list, tuple)) or (isinstance(task_ids, Tensor) and task_ids.dim() > 0)
        several = several and len(task_ids) != 1
        if several and len(task_ids) != chosen.size:
            raise PeftValueError(f"`task_ids` has {len(task_ids)} entries; expected {chosen.size}, one for each sample.")
        result = torch.zeros(chosen.size, dtype=torch.long, device=device)
        for name, samples in chosen.samples.items():
            for config in self._by_task([name]):
                own = task_ids
                if several:
                    own = task_ids[samples] if isinstance(task_ids, Tensor) else [task_ids[i] for i in samples]
                result[samples] = as_task_ids(own, [config], len(samples), device)
        return result

    def _check_merged(self, task_ids: Any, active: Iterable[str], batch: int | None, device: torch.device) -> None:
        """Task ids in a call of a merged model must say what was merged; where active adapters read them, of those only."""
        if task_ids is None:
            return
        reading = self._by_task(active)
        for name in [name for name in self.merged_tasks if not reading or self.configs[name] in reading]:
            tasks = self.merged_tasks[name]
            same = as_task_ids(task_ids, [self.configs[name]], batch, device) == (tasks[0] if len(tasks) == 1 else -1)
            message = (
                f"Task {' or '.join(map(str, tasks))} is merged into the weights; call `unmerge_adapter` before using other tasks."
            )
            if torch.compiler.is_compiling():
                torch._assert_async(same.all(), message)
            elif not torch._C._functorch.is_functorch_wrapped_tensor(same) and not same.all():
                raise PeftValueError(message)

    def _see_masks(self, call: Call, arguments: Mapping[str, Any], nested: bool) -> None:
        """Note which tokens input routing may look at."""
        if not any(config.routes_by_input for config in self.configs.values()):
            return
        attention = _token_mask(arguments.get("attention_mask"))
        labels = arguments.get("labels")
        labels = labels if isinstance(labels, Tensor) and labels.dim() == 2 else None  # of other tasks, they name no tokens
        given = arguments.get("routing_mask")
        if given is not None:
            call.masks["main"] = _as_mask(given)
        elif attention is not None or not nested:
            mask = prompt_mask(attention, labels) if self.is_causal and labels is not None else attention
            call.masks.pop("main", None)
            if mask is not None:
                call.masks["main"] = mask
        if self.is_encoder_decoder:
            # All that is known of the answer when it is begun: the labels say where that is, by default after the first token.
            mask = _token_mask(arguments.get("decoder_attention_mask"))
            tokens = [t for t in (labels, arguments.get("decoder_input_ids"), mask) if isinstance(t, Tensor)]
            if tokens:
                call.masks["decoder"] = prompt_mask(mask, tokens[0] if labels is not None else torch.zeros_like(tokens[0]))

    # --- what layers ask ----------------------------------------------------------------------------------------------

    def pooled(self, x: Tensor, stream: str) -> Tensor:
        """A layer's input `[rows, *leading, in]` averaged over the tokens that may decide, `[samples, in]`.

        Raises:
            PeftValueError: The mask is for fewer tokens than the layer sees.
        """
        call = self.call
        mask = call.masks.get(stream) if call is not None else None
        if mask is None:
            return pool(x, None)
        if x.dim() == 2 and x.shape[0] == mask.numel() != mask.shape[0]:
            x = x.view(*mask.shape, x.shape[-1])  # the model flattened its tokens
        if x.dim() == 2:
            return x
        x = x.flatten(1, -2)
        tokens = x.shape[1]
        if mask.shape[1] < tokens:
            raise PeftValueError(
                f"The mask has {mask.shape[1]} tokens where a layer sees {tokens}; pass `routing_mask` of that length, or use "
                "`routing_level='token'`."
            )
        mask = mask[:, -tokens:].to(x.device)  # with a cache, a layer sees the last tokens only
        if mask.shape[0] != x.shape[0]:
            mask = mask.repeat_interleave(x.shape[0] // mask.shape[0], dim=0)
        return pool(x, mask)

    def stream_of(self, path: str) -> str:
        """Which tokens the layer at a path sees."""
        inside_decoder = self.is_encoder_decoder and "decoder" in path.split(".")
        return "decoder" if inside_decoder and not _CROSS_ATTENTION.fullmatch(path) else "main"


def conduct_forward(function: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of a model's forward."""
    routing: Routing | None = getattr(model, "_poly_routing", None)
    return function(model, *args, **kwargs) if routing is None else routing.forward(function, model, args, kwargs)


def conduct_part(function: Callable[..., Any], part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of the forward of a part that a model has called by itself."""
    routing: Routing | None = getattr(part, "_poly_routing", None)
    return function(part, *args, **kwargs) if routing is None else routing.forward(function, part, args, kwargs, part=True)


def conduct_generate(function: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of a model's `generate`."""
    routing: Routing | None = getattr(model, "_poly_routing", None)
    return function(model, *args, **kwargs) if routing is None else routing.generate(function, model, args, kwargs)


def as_task_ids(
    task_ids: Any, configs: Sequence[Any], batch: int | None, device: torch.device, argument: str = "task_ids"
) -> Tensor:
    """Task ids as a tensor `[batch]` or `[1]` on `device`, checked against every adapter that will read them.

    Args:
        task_ids: A tensor `[batch]`, `[batch, 1]`, `[1]` or `[]` of integers, a list, one integer, or names.
        configs: The adapters' configs.
        batch: Number of samples, if known.
        device: Where the model's inputs are.
        argument: The caller's name for them, for messages.

    Raises:
        PeftTypeError: A wrong type.
        PeftValueError: None given though there are several tasks, a wrong number, an unknown name, or out of range.
    """
    n_tasks = min(config.n_tasks for config in configs)
    if task_ids is None:
        if n_tasks == 1 and all(config.n_tasks == 1 for config in configs):
            return torch.zeros(1, dtype=torch.long, device=device)
        wanted = "one id for each sample" if argument == "task_ids" else "one of them, by id or name"
        raise PeftValueError(f"{argument} should not be None: the adapter has {n_tasks} tasks; pass {wanted}.")
    ids = _integers(task_ids, configs, argument)
    if ids.dim() == 2 and ids.shape[1] == 1:
        ids = ids.squeeze(1)
    ids = ids.reshape(1) if ids.dim() == 0 else ids
    count = shapes(ids)[0][0]
    if ids.dim() != 1 or (batch is not None and count not in (1, batch)) or (count == 0 and batch != 0):
        wanted = "one id for each sample" if batch is None else f"{batch} ids, one for each sample, or a single one"
        packed = " (texts packed into one row are one sample)" if batch == 1 else ""
        raise PeftValueError(f"`{argument}` has shape {list(ids.shape)}; expected {wanted}{packed}.")
    if torch.compiler.is_compiling():
        torch._assert_async(((ids >= 0) & (ids < n_tasks)).all(), f"`{argument}` must be at least 0 and below {n_tasks}.")
    elif count and _has_values(ids):
        with untraced():
            lowest, highest = (int(i) for i in torch.stack(ids.aminmax()).tolist())
        if lowest < 0 or highest >= n_tasks:
            raise PeftValueError(
                f"Only {n_tasks} tasks available. Found task id = {lowest if lowest < 0 else highest}; ids count from 0."
            )
    return ids.to(device=device, dtype=torch.long)


def _integers(task_ids: Any, configs: Sequence[Any], argument: str) -> Tensor:
    """Task ids of any accepted type as a tensor of integers."""
    if isinstance(task_ids, str):
        task_ids = [task_ids]
    if isinstance(task_ids, (list, tuple)) and any(isinstance(task, str) for task in task_ids):
        names = configs[0].task_names or []
        unknown = [task for task in task_ids if task not in names]
        if unknown:
            raise PeftValueError(f"Unknown task names {unknown}; the adapter's are {names or 'none, so use ids'}.")
        task_ids = [names.index(task) for task in task_ids]
    if not isinstance(task_ids, Tensor):
        try:
            with untraced():  # a constant
                task_ids = torch.as_tensor(task_ids)
                is_empty = task_ids.numel() == 0
        except (TypeError, ValueError, RuntimeError):
            raise PeftTypeError(f"`{argument}` must be integers, not {type(task_ids).__name__}.") from None
        if is_empty:
            return task_ids.long()  # an empty list has no dtype of its own
    if task_ids.is_floating_point() or task_ids.is_complex() or task_ids.dtype == torch.bool:
        raise PeftTypeError(f"`{argument}` must be integers, not {task_ids.dtype}.")
    return task_ids


def _has_values(ids: Tensor) -> bool:
    """Tell if values can be read: there are none in `vmap`, `FakeTensorMode`, on the meta device."""
    if ids.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(ids):
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return fakes is None or not fakes.is_fake(ids)


def _token_mask(mask: Any) -> Tensor | None:
    """An attention mask `[batch, tokens]` as booleans; None where it is of another form, from which tokens can't be read."""
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _as_mask(mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise PeftTypeError("`routing_mask` must be a tensor [batch, tokens] that is nonzero where the prompt is.")
    return mask.bool()
