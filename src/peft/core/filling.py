# SPDX-License-Identifier: Apache-2.0
"""Write tensors into a finished adapter that is not yet in the model.

Every adapter that does not start from its own initial values is filled here: from a checkpoint
(`CheckpointFill`), from tensors that a method computed (`fill_with`), from another adapter
(`copy_fill`). All check names, shapes and kinds first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise

from torch import Tensor, nn

from ..base.constants import MODEL_ROOT, ROOT
from ..base.containers import named_tensors, walk
from ..base.errors import warn
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING, lookup
from ..base.suggestions import listed
from ..checkpoint.checks import LoadResult, check_complete, check_state, warn_of_values
from ..checkpoint.keys import (
    adapter_tensors,
    checkpoint_keys,
    container_names,
    in_view,
    tied_embeddings,
)
from ..checkpoint.state_dict import import_state, write_state
from ..config import PeftConfig
from ..integrations.distributed import state_tensors, unwrapped_name
from .base_layer import layer_of
from .injection import Build, Fill
from .layer import BaseTunerLayer
from .parameter_targets import layer_for


def fill_with(build: Build, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, by key without a root, into an adapter; raise unless all match."""
    expected = adapter_tensors(build.named_tensors(), build.config, build.adapter_name)
    check_complete(check_state(expected, tensors), build.adapter_name)
    write_state(None, expected, tensors)


def copy_fill(model: nn.Module, config: PeftConfig, source: str) -> Fill:
    """Return a function that writes the values of the adapter `source` into a new adapter."""

    def fill(build: Build) -> None:
        present = state_tensors(model, in_view(config, source))
        values = {
            key.removeprefix(MODEL_ROOT).removeprefix(ROOT): tensor
            for key, tensor in adapter_tensors(present.items(), config, source).items()
        }
        wanted = adapter_tensors(build.named_tensors(), build.config, build.adapter_name)
        fill_with(build, {key: tensor for key, tensor in values.items() if key in wanted})
        for path, layer in build.layers.items():
            original = layer_of(model.get_submodule(MODEL_ROOT + path), type(layer))
            _copy_state(layer, original, build.adapter_name, source)
        for target, layer in build.parameters.values():
            original = layer_for(model, MODEL_ROOT + target.path, target.name, type(layer))
            _copy_state(layer, original, build.adapter_name, source)

    return fill


def _copy_state(
    layer: BaseTunerLayer, original: BaseTunerLayer | None, name: str, source: str
) -> None:
    """Copy a layer's state of an adapter that is in no checkpoint: its scale, its start."""
    assert original is not None  # the model has the source
    layer.scaling[name] = original.scaling[source]
    for attribute in layer.value_names:
        entries, values = getattr(layer, attribute), getattr(original, attribute)
        if name in entries and source in values and isinstance(entries[name], nn.Module):
            buffers = zip(entries[name].buffers(), values[source].buffers(), strict=True)
            for buffer, value in buffers:
                buffer.copy_(value)


