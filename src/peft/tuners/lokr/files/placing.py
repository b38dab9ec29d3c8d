# SPDX-License-Identifier: Apache-2.0
"""Where the modules of a file go in a model, and the config that describes the adapter they make
there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ....base.geometry import Geometry
from ....checkpoint.renamed_modules import ModuleNames
from ....core.base_layer import geometry, innermost
from ....core.plan import own_modules
from ....core.targets import exactly, patterns
from ..config import LoKrConfig
from ..model import layer_options
from ..shapes import Shapes, factor_shapes, shape_problems, sides
from .names import Names, Target
from .parts import FileModule, Piece, join, split


class Placed(NamedTuple):
    """A layer and what it gets.

    Attributes:
        path: Of the layer.
        sources: Names in the file.
        piece: Its factors.
        size: The layer's.
        by_rows: Whether lengths are those of rows, None without decomposition.
    """

    path: str
    sources: tuple[str, ...]
    piece: Piece
    size: Geometry
    by_rows: bool | None

    @property
    def shapes(self) -> Shapes:
        """Shapes of the factors."""
        return {name: tuple(tensor.shape) for name, tensor in self.piece.module.factors.items()}

    @property
    def r(self) -> int:
        """The rank; where factors are whole, alpha, which is where writers put it, if that can be
        one.
        """
        module = self.piece.module
        if module.known is not None:
            return module.known[0]
        if module.rank is not None:
            return module.rank
        alpha = module.alpha
        return (
            int(alpha)
            if alpha is not None and alpha >= 1 and alpha < float("inf") and alpha == int(alpha)
            else 1
        )

    @property
    def alpha(self) -> float:
        """What divided by `r` gives the scale."""
        module = self.piece.module
        if module.known is not None:
            return module.known[1]
        plain = module.rank is None or module.alpha is None or module.has_placeholder
        alpha = float(self.r) if plain else float(module.alpha)  # type: ignore[arg-type]
        return int(alpha) if alpha == int(alpha) else alpha

    def line(self) -> str:
        """For people."""
        module, offset = self.piece.module, self.piece.row_offset
        more = f", rank {module.rank}" if module.rank else ""
        more += (
            "" if self.by_rows is None else f", lengths of {'rows' if self.by_rows else 'columns'}"
        )
        more += "" if offset is None else f", rows from {offset} on"
        return (
            f"{self.path} <- {', '.join(self.sources)}: {module.form}{more}, scale {module.scale:g}"
        )


@dataclass
class Placement:
    """What of a component's modules goes where.

    Args:
        paths: All module paths of the model.
        count: Modules of the component.
        flat_layout: Whether full factors of one-dimensional convolutions are in the order of
            Hugging Face PEFT.
    """

    paths: list[str]
    count: int
    flat_layout: bool = False
    placed: list[Placed] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        return [f"  {placed.line()}" for placed in self.placed]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The adapter's tensors by path and container."""
        result = {}
        for placed in self.placed:
            own = {f"lokr_{name}": tensor for name, tensor in placed.piece.module.factors.items()}
            dora = placed.piece.module.dora_scale
            result[placed.path] = own if dora is None else {**own, "lokr_magnitude": dora.flatten()}
        return result

    def config(self) -> LoKrConfig:
        """A config of which these are the tensors: by its rules as far as they go, by shape for the
        rest.
        """
        ranks, alphas = {p.path: p.r for p in self.placed}, {p.path: p.alpha for p in self.placed}
        r, alpha = _most(ranks), _most(alphas)
        rules: dict[str, Any] = {
            "decompose_both": any("w1_a" in p.shapes for p in self.placed),
            "use_effective_conv2d": any("t2" in p.shapes for p in self.placed),
            "full_matrix": all(
                p.piece.module.rank is None and p.piece.module.known is None for p in self.placed
            ),
        }
        lefts = sorted(
            {
                sides(p.shapes, math.prod(p.size.kernel_size))[0][0]
                for p in self.placed
                if p.piece.row_offset is None
            }
        )
        irregular = min(
            (self._irregular(factor, rules) for factor in (-1, *lefts)),
            key=lambda found: len(found[1]),
        )
        targets, excluded = exactly(list(ranks), self.paths)
        shapes = {
            p.path: {n: list(s) for n, s in p.shapes.items()} if p.path in irregular[1] else None
            for p in self.placed
        }
        return LoKrConfig(
            r=r,
            alpha=alpha,
            rank_pattern=patterns(ranks, r),
            alpha_pattern=patterns(alphas, alpha),
            target_modules=targets,
            exclude_modules=excluded,
            decompose_factor=irregular[0],
            tensor_shapes=patterns(shapes, None),
            row_offsets=patterns({p.path: p.piece.row_offset for p in self.placed}, None),
            weight_decompose=any(p.by_rows is not None for p in self.placed),
            wd_on_output=all(p.by_rows is not False for p in self.placed),
            kronecker_layout="flat" if self.flat_layout else "channels",
            **rules,
        )

    def _irregular(self, factor: int, rules: Mapping[str, Any]) -> tuple[int, set[str]]:
        """A `decompose_factor`, and the layers whose shapes do not follow from it."""
        found = set()
        for p in self.placed:
            size = p.size
            own = factor_shapes(
                size.out_features,
                size.in_features,
                size.kernel_size,
                r=p.r,
                decompose_factor=factor,
                **rules,
            )
            if p.piece.row_offset is not None or own != p.shapes:
                found.add(p.path)
        return factor, found


