# SPDX-License-Identifier: Apache-2.0
"""The tensors that belong to an adapter, and their keys in a checkpoint.

A key is the parameter's name without the adapter's name: `…q_proj.lokr_w1.default` in the model is
`…q_proj.lokr_w1` in the file. Keys are never parsed when a checkpoint is loaded: the adapter's
tensors in the model are listed by their keys, and the file is compared with that list.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from typing import TypeVar

from torch import Tensor, nn

from ..base.constants import ROOT
from ..base.containers import walk
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING
from ..base.validation import check_adapter
from ..integrations.distributed import unwrapped_name
from .protocols import AdapterConfig, tuner_class

T = TypeVar("T")

# Containers of embedding rows and of full modules, which adapters of all methods can train.
TOKEN_ROWS = "trainable_tokens_delta"
WHOLE_MODULES = "modules_to_save"
# Names of token embeddings, and of the output head that can share their weight.
_EMBEDDINGS = (
    "embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out",
)  # fmt: skip


def checkpoint_key(
    name: str, adapter_name: str, containers: Collection[str], shared: Collection[str] = ()
) -> str | None:
    """Return the key under which a tensor of the model is saved, None if it is not the adapter's.

    `name` has no parts that wrappers insert. Tensors in `shared` containers are saved at the root.
    """
    if f".{adapter_name}" not in name:
        return None
    parts = name.split(".")
    for i in range(len(parts) - 1):
        if parts[i + 1] == adapter_name:
            if parts[i] in shared:
                return (ROOT if name.startswith(ROOT) else "") + parts[i]
            if parts[i] in containers:
                layer = parts[:i]
                # A layer inside another method's layer is saved as if it was alone.
                while layer[-1:] == ["base_layer"]:
                    layer.pop()
                return ".".join([*layer, parts[i], *parts[i + 2 :]])
            if parts[i] == WHOLE_MODULES:
                return ".".join(parts[:i] + parts[i + 2 :])
    return None


def checkpoint_keys(
    names: Iterable[str], adapter_name: str, containers: Collection[str], shared: Collection[str]
) -> dict[str, str]:
    """Return the keys of an adapter's tensors by their names in the model.

    An adapter of several parameters of a module has a layer for each, one around the other. The key
    of the outermost has the module's path; those inside have a `base_layer` more for each around.

    Example:
        >>> inner, outer = "experts.base_layer.base_layer.lora_A.x", "experts.lora_A.x"
        >>> checkpoint_keys([inner, outer], "x", ["lora_A"], [])[inner]
        'experts.base_layer.lora_A'
    """
    found, depths = {}, dict[str, set[int]]()
    for name in names:
        key = checkpoint_key(name, adapter_name, containers, shared)
        if key is not None:
            found[name] = key
            depths.setdefault(_module_of(key, containers), set()).add(_depth(name, containers))
    nested = {path: sorted(levels) for path, levels in depths.items() if len(levels) > 1}
    for name, key in found.items() if nested else ():
        path = _module_of(key, containers)
        if path in nested:
            level = nested[path].index(_depth(name, containers))
            found[name] = path + ".base_layer" * level + key[len(path) :]
    return found


def _module_of(name: str, containers: Collection[str]) -> str:
    """Return the path of the module that has a tensor's container."""
    parts = name.split(".")
    end = next((i for i, part in enumerate(parts) if part in containers), 0)
    return ".".join(parts[:end])


def _depth(name: str, containers: Collection[str]) -> int:
    """Return the number of layers around the one that a tensor belongs to."""
    path, depth = f".{_module_of(name, containers)}", 0
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    return depth


def adapter_tensors(
    named: Iterable[tuple[str, T]],
    config: AdapterConfig,
    adapter_name: str,
    embeddings: bool | Container[str] = False,
) -> dict[str, T]:
    """Return an adapter's tensors by checkpoint key, with all or some token embeddings."""
    containers, shared = container_names(config), tuner_class(config).shared_parameter_names
    tensors = {unwrapped_name(name): tensor for name, tensor in named}
    keys = checkpoint_keys(tensors, adapter_name, containers, shared)
    result = {key: tensors[name] for name, key in keys.items()}
    # An adapter's copy of a module comes before the module's own tensors of the same key.
    if config.trained_biases != "none":
        wanted = None if isinstance(embeddings, bool) else embeddings
        for name, key in _trained_biases(tensors, keys, config, wanted):
            result.setdefault(key, tensors[name])
    for name, tensor in tensors.items() if embeddings else ():
        if is_embedding(name) and (
            embeddings is True or (not isinstance(embeddings, bool) and name in embeddings)
        ):
            result.setdefault(name, tensor)
    return result