@dataclass
class CheckpointFill:
    """A function that checks a checkpoint against a finished adapter and writes it there.

    Args:
        model: The base model.
        state: The checkpoint's tensors.
        source: The checkpoint's place, for messages.
        ignore_mismatched_sizes: Leave tensors as they are that have another shape there.
        strict: Insist on all of the adapter's tensors and no other.

    Attributes:
        result: Afterwards, the names of parameters that the checkpoint lacks, and its keys that
            have no place in the adapter.
    """

    model: nn.Module
    state: Mapping[str, Tensor]
    source: str
    ignore_mismatched_sizes: bool = False
    strict: bool = True
    result: LoadResult = field(default_factory=lambda: LoadResult([], []))

    @property
    def is_partial(self) -> bool:
        """True if tensors of the adapter may keep their initial values."""
        return self.ignore_mismatched_sizes or not self.strict

    def __call__(self, build: Build) -> None:
        """Write the checkpoint into an adapter; raise `CheckpointError` if it does not fit."""
        config, adapter_name = build.config, build.adapter_name
        named = {}
        for name, tensor in build.named_tensors():
            named[(ROOT if name.partition(".")[0] in build.shared else MODEL_ROOT) + name] = tensor
        expected = adapter_tensors(named.items(), config, adapter_name)
        state = self.state_for(expected, config, adapter_name)
        incoming = import_state(state, config, names=expected)
        if config.trained_biases != "none" or not incoming.keys() <= expected.keys():
            named |= self._base_tensors(build)
            expected = adapter_tensors(named.items(), config, adapter_name, incoming)
        found = self.compare(expected, incoming)
        names = adapter_tensors(((name, name) for name in named), config, adapter_name, incoming)
        self.result = LoadResult(
            [names.get(key, key) for key in found.missing_keys], found.unexpected_keys
        )
        fits = expected.keys() & incoming.keys() - set(found.missing_keys)
        values = {key: tensor for key, tensor in incoming.items() if key in fits}
        tuner_cls = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
        masked = tuner_cls.checkpoint_format.masked
        warn_of_values(f"'{self.source}'", values, expected, masked)
        write_state(None, expected, values)

    def _base_tensors(self, build: Build) -> dict[str, Tensor]:
        """Return the base model's own tensors, which a checkpoint may hold (trained biases, saved
        embeddings), by the names that they have once the adapter is in the model.
        """
        inside = {path: f"{path}.base_layer" for path in build.layers}
        for target, _ in build.parameters.values():
            path = target.plain_path
            inside[path] = inside.get(path, target.path) + ".base_layer"
        inside |= {path: f"{path}.token_adapter.base_layer" for path in build.tokens}
        view = in_view(build.config)
        base = dict(named_tensors(walk(self.model, view), view))
        result: dict[str, Tensor] = {}
        for name, tensor in chain(base.items(), tied_embeddings(self.model, base.values())):
            path, _, end = name.rpartition(".")
            result[MODEL_ROOT + (f"{inside[path]}.{end}" if path in inside else name)] = tensor
        return result

    def state_for(
        self, expected: Mapping[str, Tensor], config: PeftConfig, adapter_name: str
    ) -> Mapping[str, Tensor]:
        """Return the checkpoint's tensors. Unless `strict`, their keys may be names of a model's
        parameters, in place of which they get the `expected` ones.
        """
        if self.strict:
            return self.state
        return _without_adapter_names(self.state, expected, config, adapter_name)

    def compare(self, expected: Mapping[str, Tensor], incoming: Mapping[str, Tensor]) -> LoadResult:
        """Return the keys of an adapter that the checkpoint lacks, or has in another shape that is
        to be ignored, and the checkpoint's other keys.

        Raises:
            CheckpointError: A shape or kind differs, or with `strict` a key, or no key fits.
        """
        result = check_state(expected, incoming, self.ignore_mismatched_sizes)
        missing = [key for key in result.missing_keys if key not in incoming]
        fits = bool(expected.keys() & incoming.keys())
        if self.strict or not fits:
            remedy = "Pass `strict=False` to load the rest." if fits else ""
            if not self.strict:
                remedy = (
                    "No key fits, so `strict=False` has nothing to load; `key_mapping` renames "
                    "modules in keys."
                )
            check_complete(LoadResult(missing, result.unexpected_keys), self.source, remedy)
        elif missing or result.unexpected_keys:
            left = []
            if missing:
                left.append(f"Missing, and left as they were: {listed(missing)}.")
            if unexpected := listed(result.unexpected_keys):
                left.append(f"In the file, and without a place in the adapter: {unexpected}.")
            warn(f"'{self.source}' was loaded with `strict=False`. {' '.join(left)}")
        return result


def _without_adapter_names(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    config: PeftConfig,
    adapter_name: str,
) -> dict[str, Tensor]:
    """Return a checkpoint of a model's parameter names under a checkpoint's keys.

    Taken are the keys of `adapter_name`, else of "default", else of the only adapter there.
    """
    containers = {*container_names(config), "modules_to_save"}
    shared = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type).shared_parameter_names
    plain = {unwrapped_name(key): key for key in state}
    adapters = {
        after for name in plain for part, after in pairwise(name.split(".")) if part in containers
    }
    named: dict[str, dict[str, str]] = {}
    for adapter in adapters:
        for name, key in checkpoint_keys(plain, adapter, containers, shared).items():
            if key in expected:
                named.setdefault(adapter, {})[plain[name]] = key
    chosen = next((name for name in (adapter_name, "default") if name in named), None)
    if chosen is None and len(named) == 1:
        chosen = next(iter(named))
    keys = named.get(chosen or "", {})
    return {keys.get(key, key): tensor for key, tensor in state.items()}
