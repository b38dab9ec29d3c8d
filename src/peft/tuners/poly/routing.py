# SPDX-License-Identifier: Apache-2.0
"""What Poly's layers need to know of the call that runs them: which task each sample has, which tokens are its prompt.

A base model does not hand `task_ids` down to its layers, so they travel beside it. One `Routing` belongs to a model and is read by
all its layers. A hook on the model's root takes the arguments out of the call, checks them once and puts them in place; `generate`
does the same for all the forwards it runs. When gradient checkpointing runs layers again during backward, the call they belonged
to is put back first: its output tensors carry a hook that backward reaches before anything below them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.error import PeftTypeError, PeftValueError
from .mixing import pool, prompt_mask

# Arguments of a call that are for the routing and not for the model.
CALL_ARGUMENTS = ("task_ids", "routing_mask")
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "inputs")
# Projections in a decoder that read the encoder's output.
_CROSS_ATTENTION = re.compile(r".*(EncDecAttention|encoder_attn|cross_?attn|crossattention)\b.*\.(k|v|k_proj|v_proj|key|value)")


@dataclass
class Call:
    """One call of the model.

    Args:
        owner: What began it.
        task_ids: `[batch]` or `[1]`, checked; None where no adapter routes by task.
        batch: Number of samples, if known.
        masks: Tokens to pool over, `[batch, tokens]` by stream ("main", "decoder").
        decisions: In `generate`, the weights each layer chose when it saw the prompt; None in a plain forward.
    """

    owner: Any
    task_ids: Tensor | None = None
    batch: int | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    decisions: dict[tuple[int, str], Tensor] | None = None


class _Thread(threading.local):
    """The calls of one thread: several may run the model at a time."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.replayed: Call | None = None


class Routing:
    """The calls in progress on one model.

    Attributes:
        configs: Config of every Poly adapter on the model, by name.
        probe: Any of the layers, to see which adapters are active.
        is_encoder_decoder, is_causal: What kind of model it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.configs: dict[str, Any] = {}
        self.probe: Any = None
        config = getattr(model, "config", None)
        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.is_causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        self._thread = _Thread()

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with no call in progress."""
        return {name: value for name, value in vars(self).items() if name != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _thread=_Thread())

    @property
    def call(self) -> Call | None:
        """The innermost call in progress, or the one whose backward is."""
        return self._thread.calls[-1] if self._thread.calls else self._thread.replayed

    # --- hooks on the model's root ------------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take the routing's arguments out of a call and begin it."""
        own = {name: kwargs[name] for name in CALL_ARGUMENTS if name in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in own}
        for i, call in enumerate(self._thread.calls):
            if call.owner is module:  # left over from a forward that raised
                del self._thread.calls[i:]
                break
        outer = self._thread.calls[-1] if self._thread.calls else None
        if outer is not None and not own:
            call = Call(module, outer.task_ids, outer.batch, dict(outer.masks), outer.decisions)
        else:
            call = self._begin(module, args, {**kwargs, **own})
        self._see_masks(call, {**kwargs, **own}, nested=outer is not None)
        self._thread.calls.append(call)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End a call; have backward put it back, should it run layers again."""
        if not self._thread.calls or self._thread.calls[-1].owner is not module:
            return
        call = self._thread.calls.pop()
        if torch.is_grad_enabled() and not self._thread.calls and not torch.compiler.is_compiling():
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(_Replay(self, call))

    @contextmanager
    def generating(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> Iterator[None]:
        """A call of `generate`; takes the routing's arguments out of `arguments`."""
        call = self._begin(self, args, arguments)
        call.decisions = {}
        self._see_masks(call, arguments, nested=False)
        for name in CALL_ARGUMENTS:
            arguments.pop(name, None)
        self._thread.calls.append(call)
        try:
            yield
        finally:
            self._thread.calls.remove(call)

    @contextmanager
    def using(self, task_ids: Any, x: Tensor) -> Iterator[None]:
        """A call of one layer by itself."""
        self._thread.calls.append(self._begin(self, (x,), {"task_ids": task_ids}))
        try:
            yield
        finally:
            self._thread.calls.pop()

    # --- arguments ----------------------------------------------------------------------------------------------------

    def _begin(self, owner: Any, args: tuple[Any, ...], arguments: Mapping[str, Any]) -> Call:
        """A call with its task ids checked.

        Raises:
            PeftTypeError: Task ids of a wrong type.
            PeftValueError: Task ids missing, of a wrong number, or out of range.
        """
        inputs = _inputs(args, arguments)
        batch = inputs.shape[0] if inputs is not None and inputs.dim() else None
        call = Call(owner, batch=batch)
        if self.probe is None or self.probe.disable_adapters:
            return call
        task_ids = arguments.get("task_ids")
        if self.probe.merged_adapters:
            self._check_merged(task_ids)
            return call
        active = [self.configs[name] for name in self.probe.active_adapters if name in self.configs]
        by_task = [config for config in active if config.poly_type == "poly"]
        if by_task:
            device = inputs.device if inputs is not None else torch.device("cpu")
            call.task_ids = as_task_ids(task_ids, by_task, batch, device)
        return call

    def _check_merged(self, task_ids: Any) -> None:
        """Task ids in a call of a merged model must say what was merged."""
        if task_ids is None:
            return
        name = self.probe.merged_adapters[-1]
        merged = self.probe.merged_task(name)
        asked = as_task_ids(task_ids, [self.configs[name]], None, torch.device("cpu"))
        if any(int(task) != merged for task in asked.flatten()):
            raise PeftValueError(f"Task {merged} is merged into the weights; call `unmerge_adapter` before using other tasks.")

    def _see_masks(self, call: Call, arguments: Mapping[str, Any], nested: bool) -> None:
        """Note which tokens input routing may look at."""
        if not any(config.poly_type == "mope" for config in self.configs.values()):
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

    def replay(self, call: Call) -> None:
        """Put a call back while its backward runs."""
        self._thread.replayed = call
        torch.autograd.Variable._execution_engine.queue_callback(self._forget)  # type: ignore[attr-defined]

    def _forget(self) -> None:
        self._thread.replayed = None


