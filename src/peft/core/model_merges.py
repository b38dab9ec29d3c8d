# SPDX-License-Identifier: Apache-2.0
"""Merging into all layers of a model, all or none, and removing adapters from a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import TypeAlias

from torch import nn

from ..base.calls.arguments import positional_names
from ..base.containers import walk
from ..base.errors import PeftNotSupportedError, warn
from ..base.modules import get_submodules
from ..base.progress import track
from ..base.suggestions import listed
from ..integrations.accelerate import loaded_weights
from . import moe_tokens, replication, resizing, tied_weights
from .adapted_parameters import detach
from .adapters import check_readable, lacks_values
from .auxiliary import AuxiliaryTrainingWrapper
from .computed_weights import made_plain
from .forward_probe import changes_delta
from .fused_paths import restore_fused_paths
from .layer import BaseTunerLayer
from .merge_requests import warn_of_merged
from .merges import Merge, Options
from .parameter_layer import ParameterLayer
from .weights import untied

AdapterOptions: TypeAlias = Mapping[str, Options]
"""Options that adapters are merged with, by adapter."""


def merge(named: Mapping[str, BaseTunerLayer], options: AdapterOptions, safe_merge: bool) -> None:
    """Merge adapters into the layers that have them and have not merged them; all or none.

    Raises:
        PeftValueError: An adapter is merged with other options, or a weight would be NaN or
            infinite; nothing is merged then.
        PeftNotSupportedError: A layer can't be merged into.
    """
    layers = list(named.values())[::-1]  # of layers around one base layer, the inner ones first
    todo = [(layer, new) for layer in layers if (new := layer._merges.missing(layer, options))]
    left = [name for name in options if any(name in new for _, new in todo)]
    present = [name for name in options if any(name in layer.scaling for layer in layers)]
    warn_of_merged([name for name in present if name not in left], left)
    _check(named, {id(layer): new for layer, new in todo})
    _warn_of_forwards(named, {layer for layer, _ in todo})
    done: list[tuple[BaseTunerLayer, list[str]]] = []
    try:
        for layer, new in track(todo, "Merging"):
            with loaded_weights(layer, [*new, *layer.merged_adapters]):
                layer._merges.merge(layer, new, safe_merge)
            done.append((layer, list(new)))
    except BaseException:
        for layer, merged in reversed(done):
            _take_off(layer, merged)
        raise


def _take_off(layer: BaseTunerLayer, adapter_names: Collection[str] | None = None) -> list[Merge]:
    """Unmerge a layer's adapters, by default all, wherever its weights are; return their merges."""
    with loaded_weights(layer, layer.merged_adapters):
        return layer.take_off(adapter_names)


def _put_on(taken: Sequence[tuple[BaseTunerLayer, Sequence[Merge]]]) -> None:
    """Merge again what was taken off layers in this order, so the last first."""
    for layer, merges in reversed(taken):
        with loaded_weights(layer, [merge.name for merge in merges]):
            layer.put_on(merges)


def _check(named: Mapping[str, BaseTunerLayer], todo: Mapping[int, AdapterOptions]) -> None:
    """Check that all layers can be merged into; name the others by reason."""
    problems: dict[str, list[str]] = {}
    inner: dict[nn.Module, list[str]] = {}  # adapters that inner layers are about to merge
    for path, layer in reversed(list(named.items())):
        new = todo.get(id(layer), {})
        names = inner.setdefault(layer.holder, [])
        names += new
        with loaded_weights(layer, [*new, *layer.merged_adapters]):
            try:
                if names:
                    layer.check_mergeable(names)
                    _check_values(layer, new)
            except PeftNotSupportedError as error:
                problems.setdefault(str(error), []).append(f"`{path}`")
    if problems:
        causes = [f"{listed(paths)}: {text}" for text, paths in problems.items()]
        raise PeftNotSupportedError(" ".join(causes))


