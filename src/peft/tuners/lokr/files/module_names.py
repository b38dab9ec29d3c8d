# SPDX-License-Identifier: Apache-2.0
"""Names in files → modules of a model: the model's own paths first, then every other name that some
program uses for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from .keys import flattened
from .original_names import original_candidates

# Endings of names of one fused layer, which other implementations have as several.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_kv": ("to_k", "to_v"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "query_key_value": ("query", "key", "value"),
}


class Target(NamedTuple):
    """Modules of a model that a name stands for.

    Attributes:
        paths: One module; or several, whose outputs the named layer has one after the other.
        part: Index of the module's outputs that the name stands for, as in "the second of q, k and
            v"; None for all outputs.
        parts: Number of such parts.
    """

    paths: tuple[str, ...]
    part: int | None = None
    parts: int = 1


class NameTable:
    """Names that files may have for modules of a model.

    Args:
        paths: Paths of its layers.
        before: Paths that modules had in earlier versions of the model's library, by present path.

    Example:
        >>> table = NameTable(["attn.to_q", "attn.to_k", "attn.to_v"])
        >>> table.lookup("attn_to_k", flat=True), table.lookup("attn.qkv", flat=False)
        ({Target(paths=('attn.to_k',), part=None, parts=1)},
        {Target(paths=('attn.to_q', 'attn.to_k', 'attn.to_v'), part=None, parts=1)})
    """

    def __init__(self, paths: Iterable[str], before: Mapping[str, str] | None = None) -> None:
        own = {path: Target((path,)) for path in paths}
        others: dict[str, Target] = {}
        for name, target in _aliases(own, before or {}):
            if name not in own and own.keys() >= set(target.paths):
                others.setdefault(name, target)
        self._dotted = own, others
        self._flat: tuple[dict[str, set[Target]], ...] = {}, {}
        for flat, dotted in zip(self._flat, self._dotted, strict=True):
            for name, target in dotted.items():
                flat.setdefault(flattened(name), set()).add(target)

    def lookup(self, name: str, flat: bool) -> set[Target]:
        """Return all that a name can stand for: several if paths differ only in `.` and `_`."""
        if flat:
            return next((names[name] for names in self._flat if name in names), set())
        return next(({names[name]} for names in self._dotted if name in names), set())


def _aliases(paths: Collection[str], before: Mapping[str, str]) -> Iterator[tuple[str, Target]]:
    """Yield names that are not the model's own. Of two targets with one name, the first counts."""
    yield from ((before[path], Target((path,))) for path in paths if path in before)
    yield from _towers(paths)
    yield from ((name, Target(own)) for name, own in original_candidates(paths))
    yield from _fused(paths)


def _towers(paths: Collection[str]) -> Iterator[tuple[str, Target]]:
    """Yield names of a CLIP encoder's modules with or without `text_model.` or `vision_model.`
    before them, as versions of transformers differ in that.
    """
    for path in paths:
        tower, _, inner = path.partition(".")
        if tower in ("text_model", "vision_model"):
            yield inner, Target((path,))
        elif path.startswith("encoder.layers."):
            yield f"text_model.{path}", Target((path,))
            yield f"vision_model.{path}", Target((path,))


def _fused(paths: Collection[str]) -> Iterator[tuple[str, Target]]:
    """Yield names of fused layers that the model has as several, and of layers that it fuses."""
    children = _children(paths)
    for parent, own in children.items():
        for name, members in _FUSED.items():
            if own.issuperset(members):
                fused = tuple(_under(parent, member) for member in members)
                yield _under(parent, name), Target(fused)
        if "to_out.0" in own:
            yield _under(parent, "to_out"), Target((_under(parent, "to_out.0"),))
            yield _under(parent, "out"), Target((_under(parent, "to_out.0"),))
    for parent, own in children.items():
        for name, members in _FUSED.items():
            if name in own:
                for part, member in enumerate(members):
                    target = Target((_under(parent, name),), part, len(members))
                    yield _under(parent, member), target


def _children(paths: Collection[str]) -> Mapping[str, set[str]]:
    """Return each module's children by its path; entries of a list also count for its parent."""
    children: dict[str, set[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        children.setdefault(parent, set()).add(name)
        if name.isdigit():
            above, _, last = parent.rpartition(".")
            children.setdefault(above, set()).add(f"{last}.{name}")
    return children


def _under(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name
