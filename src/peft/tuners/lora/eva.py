# SPDX-License-Identifier: Apache-2.0
"""EVA: run a model on data, and start LoRA from the principal directions of its layers' inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...base.constants import MODEL_ROOT
from ...base.errors import PeftNotSupportedError, PeftTypeError, PeftValueError, warn
from ...base.progress import remark, track
from ...base.validation import check_adapter
from ...core import plan as _plan
from ...core import targets as _targets
from ...core.base_layer import geometry, is_linear
from ...core.measuring import watched_inputs
from ...core.tuner import BaseTuner
from ...integrations.distributed import gathered_rows
from ...peft_model import PeftModel
from .config import LoraConfig
from .eva_ranks import put_directions
from .layer import Linear
from .model import LoraModel
from .starts.eva import PrincipalDirections, shared_ranks

__all__ = [
    "forward_fn_dict",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
]

LayerInputs: TypeAlias = Callable[[Any, Any, str], Tensor]
"""A function of a layer's input, the model's prepared inputs and the layer's name, which returns
the rows `[n, in]` to decompose."""

# Passes over the data after which directions count as found.
_MOST_PASSES = 100


def prepare_model_inputs_fn_language_modeling(
    model_input: Mapping[str, Tensor], peft_config: LoraConfig
) -> Tensor:
    """Return the places `[n, 2]` of the tokens to use: not padding, and not without a label.

    Args:
        model_input: Arguments of the model by name, with `input_ids` or `attention_mask`.
        peft_config: Its `eva_config` says which labels do not count.
    """
    if not isinstance(model_input, Mapping):
        raise PeftTypeError(
            "EVA expects the batches of the data loader to be dictionaries of the model's "
            f"arguments, got {type(model_input)}; pass a `prepare_model_inputs_fn` of your own, or "
            "None for all positions."
        )
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    chosen, options = mask.bool(), peft_config.eva_config
    if options is not None and options.use_label_mask and "labels" in model_input:
        chosen = chosen & (model_input["labels"] != options.label_mask_value)
    return chosen.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Tensor, layer_name: str
) -> Tensor:
    """Return the rows of a layer's input `[batch, tokens, in]` at the places `model_input`."""
    return _tensor(layer_input, layer_name)[tuple(model_input.T.unbind())]


def _all_rows(layer_input: Any, model_input: object, layer_name: str) -> Tensor:
    """Return all rows of a layer's input."""
    return _tensor(layer_input, layer_name).flatten(0, -2)