def _check_values(layer: BaseTunerLayer, names: Iterable[str]) -> None:
    """Raise for adapters without values here, on the meta device for example, that are to be merged
    into a weight with values.
    """
    weight = layer.get_base_layer()._parameters.get("weight")
    for name in () if weight is None or weight.is_meta else names:
        if lacks_values(layer, name):
            raise PeftNotSupportedError(
                f"Adapter {name} is on the meta device and has no values yet: load a checkpoint "
                "into it, or run the function that initializes it."
            )
        check_readable(layer, name)


def _warn_of_forwards(named: Mapping[str, BaseTunerLayer], layers: Set[BaseTunerLayer]) -> None:
    """Warn of layers to merge into whose `forward` takes more than the input, or does more than
    multiply it by the weight: this acts on a merged delta too, and not on one that is added to its
    output.
    """
    with_arguments: list[str] = []
    with_more: list[str] = []
    for path, layer in named.items():
        base = layer.get_base_layer()
        if layer not in layers or isinstance(layer, ParameterLayer):
            continue
        is_product = isinstance(base, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        arguments = positional_names(type(base).forward)[2:] if is_product else ()
        if arguments:
            with_arguments.append(f"`{path}` ({', '.join(arguments)})")
        elif changes_delta(base):
            with_more.append(f"`{path}` ({type(base).__name__})")
    if with_arguments:
        warn(
            f"`forward` takes further arguments in {listed(with_arguments)}. They act on a "
            "merged delta as on the weight, so outputs of calls that pass them can differ from "
            "those of the unmerged adapter."
        )
    if with_more:
        warn(
            f"`forward` does more than multiply by the weight in {listed(with_more)}, by an "
            "activation or a scale for example. It acts on a merged delta too, so outputs differ "
            "from those of the unmerged adapter."
        )


def check_shared(
    model: nn.Module, named: Mapping[str, BaseTunerLayer], options: AdapterOptions
) -> None:
    """Warn where merging into layers (`named` by path) changes a weight used elsewhere too.

    Raises:
        PeftNotSupportedError: Replicated layers share the weight.
    """
    replication.check_mergeable(model, named)
    owners: dict[int, list[str]] = {}
    for path, layer in named.items():
        base, module = layer.holder, layer.get_base_layer()
        weight = base._parameters.get("weight")
        if weight is None or all(
            name not in layer.scaling or name in layer.merged_adapters for name in options
        ):
            continue
        owners = owners or tied_weights.owners(model)
        others = sorted(
            {owner for owner in owners[id(weight)] if model.get_submodule(owner) is not module}
        )
        if others:
            names = ", ".join(f"`{owner.partition('.base_layer')[0]}`" for owner in others)
            warn(
                f"`{path}` shares its weight with {names}, and merging changes it in both places: "
                "outputs differ from those of the unmerged adapter. Use `unmerge_adapter`, or "
                "`merge_and_unload`, which makes two weights of it."
            )


@contextmanager
def apart(model: nn.Module, layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Context for a permanent merge: merged layers whose weight the model uses elsewhere get a copy
    of it. An error undoes this.
    """
    owners = tied_weights.owners(model)
    shared = [
        layer
        for layer in layers
        if layer.merged
        and all(merge.is_known for merge in layer._merges.entries)
        and len(owners.get(id(layer.holder._parameters.get("weight")), ())) > 1
    ]
    taken = [(layer, _take_off(layer)) for layer in shared]  # merged in reverse, see `merge`
    try:
        with untied(model, [layer.holder for layer in layers]):
            _put_on(taken)
            try:
                yield
            except BaseException:
                for layer, merges in taken:
                    _take_off(layer, [merge.name for merge in merges])
                raise
    except BaseException:
        _put_on(taken)
        raise


def warn_of_training(layers: Iterable[BaseTunerLayer]) -> None:
    """Warn if adapters that are to be trained are merged, so that gradients do not reach them."""
    names = {
        name: None
        for layer in layers
        for name in layer.merged_adapters
        if any(parameter.requires_grad for parameter in layer.adapter_parameters(name))
    }
    if names:
        warn(
            f"The model is in training mode while adapters are merged: {', '.join(names)}. No "
            "gradient reaches them in the weights. Call `unmerge_adapter` before training; "
            "`set_requires_grad(names, False)` freezes them."
        )


def unmerge(layers: Iterable[BaseTunerLayer]) -> None:
    """Unmerge all adapters, all or none; raise if a state dict was loaded with a merged weight."""
    merged = [layer for layer in layers if layer.merged or layer._merges.suspended(layer)]
    if not merged:
        warn("Already unmerged. Nothing to do.")
    taken: list[tuple[BaseTunerLayer, list[Merge]]] = []
    try:
        for layer in track(merged, "Unmerging"):  # merged in reverse, see `merge`
            taken.append((layer, _take_off(layer)))
    except BaseException:
        _put_on(taken)
        raise
    for layer in merged:
        layer._merges.drop_suspended(layer, *layer._merges.suspended(layer))


def prepare_to_enable(layers: Iterable[BaseTunerLayer], enabled: bool) -> None:
    """Check, before adapters are disabled, that merged ones can be unmerged. Before they are
    enabled, merge all of those again if some layer's forward would lack one.

    Raises:
        PeftRuntimeError: A loaded state dict had a merged weight.
    """
    layers = list(layers)
    for layer in () if enabled else layers:
        layer._merges.check_known()
    if enabled and any(layer._merges.lacks_suspended(layer) for layer in layers):
        for layer in layers:
            if names := layer._merges.suspended(layer):
                with loaded_weights(layer, names):
                    layer._merges.resume(layer, True)


@contextmanager
def without_other_merges(
    layers: Iterable[BaseTunerLayer], options: AdapterOptions
) -> Iterator[None]:
    """Context without adapters merged with other options; an error merges them again."""
    taken: list[tuple[BaseTunerLayer, list[Merge]]] = []
    for layer in layers:
        merged = layer._merges.options(layer)
        others = [n for n, new in options.items() if new and n in merged and merged[n] != new]
        if others:
            taken.append((layer, _take_off(layer, others)))
    try:
        yield
    except BaseException:
        _put_on(taken)
        raise


@contextmanager
def for_good(
    model: nn.Module,
    layers: Iterable[BaseTunerLayer],
    names: Sequence[str],
    options: AdapterOptions,
) -> Iterator[bool]:
    """Context for a permanent merge, whose preparations an error undoes.

    Adapters merged with other options are unmerged, weights used elsewhere are copied, computed
    weights become parameters. Yields True if some adapter is not merged yet.
    """
    layers = list(layers)
    pairs = [(layer, name) for layer in layers for name in names if name in layer.scaling]
    changed = dict.fromkeys([layer for layer in layers if layer.merged])
    changed |= dict.fromkeys(layer for layer, _ in pairs)
    with without_other_merges(layers, options), apart(model, list(changed)):
        missing = [layer for layer, name in pairs if name not in layer.merged_adapters]
        with made_plain(dict.fromkeys(layer.holder for layer in missing)):
            yield bool(missing)


def unload(
    model: nn.Module,
    layer_cls: type[BaseTunerLayer],
    adapters: Sequence[str],
    progressbar: str | None,
) -> None:
    """Replace layers with adapters by their base layers.

    The trained copies of modules, or rows of embeddings, of `adapters` stay in the model.
    `progressbar` is the description of a progress bar that the caller asked for.
    """
    modules = track(
        list(walk(model, repeated=True))[::-1],  # a layer may lie inside another's base layer
        progressbar or "Unloading",
        unit="module",
        wanted=progressbar is not None,
    )
    for path, module in modules:
        plain: nn.Module | None = None
        if isinstance(module, layer_cls):
            plain = module.base_layer
        elif isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.plain(adapters)
        if plain is not None:
            detach(plain)
            parent, _, child = get_submodules(model, path)
            setattr(parent, child, plain)
    restore_fused_paths(model)
    moe_tokens.forget(model)
    resizing.release(model)