def _trained_biases(
    names: Collection[str],
    own: Collection[str],
    config: AdapterConfig,
    wanted: Container[str] | None,
) -> Iterator[tuple[str, str]]:
    """Yield the names and keys of the base model's biases that an adapter trains: of all modules or
    of adapted ones. Of a file, whose keys are `wanted`, those of the adapter's own layers, and what
    else was adapted where it was written.

    A layer that only other adapters have is saved as if it had none. Other writers do not.
    """
    containers = {TOKEN_ROWS}.union(
        *(tuner.tuner_layer_cls.container_names for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values())
    )
    adapted, around = _adapted(names, containers), _adapted(own, containers)
    trained, wanted = (adapted, ()) if wanted is None else (around, wanted)
    inside = {WHOLE_MODULES, "original_module", *containers}
    for name in names:
        layer = name.removesuffix(".bias")
        if layer == name or not inside.isdisjoint(name.split(".")):
            continue
        path = _plain(layer)
        key = f"{path}{around.get(path, '')}.bias" if path in adapted else name
        if key not in wanted and (other := f"{path}.base_layer.bias") in wanted:
            key = other
        if config.trained_biases == "all" or path in trained or key in wanted:
            yield name, key


def _adapted(names: Iterable[str], containers: Collection[str]) -> dict[str, str]:
    """Return the paths of the modules that layers with some tensors adapt, and for each what these
    layers insert between it and the names of its own tensors.
    """
    result: dict[str, str] = {}
    for layer in dict.fromkeys(_module_of(name, containers) for name in names):
        path = _plain(layer)
        begin = ".token_adapter" if layer.endswith(".token_adapter") else result.get(path, "")
        result[path] = f"{begin}.base_layer"
    return result


def _plain(path: str) -> str:
    """Return a path without what layers insert at its end."""
    while (shorter := path.removesuffix(".base_layer").removesuffix(".token_adapter")) != path:
        path = shorter
    return path


def in_view(config: AdapterConfig, *adapter_names: str) -> tuple[str, ...] | None:
    """Return the adapters to walk over for the tensors of some: these; or None, for all, where the
    base model's biases, anywhere in it, belong to an adapter.
    """
    return adapter_names if config.trained_biases == "none" else None


def companion_tensors(
    named: Iterable[tuple[str, T]], config: AdapterConfig, adapter_name: str
) -> dict[str, T]:
    """Return full modules, embedding rows and biases trained beside an adapter, by key."""
    in_layers = container_names(config) - {TOKEN_ROWS}
    return {
        key: tensor
        for key, tensor in adapter_tensors(named, config, adapter_name).items()
        if in_layers.isdisjoint(key.split("."))
    }


def is_embedding(name: str) -> bool:
    """Return True for the weight of a token embedding or of an output head like it."""
    if not name.endswith(".weight"):
        return False
    parts = name.replace(".token_adapter", "").replace(".base_layer", "").split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in _EMBEDDINGS


def tied_embeddings(model: nn.Module, tensors: Iterable[object]) -> Iterator[tuple[str, Tensor]]:
    """Yield the embeddings and heads among `tensors`, under all their names in the model. A head
    can share the embedding's weight, and other writers save it under both names.
    """
    known = {*map(id, tensors)}
    for path, module in walk(model, repeated=True):
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in known and is_embedding(name := f"{path}.weight"):
            yield name, weight


def container_names(config: AdapterConfig) -> set[str]:
    """Return the names of the containers with an entry for each adapter of a config's method."""
    tuner = tuner_class(config)
    return {*tuner.tuner_layer_cls.container_names, *tuner.shared_parameter_names, TOKEN_ROWS}


def adapter_config(model: nn.Module, adapter_name: str) -> AdapterConfig:
    """Return the config of an adapter in a model."""
    held = getattr(model, "peft_config", None)
    configs: dict[str, AdapterConfig] = held if isinstance(held, dict) else {}
    check_adapter(adapter_name, configs)
    return configs[adapter_name]