class _Replay:
    """A tensor hook that puts a call back."""

    def __init__(self, routing: Routing, call: Call) -> None:
        self.routing, self.call = routing, call

    def __call__(self, gradient: Tensor) -> None:
        self.routing.replay(self.call)


def as_task_ids(task_ids: Any, configs: Sequence[Any], batch: int | None, device: torch.device) -> Tensor:
    """Task ids as a tensor `[batch]` or `[1]` on `device`, checked against every adapter that will read them.

    Args:
        task_ids: A tensor `[batch]`, `[batch, 1]`, `[1]` or `[]` of integers, a list, one integer, or names.
        configs: The adapters' configs.
        batch: Number of samples, if known.
        device: Where the model's inputs are.

    Raises:
        PeftTypeError: A wrong type.
        PeftValueError: None given though there are several tasks, a wrong number, an unknown name, or out of range.
    """
    n_tasks = min(config.n_tasks for config in configs)
    if task_ids is None:
        if n_tasks == 1 and all(config.n_tasks == 1 for config in configs):
            return torch.zeros(1, dtype=torch.long, device=device)
        raise PeftValueError(f"task_ids should not be None: the adapter has {n_tasks} tasks; pass one id for each sample.")
    ids = _integers(task_ids, configs)
    if ids.dim() == 2 and ids.shape[1] == 1:
        ids = ids.squeeze(1)
    ids = ids.reshape(1) if ids.dim() == 0 else ids
    if ids.dim() != 1 or (batch is not None and ids.shape[0] not in (1, batch)) or ids.shape[0] == 0:
        wanted = "one id for each sample" if batch is None else f"{batch} ids, one for each sample, or a single one"
        raise PeftValueError(f"`task_ids` has shape {list(ids.shape)}; expected {wanted}.")
    if torch.compiler.is_compiling():
        torch._assert_async(((ids >= 0) & (ids < n_tasks)).all(), f"`task_ids` must be at least 0 and below {n_tasks}.")
    else:
        lowest, highest = (int(i) for i in torch.stack(ids.aminmax()).tolist())
        if lowest < 0 or highest >= n_tasks:
            raise PeftValueError(
                f"Only {n_tasks} tasks available. Found task id = {lowest if lowest < 0 else highest}; ids count from 0."
            )
    return ids.to(device=device, dtype=torch.long)


def _integers(task_ids: Any, configs: Sequence[Any]) -> Tensor:
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
            task_ids = torch.as_tensor(task_ids)
        except (TypeError, ValueError, RuntimeError):
            raise PeftTypeError(f"`task_ids` must be integers, not {type(task_ids).__name__}.") from None
    if task_ids.is_floating_point() or task_ids.is_complex() or task_ids.dtype == torch.bool:
        raise PeftTypeError(f"`task_ids` must be integers, not {task_ids.dtype}.")
    return task_ids


def _inputs(args: tuple[Any, ...], arguments: Mapping[str, Any]) -> Tensor | None:
    """The tensor whose rows are the samples: the first positional argument, or the first that is known by name or is one."""
    candidates = [*args, *(arguments.get(name) for name in _INPUTS)]
    candidates += [value for name, value in arguments.items() if name not in CALL_ARGUMENTS]
    return next((value for value in candidates if isinstance(value, Tensor) and value.dim() > 0), None)


def _token_mask(mask: Any) -> Tensor | None:
    """An attention mask `[batch, tokens]` as booleans; None where it is of another form, from which tokens can't be read."""
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _as_mask(mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise PeftTypeError("`routing_mask` must be a tensor [batch, tokens] that is nonzero where the prompt is.")
    return mask.bool()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a model's output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
