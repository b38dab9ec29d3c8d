# SPDX-License-Identifier: Apache-2.0
"""Modules of a file → layers of a model, or a sentence for each module that does not fit; and the
config of the adapter, of which a file lacks most fields.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from ....base.geometry import Geometry
from ....checkpoint.renamed_modules import ModuleNames
from ....core.base_layer import geometry
from ....core.plan import own_modules
from ....core.targets import exactly, patterns
from ..config import LoKrConfig, layer_options, shapes_by_rule
from ..shapes import shape_problems, sides
from .file_module import FileModule, SavedScale
from .fused_layers import Piece, join, split
from .module_names import NameTable, Target

T = TypeVar("T")


class Placed(NamedTuple):
    """A layer of a model, the names in the file that are for it, and its factors.

    `by_rows` is True if DoRA's norms belong to rows, False if to columns, None without DoRA.
    """

    path: str
    sources: tuple[str, ...]
    piece: Piece
    size: Geometry
    by_rows: bool | None

    @property
    def module(self) -> FileModule:
        """The layer's factors and scale."""
        return self.piece.module

    @property
    def r(self) -> int:
        """Rank for the config. For full factors it is alpha, where writers put the rank, or 1."""
        module = self.module
        if module.saved is not None:
            return module.saved.r
        if module.rank is not None:
            return module.rank
        alpha = module.alpha
        if alpha is None or not 1 <= alpha < math.inf or alpha != int(alpha):
            return 1
        return int(alpha)

    @property
    def alpha(self) -> float:
        """Alpha for the config: `alpha / r` is the scale."""
        module = self.module
        if module.saved is not None:
            return module.saved.alpha
        alpha = self.r if module.effective_alpha is None else module.effective_alpha
        return int(alpha) if alpha == int(alpha) else alpha

    def tensors(self) -> dict[str, Tensor]:
        """Return the layer's tensors by the name of their container."""
        factors = {f"lokr_{name}": tensor for name, tensor in self.module.factors.items()}
        norms = self.module.dora_scale
        return factors if norms is None else {**factors, "lokr_magnitude": norms.flatten()}

    def __str__(self) -> str:
        module, offset = self.module, self.piece.row_offset
        text = f"{self.path} <- {', '.join(self.sources)}: {module.describe()}"
        text += f", rank {module.rank}" if module.rank else ""
        if self.by_rows is not None:
            text += f", norms of {'rows' if self.by_rows else 'columns'}"
        text += "" if offset is None else f", rows from {offset} on"
        return f"{text}, scale {module.scale:g}"


@dataclass
class Placement:
    """Layers of a model for the modules of a component.

    Args:
        paths: Paths of all modules of the model.
        count: Number of modules of the component.
        flat_layout: True for `kronecker_layout="flat"`.
        placed: Layers with their factors.
        problems: A sentence for everything that could not be placed.
    """

    paths: list[str]
    count: int
    flat_layout: bool = False
    placed: list[Placed] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class _MisfitError(Exception):
    """A module does not fit; the text is a sentence for `Placement.problems`."""


