# SPDX-License-Identifier: Apache-2.0
"""Which sample each row belongs to that a layer sees in a call.

A model hands its layers rows and does not say whose they are. What the call knows decides it: how
many samples there are, how often `generate` has each, how many tokens. A layer sees `samples × k`
rows with `k` one of these; any other number is refused, by the layer's name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .containers import walk
from .errors import PeftValueError
from .routed_tokens import ROUTED_TOKENS
from .row_layout import ORDINARY, RowLayout, is_sequence_first
from .tracing import shapes, untraced

# Keyword arguments under which models take the tensor whose rows are the samples.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "inputs")
# Arguments whose sizes need not be those of samples and tokens.
_NO_TOKENS = re.compile(r"mask|position|grid|_sizes|cu_seq|bbox")
# Arguments that hold the tokens of the encoder or single model, and of the decoder.
_TOKENS = {
    "main": ("input_ids", "inputs_embeds", "encoder_hidden_states"),
    "decoder": ("decoder_input_ids", "decoder_inputs_embeds", "labels"),
}


class Shape(NamedTuple):
    """The shape of an argument of a call."""

    name: str
    sizes: tuple[int, ...]
    is_floating: bool


class Rows(NamedTuple):
    """How the rows of a layer's input are shared out.

    Attributes:
        turned: They lie along its second dimension, not the first.
        owner: The sample of each row; None where each sample has the same number of rows, one after
            the other.
    """

    turned: bool = False
    owner: Tensor | None = None

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Values for the rows of a layer's input.

        Args:
            values: `[samples, …]`.
            x: The input, `[rows, *leading, in]`, or `[sequence, rows, *leading, in]` if `turned`.

        Returns:
            `values` where rows are in order; `[rows, …]`; or `[sequence, rows, *leading, …]`.
        """
        if self.owner is not None:
            values = values.index_select(0, self.owner)
        if not self.turned:
            return values
        (samples, *inner), (_, rows, *_) = shapes(values, x)
        if samples != rows:
            values = values.repeat_interleave(rows // samples, 0)
        values = values.view(1, rows, *[1] * (x.dim() - 3), *inner)
        return values.expand(*x.shape[:-1], *inner)


IN_ORDER = Rows()


class CallRows:
    """What a call knows of its rows.

    Args:
        samples: Number of samples; None if the call does not tell.
        shapes: Those of the arguments of the forward in progress.
        root: The model, in which a layer's name is looked up.
        repeats: How many rows of the forward a sample can have.
        is_guided: Whether there can be as many rows again, behind all others, to guide these.
        batch_dim: The dimension of the arguments along which the samples lie.
        settled: How all rows are shared out, where that is known.

    Attributes:
        rows: Rows of the forward.
        are_rows: What counts as samples are the rows, each by itself even if it is the only one.
    """

    are_rows = False

    def __init__(
        self,
        samples: int | None,
        shapes: Iterable[Shape] = (),
        root: nn.Module | None = None,
        repeats: Iterable[int] = (1,),
        is_guided: bool = False,
        batch_dim: int = 0,
        settled: Rows | None = None,
    ) -> None:
        self.samples = samples
        self.shapes = tuple(shapes)
        self.root = root
        self.repeats = list(repeats)
        self.is_guided = is_guided
        self.batch_dim = batch_dim
        self.settled = settled
        self.rows = count_samples(self.shapes, batch_dim)
        self._known: dict[Any, Rows | None] = {}
        self._by_row: CallRows | None = None

    def inside(self, shapes: Iterable[Shape], is_generating: bool) -> CallRows:
        """What a forward inside this call knows. Its rows are this call's samples, each as often as
        `generate` has it, or as this call's inputs have it.
        """
        inner = CallRows(
            self.samples, shapes, self.root, self.repeats, self.is_guided, self.batch_dim
        )
        if inner.rows is not None and self.samples and inner.rows != self.samples:
            times, rest = divmod(inner.rows, self.samples)
            is_doubled = self.is_guided and times % 2 == 0 and times // 2 in self.repeats
            known = is_generating or times in [*self.counts("main"), *self.counts("decoder")]
            if known and not rest and not is_doubled:
                inner.repeats.append(times)
        return inner

    def of_some(self, samples: int, settled: Rows) -> CallRows:
        """What is known of some of the samples, whose rows are shared out as is known."""
        every = self.samples or 1
        own = [
            Shape(name, (sizes[0] // every * samples, *sizes[1:]), is_floating)
            for name, sizes, is_floating in self.shapes
            if sizes[0] == self.rows
        ]
        return CallRows(samples, own, self.root, self.repeats, settled=settled)

    def by_row(self) -> CallRows:
        """The same for rows of the forward in place of samples; each of several texts of a sample
        is a row.
        """
        if self._by_row is None:
            shapes, times = self.shapes, 1
            ids = next(
                (s.sizes for s in shapes if s.name == "input_ids" and len(s.sizes) == 3), None
            )
            if ids is not None:
                times = ids[1]
                shapes = tuple(
                    Shape(n, (z[0] * z[1], *z[2:]), f) if z[:2] == ids[:2] else Shape(n, z, f)
                    for n, z, f in shapes
                )
            rows = self.samples if self.rows is None else self.rows * times
            is_settled = self.settled is not None and self.settled.owner is None
            settled = IN_ORDER if is_settled else None
            self._by_row = CallRows(
                rows, shapes, self.root, batch_dim=self.batch_dim, settled=settled
            )
            self._by_row.are_rows = True
        return self._by_row

    def share(self, x: Tensor, layout: RowLayout = ORDINARY) -> Rows | None:
        """How a layer's input is shared out; None where nothing tells."""
        samples, leading = self.samples, x.dim() - layout.features
        if samples is None or (samples == 1 and not self.are_rows):
            return IN_ORDER
        sizes = shapes(x)[0]
        if sizes[0] == samples and leading and layout.samples_first:
            return IN_ORDER
        if self.settled is not None:
            return self.settled
        if layout.expert is not None or torch.compiler.is_compiling():  # sizes may be free there
            return self._share(x, sizes, leading, layout)
        key = id(layout), leading, sizes[:2], x.device
        if key not in self._known:
            self._known[key] = self._share(x, sizes, leading, layout)
        return self._known[key]

    def _share(
        self, x: Tensor, sizes: Sequence[int], leading: int, layout: RowLayout
    ) -> Rows | None:
        first, second = sizes[0], sizes[1] if leading > 1 else None
        if leading < 1 or (layout.sequence_first and second is None):
            return None
        if second is not None and (layout.sequence_first or layout.is_declared):
            rows = self._in_blocks(second, x.device)
            if rows is not None or layout.sequence_first:
                return rows if rows is None else rows._replace(turned=True)
        if layout.expert is not None and second is None:
            return self._of_expert(x, layout)
        rows = self._in_blocks(first, x.device)
        if rows is None and second is not None:
            rows = self._flattened(first, x.device, self.counts(layout.stream, without_last=True))
        if rows is not None:
            return rows
        if layout.is_grouped and first % self.samples == 0:  # type: ignore[operator]
            return IN_ORDER
        counts = self.counts(layout.stream)
        if second is not None and first in counts:
            rows = self._in_blocks(second, x.device)
            if rows is not None:
                return rows._replace(turned=True)
        return IN_ORDER if first == 0 else self._flattened(first, x.device, counts)

    def _flattened(self, rows: int, device: torch.device, counts: Iterable[int]) -> Rows | None:
        """How rows are shared out of which each of the forward's has some number, one after the
        other.
        """
        shared = (self._in_blocks(rows, device, count) for count in counts)
        return next((rows for rows in shared if rows is not None), None)

    def _in_blocks(self, rows: int, device: torch.device, count: int = 1) -> Rows | None:
        """How rows are shared out of which each of the forward's has `count`, one after the other."""
        samples: Any = self.samples
        for times in self.repeats:
            if rows == samples * times * count:
                return IN_ORDER
        for times in self.repeats if self.is_guided else ():
            if rows == 2 * samples * times * count:
                owner = torch.arange(samples, device=device).repeat_interleave(times)
                return Rows(owner=owner.repeat(2).repeat_interleave(count))
        return None

    def _of_expert(self, x: Tensor, layout: RowLayout) -> Rows | None:
        """How the tokens are shared out that an expert is handed: those that the mixture of experts
        says, or all tokens of the call.
        """
        counts = self.counts(layout.stream) or [1]
        routed = ROUTED_TOKENS.current
        tokens = None if routed is None else routed.tokens(layout.expert or "")
        number = x.shape[0] if tokens is None else routed.number  # type: ignore[union-attr]
        if tokens is not None and tokens.shape[0] != x.shape[0]:
            return None
        if self.rows is None or number not in [self.rows * count for count in counts]:
            return None
        rows = self._in_blocks(number, x.device, number // self.rows)
        if tokens is None or rows is None:
            return rows
        each: Any = number // self.samples  # type: ignore[operator]
        return Rows(owner=tokens // each if rows.owner is None else rows.owner[tokens])

    def tokens(self, stream: str) -> int | None:
        """How many tokens the forward is given, if it is given tokens."""
        known = {shape.name: shape.sizes for shape in self.shapes if len(shape.sizes) > 1}
        return next(
            (known[name][1 - self.batch_dim] for name in _TOKENS[stream] if name in known), None
        )

    def has_more_than_tokens(self) -> bool:
        """Whether the forward is given features of something else too."""
        known = (*_TOKENS["main"], *_TOKENS["decoder"])
        return any(
            s.is_floating and s.name not in known and not _NO_TOKENS.search(s.name)
            for s in self.shapes
        )

    def counts(self, stream: str, without_last: bool = False) -> list[int]:
        """How many tokens a row of the forward has, by its inputs: of `[rows, a, b]` there can be
        `a` or `a · b`.

        Args:
            stream: Which tokens.
            without_last: Only where there are further ones inside each, as of `a`.
        """
        counts: list[int] = []
        for name, sizes, is_floating in self.shapes:
            of_decoder = name.startswith("decoder_")
            if _NO_TOKENS.search(name) or (
                of_decoder != (stream == "decoder") and name != "labels"
            ):
                continue
            if len(sizes) <= self.batch_dim or sizes[self.batch_dim] != self.rows:
                continue
            inner = [size for dim, size in enumerate(sizes) if dim != self.batch_dim]
            for size in self._leading(name, inner, is_floating, without_last):
                if size not in counts:
                    counts.append(size)
        return counts

    def _leading(
        self, name: str, sizes: list[int], is_floating: bool, without_last: bool
    ) -> Iterator[int]:
        """Products of the sizes that do not count features or places in an image; of these the
        number of patches.
        """
        is_image = is_floating and any(word in name for word in ("pixel", "image", "video"))
        dims = len(sizes) - (3 if is_image else int(is_floating) + int(without_last))
        product = 1
        for size in sizes[: max(dims, 0)]:
            product *= size
            yield product
        if is_image and not without_last and len(sizes) >= 3:
            yield from (product * patches for patches in self._patches(*sizes[-2:]))

    def _patches(self, height: int, width: int) -> Iterator[int]:
        """How many tokens an image can be, by the model's config: patches, with or without one for
        the whole and registers.
        """
        config = getattr(self.root, "config", None)
        for part in (config, getattr(config, "vision_config", None)):
            patch = getattr(part, "patch_size", None)
            high, wide = (
                patch if isinstance(patch, (list, tuple)) and len(patch) == 2 else (patch, patch)
            )
            if isinstance(high, int) and isinstance(wide, int) and high and wide:
                number = (height // high) * (width // wide)
                yield from (
                    number,
                    number + 1,
                    number + 1 + getattr(part, "num_register_tokens", 0),
                )

    def refusal(self, x: Tensor, layer: Any, remedy: str) -> PeftValueError:
        """The error for a layer of which nothing tells whose its rows are.

        Args:
            x: The layer's input.
            layer: The layer.
            remedy: What to do, beside leaving the layer out.
        """
        layout: RowLayout = layer.layout
        modules = () if self.root is None else walk(self.root)
        name = (
            next((path for path, module in modules if module is layer), "") or type(layer).__name__
        )
        if layout.expert is not None:
            reason = "it is an expert, which is handed some of the tokens, and nothing tells which"
        elif x.shape[0] == 1:
            reason = "all of them share it"
        else:
            counts = sorted({*self.repeats, *self.counts(layout.stream)})
            number, where = (
                " or ".join(map(str, counts)),
                "second" if layout.sequence_first else "first",
            )
            reason = f"here a sample can have {number} rows along the {where} dimension"
        return PeftValueError(
            f"{name} sees an input of shape {list(x.shape)} in a call of {self.samples} samples, "
            "and nothing tells which "
            f"of them its rows belong to: {reason}. {remedy}, or call the model with one sample at "
            "a time, or leave this layer out "
            "of `target_modules`."
        )


def of_call(
    root: nn.Module | None, arguments: Mapping[str, Any], besides: Iterable[str] = ()
) -> CallRows:
    """What a call of a model knows.

    Args:
        root: The model.
        arguments: Its arguments by name.
        besides: Names of arguments that are not for the model.
    """
    batch_dim = int(is_sequence_first(root))
    shapes = describe(arguments, besides)
    is_vector = all(len(shape.sizes) == 1 and shape.is_floating for shape in shapes)
    if is_vector and not any(
        isinstance(value, (list, tuple, Mapping)) for value in arguments.values()
    ):
        shapes = []  # of a single sample
    return CallRows(count_samples(shapes, batch_dim), shapes, root, batch_dim=batch_dim)


def of_generation(
    root: nn.Module, arguments: Mapping[str, Any], besides: Iterable[str] = ()
) -> CallRows:
    """What a call of a model's `generate` knows: it has each sample as often as there are beams or
    sequences to return.
    """
    rows = of_call(root, arguments, besides)
    for name in ("num_beams", "num_return_sequences"):
        times = generation_option(root, arguments, name)
        if isinstance(times, int) and times not in rows.repeats:
            rows.repeats.append(times)
    guidance = generation_option(root, arguments, "guidance_scale")
    rows.is_guided = guidance is not None and guidance != 1
    return rows


def generation_option(root: nn.Module, arguments: Mapping[str, Any], name: str) -> Any:
    """An option of `generate`: as given, or in the config that is given, or in the model's."""
    for config in (arguments.get("generation_config"), getattr(root, "generation_config", None)):
        if arguments.get(name) is None and getattr(config, name, None) is not None:
            return getattr(config, name)
    return arguments.get(name)


def entrances(root: Any) -> list[nn.Module]:
    """The modules that `generate` calls by themselves: the model, its encoder, a language model
    inside it.
    """
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        parts = [root.get_encoder()] if hasattr(root, "get_encoder") else []
    else:
        parts = [
            module for _, module in walk(root) if callable(getattr(type(module), "generate", None))
        ]
    return [root, *(part for part in parts if isinstance(part, nn.Module) and part is not root)]


def positional_names(function: Any) -> tuple[str, ...]:
    """The names of a function's arguments that can be given by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name. Those that have none are counted, and what a mapping holds counts
    by itself.
    """
    bound: dict[str, Any] = {}
    for i, value in enumerate(args):
        if isinstance(value, Mapping):
            bound.update(value)
        else:
            bound[names[i] if i < len(names) else str(i)] = value
    return {**bound, **kwargs}


def describe(arguments: Mapping[str, Any], besides: Iterable[str] = ()) -> list[Shape]:
    """The shapes of a call's tensors."""
    found = []
    for name, value in arguments.items():
        if name == "encoder_outputs" and isinstance(value, (tuple, Mapping)) and len(value):
            name, value = "encoder_hidden_states", value[0]  # type: ignore[index]
        if isinstance(value, Tensor) and value.dim() > 0 and name not in besides:
            with untraced():
                sizes = (
                    (value.size(0),) if value.is_nested else tuple(value.shape)
                )  # a nested tensor may have no `shape`
            found.append(Shape(name, sizes, value.is_floating_point()))
    return found


def count_samples(shapes: Iterable[Shape], batch_dim: int = 0) -> int | None:
    """How many samples a call has: as the first of its arguments says that is known by its name, or
    the first.
    """
    fitting = {name: sizes for name, sizes, _ in shapes if len(sizes) > batch_dim}
    likely = [name for name in fitting if not _NO_TOKENS.search(name)]
    for name in (*_INPUTS, *likely, *fitting):
        if name in fitting:
            return fitting[name][batch_dim]
    return None