def _tensor(layer_input: Any, layer_name: str) -> Tensor:
    """Return a layer's first argument."""
    first = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(first, Tensor):
        raise PeftTypeError(
            f"`{layer_name}`: its input is not a tensor but {type(first)}; pass a "
            "`prepare_layer_inputs_fn` that returns rows `[n, in]`."
        )
    return first


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, object]) -> object:
    """Call a model with the entries of a batch."""
    return model(**inputs)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], object] = forward_fn_dict,
    prepare_model_inputs_fn: (
        Callable[[Any, LoraConfig], Any] | None
    ) = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        LayerInputs | Mapping[str, LayerInputs | None] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return the principal directions of the inputs of a model's layers, as many as EVA gives each.

    The model runs on the data, again and again, until the directions that are needed stay the same
    from batch to batch: their cosine similarity is at least `tau` of the `eva_config`. Layers with
    the same input are computed once. The ranks of all layers together stay the same; a direction
    gets one where it has a large share of the variance of its layer's inputs, up to `rho` times the
    layer's rank. The model runs in evaluation mode with its adapters off, and is as it was
    afterwards.

    Args:
        model: A `PeftModel`, or a plain model with a `peft_config`.
        dataloader: Batches that can be looped over more than once.
        peft_config: For a plain model; without `target_modules` all linear layers count.
        forward_fn: Calls the model with a batch.
        prepare_model_inputs_fn: Makes of a batch what `prepare_layer_inputs_fn` gets; None passes
            the batch on.
        prepare_layer_inputs_fn: Returns the rows `[n, in]` of a layer's input, for all layers or
            by name; None takes all rows.
        adapter_name: The adapter of a `PeftModel`.
        gather_distributed_inputs: In a distributed run, take the rows of all processes together;
            each has to see other data.
        show_progress_bar: False shows none.

    Returns:
        `[rank, in]` by the layer's name in `model`; no rows for a layer that needs no adapter.

    Raises:
        PeftValueError: There is no data, or every batch has fewer rows than a layer needs.
        PeftTypeError: Batches or inputs are of a kind that needs functions of your own.

    Source: arXiv:2410.07170, algorithm 1
    """
    is_adapted = isinstance(model, PeftModel)
    if isinstance(model, PeftModel):
        check_adapter(adapter_name, model.peft_config)
    if peft_config is None and not is_adapted:
        raise PeftValueError("`peft_config` is required if the model is not a PeftModel.")
    config: LoraConfig = model.peft_config[adapter_name] if peft_config is None else peft_config  # type: ignore[index, assignment]
    layers = _adapted_layers(model, adapter_name) if is_adapted else _plain_layers(model, config)
    if not layers:
        raise PeftValueError("EVA is for linear layers, and the model has none to adapt.")
    own = _input_functions(prepare_layer_inputs_fn, layers)
    survey = _Survey(model, config, layers, own, gather_distributed_inputs)
    with ExitStack() as stack:
        if is_adapted:
            stack.enter_context(model.disable_adapter())  # type: ignore[operator]
        batches = _Batches(
            dataloader, _device(model), config, prepare_model_inputs_fn, show_progress_bar
        )
        survey.find_equal_inputs(forward_fn, next(batches.once()))
        survey.find_directions(forward_fn, batches)
    return survey.result()


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], object] = forward_fn_dict,
    prepare_model_inputs_fn: (
        Callable[[Any, LoraConfig], Any] | None
    ) = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        LayerInputs | Mapping[str, LayerInputs | None] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter with `init_lora_weights="eva"` from the inputs that its layers see.

    Each layer's `A` becomes the principal directions of its inputs, `B` stays zero. Ranks and
    alphas change as EVA spreads the ranks, in the config's patterns too; a layer of rank zero loses
    the adapter. Call it before the optimizer is made. On an error the adapter is as it was.

    Args:
        model: A `PeftModel` with the adapter, which may be on the meta device.
        dataloader: Data to run the model on; not needed with an `eva_state_dict`.
        eva_state_dict: Directions by layer, from `get_eva_state_dict`; names may be those in the
            plain model.
        forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
        gather_distributed_inputs, show_progress_bar: As for `get_eva_state_dict`.

    Raises:
        PeftValueError: The adapter is not for EVA, several are active, or neither data nor
            directions are given.

    Example:
        >>> from peft import EvaConfig, LoraConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> config = LoraConfig(
        ...     r=2, target_modules=["0", "2"], init_lora_weights="eva", eva_config=EvaConfig(rho=1)
        ... )
        >>> model = get_peft_model(base, config)
        >>> initialize_lora_eva_weights(
        ...     model,
        ...     [torch.randn(64, 8) for _ in range(4)],
        ...     forward_fn=lambda model, batch: model(batch),
        ...     prepare_model_inputs_fn=None,
        ...     prepare_layer_inputs_fn=None,
        ... )
        >>> A = model.base_model.model[0].lora_A["default"].weight
        >>> torch.allclose(A @ A.T, torch.eye(2), atol=1e-5)
        True

    Source: arXiv:2410.07170, algorithm 1
    """
    if not isinstance(model, PeftModel):
        raise PeftValueError("The model must be a PeftModel; `get_peft_model` makes one.")
    check_adapter(adapter_name, model.peft_config)
    config = model.peft_config[adapter_name]
    if len(model.active_adapters) > 1:
        raise PeftValueError("EVA needs a single active adapter; choose one with `set_adapter`.")
    if getattr(config, "init_lora_weights", None) != "eva":
        raise PeftValueError(
            f"Adapter {adapter_name} is not for EVA; make it with `init_lora_weights='eva'`."
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise PeftValueError("Pass a `dataloader`, or the `eva_state_dict` of an earlier run.")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    found = {name.removeprefix(MODEL_ROOT): rows for name, rows in eva_state_dict.items()}
    tuner = model.base_model
    if not isinstance(tuner, LoraModel):
        raise PeftNotSupportedError("EVA is not supported for a model that mixes methods.")
    put_directions(tuner, adapter_name, found)


def _adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """Return the linear layers with an adapter by their paths in a `PeftModel`."""
    tuner: Any = model.base_model
    return {
        MODEL_ROOT + path: layer
        for path, layer in tuner.named_tuner_layers()
        if isinstance(layer, Linear) and adapter_name in layer.scaling
    }


def _plain_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Return the linear layers of a model that a config targets, by path."""
    if config.target_modules is None:
        modules = _plan.own_modules(model)
    else:
        tuner: BaseTuner[LoraConfig] = LoraModel(model, None)
        modules = _plan.make(tuner, "default", config.for_adapter()).targets
    return {path: module for path, module in modules.items() if is_linear(module)}


def _input_functions(
    given: LayerInputs | Mapping[str, LayerInputs | None] | None, layers: Collection[str]
) -> dict[str, LayerInputs]:
    """Return the function that prepares the inputs of each layer."""
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(layers, given)
    if unknown := sorted(set(by_name).difference(layers)):
        raise PeftValueError(
            f"`prepare_layer_inputs_fn` names {', '.join(unknown)}, which are not among the "
            "adapted linear layers."
        )
    return {name: by_name.get(name) or _all_rows for name in layers}


def _device(model: nn.Module) -> torch.device | None:
    """Return the device of a model's parameters, None if there are several."""
    devices = {p.device for p in model.parameters() if not p.is_meta}
    return devices.pop() if len(devices) == 1 else None


def _moved(batch: Any, device: torch.device | None) -> Any:
    """Return a batch on a device."""
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(entry, device) for name, entry in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(entry, device) for entry in batch)
    return batch