def place(
    modules: Sequence[FileModule], model: nn.Module, saved: LoKrConfig | None = None
) -> Placement:
    """Find out where modules go. What can't be placed is among the result's `problems`, all of it.

    Args:
        modules: Of one component.
        model: The model, seen as if it had no adapters.
        saved: The config that came with the file, which is of Hugging Face PEFT's kind then.
    """
    own = own_modules(model)
    layers = {path: size for path, module in own.items() if (size := geometry(module)) is not None}
    names = Names(layers, ModuleNames(model).before())
    peft = saved is not None or any(
        module.component.endswith("base_model.model") for module in modules
    )
    result = Placement(
        list(own), len(modules), peft and (saved is None or saved.kronecker_layout == "flat")
    )
    partial: dict[str, dict[int, FileModule]] = {}
    parts: dict[str, int] = {}
    taken: dict[str, str] = {}
    for module in modules:
        targets = names.meaning(module.name, module.flat)
        if len(targets) != 1:
            result.problems.append(_unresolved(module, targets))
            continue
        target = next(iter(targets))
        if target.part is not None:
            partial.setdefault(target.paths[0], {})[target.part] = module
            parts[target.paths[0]] = target.parts
            continue
        if twice := [path for path in target.paths if path in taken]:
            result.problems.append(
                f"`{twice[0]}` is meant by both {taken[twice[0]]!r} and {module.name!r}."
            )
            continue
        taken |= dict.fromkeys(target.paths, module.name)
        if saved is not None:
            module = replace(module, known=_known(saved, target.paths[0], layers[target.paths[0]]))
        _place_whole(result, module, target.paths, layers, own)
    for path, found in partial.items():
        _place_joined(result, path, found, parts[path], layers[path], own[path])
    kinds = {p.by_rows for p in result.placed}
    if len(kinds) > 1:
        # Whatever is left out, the rest would be an adapter without some of its values.
        result.placed.clear()
        result.problems.append(
            "Some modules have a `dora_scale` and others have none, or they have it on different "
            "sides; an adapter can't have both."
        )
    return result


def _known(saved: LoKrConfig, path: str, size: Geometry) -> tuple[int, float]:
    """`r` and `alpha` of a layer, put so that their quotient is the scale."""
    options = layer_options(saved, path, size)
    r, alpha = options["r"], options["alpha"]
    return r, r if saved.full_matrix else alpha * math.sqrt(r) if saved.use_rslora else alpha