class _Layers:
    """The modules of a model, listed as without adapters, and the sizes of adaptable ones."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = own_modules(model)
        sizes = ((path, geometry(module)) for path, module in self.modules.items())
        self.sizes = {path: size for path, size in sizes if size is not None}
        self.table = NameTable(self.sizes, ModuleNames(model).before())

    def target(self, module: FileModule) -> Target:
        """Return the layers that a module's name stands for; raise if there are none or several."""
        targets = self.table.lookup(module.name, module.flat)
        if not targets:
            raise _MisfitError(f"The model has no layer that {module.name!r} names.")
        if len(targets) > 1:
            meant = sorted("+".join(f"`{path}`" for path in target.paths) for target in targets)
            raise _MisfitError(f"{module.name!r} is ambiguous: it can mean {', '.join(meant)}.")
        return next(iter(targets))

    def place(self, module: FileModule, paths: Sequence[str]) -> list[Placed]:
        """Place a module that is one layer, or several as one."""
        sizes = [self.sizes[path] for path in paths]
        layers = ", ".join(f"`{path}`" for path in paths)
        first, rows = sizes[0], [size.out_features for size in sizes]
        module = module.for_kernel(first.kernel_size)
        start = f"{module.name!r} does not fit {layers}:"
        by_rows = _checked(module, replace(first, out_features=sum(rows)), start)
        if len(paths) == 1:
            return [Placed(paths[0], (module.name,), Piece(module), first, by_rows)]
        if len({(size.in_features, size.kernel_size) for size in sizes}) > 1:
            raise _MisfitError(f"{start} the layers {layers} differ in their inputs.")
        if by_rows is False:
            raise _MisfitError(
                f"{start} norms of columns are those of all its layers together, and can't be told "
                "apart."
            )
        pieces = split(module, rows, first.kernel_size)
        if first.groups > 1 and any(piece.row_offset is not None for piece in pieces):
            raise _MisfitError(
                f"{start} a layer in groups can't take its rows of a larger product."
            )
        return [
            Placed(path, (module.name,), piece, size, by_rows)
            for path, piece, size in zip(paths, pieces, sizes, strict=True)
        ]

    def place_joined(self, path: str, parts: Mapping[int, FileModule], count: int) -> Placed:
        """Place several modules that are one layer of the model."""
        size = self.sizes[path]
        pieces = [Piece(parts[i].for_kernel(size.kernel_size)) for i in sorted(parts)]
        sources = tuple(piece.module.name for piece in pieces)
        names = ", ".join(map(repr, sources))
        joined = None
        if len(pieces) == count:
            rows = [piece.module.rows(size.kernel_size) for piece in pieces]
            joined = join(pieces, rows, size.kernel_size)
        if joined is None:
            raise _MisfitError(
                f"{names} are one layer in the model, `{path}`, and no Kronecker product is "
                "exactly these together; use a model that has them apart (diffusers' "
                "`unfuse_qkv_projections`)."
            )
        by_rows = _checked(joined, size, f"{names} do not fit `{path}`:")
        return Placed(path, sources, Piece(joined), size, by_rows)


def place(
    modules: Sequence[FileModule], model: nn.Module, saved: LoKrConfig | None = None
) -> Placement:
    """Find the layer of each module; all modules that do not fit are among the result's `problems`.
    A `saved` config means a file of Hugging Face PEFT.
    """
    layers = _Layers(model)
    is_peft = saved is not None or any(m.component.endswith("base_model.model") for m in modules)
    flat_layout = is_peft and (saved is None or saved.kronecker_layout == "flat")
    result = Placement(list(layers.modules), len(modules), flat_layout)
    parts: dict[Target, dict[int, FileModule]] = {}
    taken: dict[str, str] = {}
    for module in modules:
        try:
            target = layers.target(module)
            if target.part is not None:
                parts.setdefault(target._replace(part=None), {})[target.part] = module
                continue
            _take(taken, target.paths, module.name)
            if saved is not None:
                path = target.paths[0]
                module = replace(module, saved=_saved_scale(saved, path, layers.sizes[path]))
            result.placed += layers.place(module, target.paths)
        except _MisfitError as misfit:
            result.problems.append(str(misfit))
    for target, members in parts.items():
        try:
            _take(taken, target.paths, members[min(members)].name)
            result.placed.append(layers.place_joined(target.paths[0], members, target.parts))
        except _MisfitError as misfit:
            result.problems.append(str(misfit))
    if len({placed.by_rows for placed in result.placed}) > 1:
        # Without some of its norms the rest would be another adapter, so nothing of it is placed.
        result.placed.clear()
        result.problems.append(
            "Some modules have a `dora_scale` and others have none, or they have it on different "
            "sides; an adapter can't have both."
        )
    return result