@dataclass
class _Batches:
    """Batches of a data loader, on the model's device, with what is prepared of each."""

    data: Iterable[Any]
    device: torch.device | None
    config: LoraConfig
    prepare: Callable[[Any, LoraConfig], Any] | None
    shows_progress: bool

    def once(self, passes: int = 1) -> Iterator[tuple[Any, Any, Iterable[Any]]]:
        """Yield batch, prepared batch, and the items that a progress bar counts."""
        data = self.data
        if self.shows_progress and hasattr(data, "__len__"):
            data = track(data, f"EVA, pass {passes}", unit="batch")  # type: ignore[arg-type]
        empty = True
        for batch in data:
            empty = False
            batch = _moved(batch, self.device)
            yield batch, batch if self.prepare is None else self.prepare(batch, self.config), data
        if empty:
            raise PeftValueError(
                "The dataloader is empty, or can be looped over only once; EVA runs over it again "
                "and again."
            )


@dataclass
class _Survey:
    """The search for the directions of a model's layers."""

    model: nn.Module
    config: LoraConfig
    layers: dict[str, nn.Module]
    functions: dict[str, LayerInputs]
    gathers: bool
    leaders: dict[str, str] = field(default_factory=dict)
    found: dict[str, PrincipalDirections] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    budget: int = 0
    prepared: Any = None

    def rows(self, path: str, args: tuple[object, ...]) -> Tensor:
        """Return the rows of a layer's input to use."""
        rows = self.functions[path](args, self.prepared, path)
        return gathered_rows(rows) if self.gathers else rows

    def find_equal_inputs(
        self, run: Callable[[nn.Module, Any], object], first: tuple[Any, Any, object]
    ) -> None:
        """Find layers with the same input by a batch, and set the number of directions of each."""
        digests: dict[str, tuple[object, ...]] = {}

        def note(path: str, args: tuple[object, ...]) -> None:
            digests.setdefault(path, _digest(self.rows(path, args)))

        batch, self.prepared, _ = first
        with watched_inputs(self.model, self.layers, note):
            run(self.model, batch)
        if silent := [path for path in self.layers if path not in digests]:
            raise PeftValueError(
                f"The model did not call {', '.join(silent[:8])}; leave them out of the targets."
            )
        options = self.config.eva_config
        assert options is not None
        first_with: dict[tuple[object, ...], str] = {}
        limits: dict[str, int] = {}
        for path, layer in self.layers.items():
            plain = path.removeprefix(MODEL_ROOT)
            r = _targets.pattern_value(self.config.rank_pattern or {}, plain, self.config.r)
            self.budget += r
            leader = self.leaders[path] = first_with.setdefault(digests[path], path)
            size = geometry(layer)
            assert size is not None
            most = min(round(r * options.rho), size.in_features)
            limits[leader] = max(limits.get(leader, 0), most)
        # Leaders come first, so that they win where shares are equal.
        followers = {path: leader for path, leader in self.leaders.items() if path != leader}
        self.leaders = {**dict(zip(limits, limits, strict=True)), **followers}
        self.found = {path: PrincipalDirections(most) for path, most in limits.items()}
        self.ranks = {path: limits[leader] for path, leader in self.leaders.items()}

    def find_directions(self, run: Callable[[nn.Module, Any], object], batches: _Batches) -> None:
        """Run the model until the directions in use stay the same from batch to batch."""
        done: set[str] = set()
        fewest: dict[str, int] = {}

        def note(path: str, args: tuple[object, ...]) -> None:
            if path in done:
                return
            rows, found = self.rows(path, args), self.found[path]
            if len(rows) >= found.count:
                found.add(rows)
            else:
                fewest[path] = max(fewest.get(path, 0), len(rows))

        watched = {path: self.layers[path] for path in self.found}
        with watched_inputs(self.model, watched, note):
            for passes in range(_MOST_PASSES):
                for batch, self.prepared, shown in batches.once(passes + 1):
                    done = {path for path in self.found if self._has_settled(path)}
                    remark(shown, f"{len(done)} of {len(watched)} inputs have settled")
                    if len(done) == len(watched):
                        return
                    run(self.model, batch)
                    if all(found.directions is not None for found in self.found.values()):
                        shares = {p: found.variance_shares for p, found in self.found.items()}
                        self.ranks = shared_ranks(shares, self.leaders, self.budget)
                self._check_rows(fewest)
        warn(
            f"EVA ran {_MOST_PASSES} times over the data, and some directions still change from "
            "batch to batch; they are used as they are. Pass more data, or a smaller `tau`."
        )

    def _has_settled(self, path: str) -> bool:
        options = self.config.eva_config
        assert options is not None
        similarity = self.found[path].similarity[: self.ranks[path]]
        return bool((similarity >= options.tau).all())

    def _check_rows(self, fewest: Mapping[str, int]) -> None:
        """Raise if a pass over the data had no batch with enough rows for a layer."""
        short = [path for path, found in self.found.items() if found.directions is None]
        if short:
            path = short[0]
            raise PeftValueError(
                f"`{path}`: every batch has fewer rows than the {self.found[path].count} "
                f"directions to find, at most {fewest.get(path, 0)}; use larger batches, or a "
                "smaller `r` or `rho`."
            )

    def result(self) -> dict[str, Tensor]:
        """Return the directions of each layer."""
        options, result = self.config.eva_config, {}
        assert options is not None
        for path, rank in self.ranks.items():
            found = self.found[self.leaders[path]]
            assert found.directions is not None
            rows = found.directions[:rank]
            if options.whiten:
                rows = rows / found.singular_values[:rank].sqrt().unsqueeze(1)
            result[path] = rows
        return {path: result[path].clone() for path in self.layers}


def _digest(rows: Tensor) -> tuple[object, ...]:
    """Return a value that is the same for equal tensors only."""
    data = rows.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return (*rows.shape, rows.dtype, hashlib.blake2b(data).digest())