def _unresolved(module: FileModule, targets: set[Target]) -> str:
    if not targets:
        return f"The model has no layer that {module.name!r} names."
    meant = ", ".join(sorted("`" + "`+`".join(target.paths) + "`" for target in targets))
    return f"{module.name!r} is ambiguous: it can mean {meant}."


def _place_whole(
    result: Placement,
    module: FileModule,
    paths: Sequence[str],
    layers: Mapping[str, Geometry],
    own: Mapping[str, nn.Module],
) -> None:
    """Place a module that is one layer, or several as one."""
    sizes = [layers[path] for path in paths]
    kernel, rows = sizes[0].kernel_size, [size.out_features for size in sizes]
    module = module.for_kernel(kernel)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.factors.items()}
    problem = shape_problems(shapes, sum(rows), sizes[0].in_features, kernel)
    if problem is None and len({(size.in_features, size.kernel_size) for size in sizes}) > 1:
        problem = f"the layers {', '.join(f'`{path}`' for path in paths)} differ in their inputs"
    by_rows = None
    if problem is None and module.dora_scale is not None:
        by_rows, problem = _axis(module.dora_scale, sum(rows), sizes[0].in_features)
    if problem is None and by_rows is False and len(paths) > 1:
        problem = "lengths of columns are those of all its layers together, and can't be told apart"
    groups = getattr(innermost(own[paths[0]]), "groups", 1)
    pieces = [Piece(module)] if len(paths) == 1 else [] if problem else split(module, rows, kernel)
    if problem is None and groups > 1 and any(piece.row_offset is not None for piece in pieces):
        problem = "a layer in groups can't take its rows of a larger product"
    if problem is not None:
        result.problems.append(
            f"{module.name!r} does not fit {', '.join(f'`{path}`' for path in paths)}: {problem}."
        )
        return
    for path, size, piece in zip(paths, sizes, pieces, strict=True):
        result.placed.append(Placed(path, (module.name,), piece, size, by_rows))


def _place_joined(
    result: Placement,
    path: str,
    found: Mapping[int, FileModule],
    parts: int,
    size: Geometry,
    layer: nn.Module,
) -> None:
    """Place several modules that are one layer of the model."""
    names = tuple(found[i].name for i in sorted(found))
    pieces = [Piece(found[i].for_kernel(size.kernel_size)) for i in sorted(found)]
    whole = None
    if len(pieces) == parts:
        whole = join(
            pieces, [piece.module.rows(size.kernel_size) for piece in pieces], size.kernel_size
        )
    if whole is None:
        result.problems.append(
            f"{', '.join(map(repr, names))} are one layer in the model, `{path}`, and no Kronecker "
            "product is what they are "
            "together; use a model that has them apart (diffusers' `unfuse_qkv_projections`)."
        )
        return
    problem = shape_problems(
        {n: tuple(t.shape) for n, t in whole.factors.items()},
        size.out_features,
        size.in_features,
        size.kernel_size,
    )
    by_rows = None
    if problem is None and whole.dora_scale is not None:
        by_rows, problem = _axis(whole.dora_scale, size.out_features, size.in_features)
    if problem is not None:
        result.problems.append(f"{', '.join(map(repr, names))} do not fit `{path}`: {problem}.")
        return
    result.placed.append(Placed(path, names, Piece(whole), size, by_rows))


def _axis(
    dora_scale: Tensor, out_features: int, in_features: int
) -> tuple[bool | None, str | None]:
    """Whether lengths are those of rows; and what is wrong with them."""
    shape = tuple(dora_scale.shape)
    if shape[:1] == (out_features,) and dora_scale.numel() == out_features:
        return True, None
    if shape[1:2] == (in_features,) and dora_scale.numel() == in_features:
        return False, None
    return (
        None,
        f"dora_scale is of shape {list(shape)}, the layer has {out_features} x {in_features}",
    )


def _most(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