def _take(taken: dict[str, str], paths: Sequence[str], name: str) -> None:
    """Note the name in the file that layers belong to; raise if they belong to another already."""
    for path in paths:
        if path in taken:
            raise _MisfitError(f"`{path}` is meant by both {taken[path]!r} and {name!r}.")
    taken.update(dict.fromkeys(paths, name))


def _saved_scale(saved: LoKrConfig, path: str, size: Geometry) -> SavedScale:
    """Return rank and alpha of a layer such that `alpha / r` is the scale under a config's rule."""
    options = layer_options(saved, path, size)
    if saved.full_matrix:
        return SavedScale(options.r, options.r)
    rule = math.sqrt(options.r) if saved.use_rslora else 1
    return SavedScale(options.r, options.alpha * rule)


def _checked(module: FileModule, size: Geometry, start: str) -> bool | None:
    """Check a module's tensors against a layer, and return `Placed.by_rows`."""
    rows, columns = size.out_features, size.in_features
    if problem := shape_problems(module.shapes, rows, columns, size.kernel_size):
        raise _MisfitError(f"{start} {problem}.")
    if module.dora_scale is None:
        return None
    shape = tuple(module.dora_scale.shape)
    for by_rows, count in ((True, rows), (False, columns)):
        axis = 0 if by_rows else 1
        if shape[axis : axis + 1] == (count,) and module.dora_scale.numel() == count:
            return by_rows
    raise _MisfitError(
        f"{start} dora_scale is of shape {list(shape)}, the layer has {rows} x {columns}."
    )


def infer_config(placement: Placement) -> LoKrConfig:
    """Return a config that describes a placement. LoKr's rules give the shapes of as many layers as
    possible; `tensor_shapes` lists those of the others.
    """
    placed = placement.placed
    ranks, alphas = {p.path: p.r for p in placed}, {p.path: p.alpha for p in placed}
    r, alpha = most_common(ranks), most_common(alphas)
    shapes = {p.path: p.module.shapes for p in placed}
    rules = LoKrConfig(
        decompose_both=any("w1_a" in own for own in shapes.values()),
        use_effective_conv2d=any("t2" in own for own in shapes.values()),
        full_matrix=all(p.module.rank is None and p.module.saved is None for p in placed),
    )
    regular = [p for p in placed if p.piece.row_offset is None]
    # The rows of W1 in any layer may be the `decompose_factor` of all.
    rows = {sides(shapes[p.path], math.prod(p.size.kernel_size))[0][0] for p in regular}
    listed: dict[int, dict[str, dict[str, list[int]] | None]] = {}
    for factor in (-1, *sorted(rows)):
        expected = {p.path: shapes_by_rule(rules, p.size, p.r, factor) for p in regular}
        listed[factor] = {
            path: None if own == expected.get(path) else {k: list(v) for k, v in own.items()}
            for path, own in shapes.items()
        }
    factor = min(listed, key=lambda factor: sum(own is not None for own in listed[factor].values()))
    targets, excluded = exactly(list(ranks), placement.paths)
    return LoKrConfig(
        r=r,
        alpha=alpha,
        rank_pattern=patterns(ranks, r),
        alpha_pattern=patterns(alphas, alpha),
        target_modules=targets,
        exclude_modules=excluded,
        decompose_factor=factor,
        tensor_shapes=patterns(listed[factor], None),
        row_offsets=patterns({p.path: p.piece.row_offset for p in placed}, None),
        weight_decompose=any(p.by_rows is not None for p in placed),
        wd_on_output=all(p.by_rows is not False for p in placed),
        kronecker_layout="flat" if placement.flat_layout else "channels",
        decompose_both=rules.decompose_both,
        use_effective_conv2d=rules.use_effective_conv2d,
        full_matrix=rules.full_matrix,
    )


def most_common(values: Mapping[str, T]) -> T:
    """Return the most common value, the first of several."""
    counts = Counter(values.values())
    return max(counts, key=counts.__getitem__)
