# SPDX-License-Identifier: Apache-2.0
"""The sample of each row of a layer's input.

A layer sees `samples × repeats × tokens` rows, where `generate` sets the repeats. If its input has
another number of rows, their owners are unknown, and the error names the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..containers import walk
from ..errors import PeftValueError
from ..tracing import is_one_of, shapes
from .arguments import NO_TOKENS, ArgumentShape, argument_shapes, count_samples, generation_option
from .layout import SAMPLES_FIRST, RowLayout, is_sequence_first
from .stack import CallStack

# Arguments that hold the tokens of the encoder or single model, and of the decoder.
_TOKENS = {
    "main": ("input_ids", "inputs_embeds", "encoder_hidden_states"),
    "decoder": ("decoder_input_ids", "decoder_inputs_embeds", "labels"),
}


class LayerWithLayout(Protocol):
    """A layer that tells where the samples lie in its input."""

    @property
    def layout(self) -> RowLayout:
        """The layout of its input."""


class RowOwners(NamedTuple):
    """The sample of each row of a layer's input.

    Attributes:
        sequence_first: The rows lie along the second dimension of the input.
        owner: The sample of each row, `[rows]`; None if each sample has the same number of
            consecutive rows.
    """

    sequence_first: bool = False
    owner: Tensor | None = None

    def expand(self, values: Tensor, x: Tensor) -> Tensor:
        """Return values of samples as values of the rows of a layer's input.

        Args:
            values: `[samples, …]`.
            x: The input, `[rows, *leading, in]`, or `[sequence, rows, *leading, in]` if
                `sequence_first`.

        Returns:
            `values` itself if the rows are in order; else `[rows, …]`, or
            `[sequence, rows, *leading, …]` if `sequence_first`.
        """
        if self.owner is not None:
            values = values.index_select(0, self.owner)
        if not self.sequence_first:
            return values
        (samples, *inner), (_, rows, *_) = shapes(values, x)
        if samples != rows:
            values = values.repeat_interleave(rows // samples, 0)
        values = values.view(1, rows, *[1] * (x.dim() - 3), *inner)
        return values.expand(*x.shape[:-1], *inner)


IN_ORDER = RowOwners()


class ExpertTokens:
    """The tokens that a mixture of experts routes to each expert, in the expert's order.

    Args:
        choose: Returns `[experts, choices, tokens]`, nonzero where a token goes to an expert.
        experts: Index of each expert in it, by name.
    """

    def __init__(self, choose: Callable[[], Tensor], experts: Mapping[str, int]) -> None:
        self.choose = choose
        self.experts = experts
        self._tokens: dict[str, Tensor] = {}

    @cached_property
    def chosen(self) -> Tensor:
        """The result of `choose`, computed once."""
        return self.choose()

    @property
    def number(self) -> int:
        """Number of tokens of the call, routed to an expert or not."""
        return self.chosen.shape[2]

    def tokens(self, expert: str) -> Tensor | None:
        """Return the indices of an expert's tokens; None if there is no such expert."""
        if expert not in self.experts:
            return None
        if expert not in self._tokens:
            self._tokens[expert] = torch.where(self.chosen[self.experts[expert]])[1]
        return self._tokens[expert]


MOE_TOKENS: CallStack[ExpertTokens] = CallStack()


class CallRows:
    """Counts of a call's samples, repeats and tokens, from which the owners of rows follow.

    Args:
        samples: Number of samples; None if the call does not tell.
        shapes: Shapes of the arguments of the forward in progress.
        root: The model, in which a layer's name is looked up.
        repeats: How many rows of the forward a sample can have.
        is_guided: True if the forward can have twice as many rows, the second half for
            classifier-free guidance of the first.
        batch_dim: The dimension of the arguments along which the samples lie.
        fixed: The owners of the rows of every layer, where they are known beforehand.

    Attributes:
        rows: Rows of the forward.
        are_rows: True if `samples` counts the forward's rows: each decides for itself, even if it
            is the only one.
    """

    are_rows = False

    def __init__(
        self,
        samples: int | None,
        shapes: Iterable[ArgumentShape] = (),
        root: nn.Module | None = None,
        repeats: Iterable[int] = (1,),
        is_guided: bool = False,
        batch_dim: int = 0,
        fixed: RowOwners | None = None,
    ) -> None:
        self.samples = samples
        self.shapes = tuple(shapes)
        self.root = root
        self.repeats = list(repeats)
        self.is_guided = is_guided
        self.batch_dim = batch_dim
        self.fixed = fixed
        self.rows = count_samples(self.shapes, batch_dim)
        self._owners_by_input: dict[object, RowOwners | None] = {}
        self._by_row: CallRows | None = None

    def nested(self, shapes: Iterable[ArgumentShape], is_generating: bool) -> CallRows:
        """Return the counts of a forward inside this call, which can repeat each of its samples."""
        inner = CallRows(
            self.samples, shapes, self.root, self.repeats, self.is_guided, self.batch_dim
        )
        if inner.rows is not None and self.samples and inner.rows != self.samples:
            times, rest = divmod(inner.rows, self.samples)
            is_doubled = self.is_guided and times % 2 == 0 and times // 2 in self.repeats
            counts = (*self.counts("main"), *self.counts("decoder"))
            can_repeat = is_generating or is_one_of(times, counts)
            if can_repeat and not rest and not is_doubled:
                inner.repeats.append(times)
        return inner

    def subset(self, samples: int, fixed: RowOwners) -> CallRows:
        """Return the counts for only some of the samples, with the owners of their rows."""
        all_samples = self.samples or 1
        shapes = [
            shape._replace(sizes=(shape.sizes[0] // all_samples * samples, *shape.sizes[1:]))
            for shape in self.shapes
            if shape.sizes[0] == self.rows
        ]
        return CallRows(samples, shapes, self.root, self.repeats, fixed=fixed)

    def by_row(self) -> CallRows:
        """Return the counts with each row of the forward, or each of its texts, as a sample."""
        if self._by_row is None:
            shapes, texts = self.shapes, 1
            ids = next((sizes for name, sizes, _ in shapes if name == "input_ids"), ())
            if len(ids) == 3:  # [rows, texts, tokens]
                texts = ids[1]
                shapes = tuple(
                    shape._replace(sizes=(ids[0] * texts, *shape.sizes[2:]))
                    if shape.sizes[:2] == ids[:2]
                    else shape
                    for shape in shapes
                )
            rows = self.samples if self.rows is None else self.rows * texts
            is_fixed = self.fixed is not None and self.fixed.owner is None
            self._by_row = CallRows(
                rows,
                shapes,
                self.root,
                batch_dim=self.batch_dim,
                fixed=IN_ORDER if is_fixed else None,
            )
            self._by_row.are_rows = True
        return self._by_row

    def owners(self, x: Tensor, layout: RowLayout = SAMPLES_FIRST) -> RowOwners | None:
        """Return the owners of the rows of a layer's input; None where they are unknown."""
        samples, leading = self.samples, x.dim() - layout.features
        if samples is None or (samples == 1 and not self.are_rows):
            return IN_ORDER
        sizes = shapes(x)[0]
        if sizes[0] == samples and leading and layout.samples_first:
            return IN_ORDER
        if self.fixed is not None:
            return self.fixed
        # Under `torch.compile` sizes may be symbolic, which are no dictionary keys.
        if layout.expert is not None or torch.compiler.is_compiling():
            return self._owners(x, sizes, leading, layout, samples)
        key = id(layout), leading, sizes[:2], x.device
        if key not in self._owners_by_input:
            self._owners_by_input[key] = self._owners(x, sizes, leading, layout, samples)
        return self._owners_by_input[key]

    def _owners(
        self, x: Tensor, sizes: Sequence[int], leading: int, layout: RowLayout, samples: int
    ) -> RowOwners | None:
        first, second = sizes[0], sizes[1] if leading > 1 else None
        if leading < 1 or (layout.sequence_first and second is None):
            return None
        if second is not None and (layout.sequence_first or layout.is_declared):
            owners = self._in_blocks(second, x.device)
            if owners is not None or layout.sequence_first:
                return owners if owners is None else owners._replace(sequence_first=True)
        if layout.expert is not None and second is None:
            return self._of_expert(x, layout, layout.expert, samples)
        owners = self._in_blocks(first, x.device)
        if owners is None and second is not None:
            owners = self._flattened(first, x.device, self.counts(layout.stream, without_last=True))
        if owners is not None:
            return owners
        if layout.is_grouped and first % samples == 0:
            return IN_ORDER
        counts = self.counts(layout.stream)
        if second is not None and is_one_of(first, counts):
            owners = self._in_blocks(second, x.device)
            if owners is not None:
                return owners._replace(sequence_first=True)
        if first == 0:
            return IN_ORDER
        is_packed = second is None and self._is_packed(first)
        return None if is_packed else self._flattened(first, x.device, counts)

    def _is_packed(self, rows: int) -> bool:
        """Return True if `rows` are those of an argument in which samples have any number of rows,
        as patches of images of several sizes, or several images a sample.
        """
        return self.batch_dim == 0 and any(
            s.is_floating and len(s.sizes) > 1 and s.sizes[0] == rows != self.rows
            for s in self.shapes
            if not NO_TOKENS.search(s.name)
        )

    def _flattened(
        self, rows: int, device: torch.device, counts: Iterable[int]
    ) -> RowOwners | None:
        """Return the owners if `rows` is the forward's rows times one of `counts`."""
        owners = (self._in_blocks(rows, device, count) for count in counts)
        return next((found for found in owners if found is not None), None)

    def _in_blocks(self, rows: int, device: torch.device, count: int = 1) -> RowOwners | None:
        """Return the owners if `rows` is the forward's rows, each `count` times in a block."""
        samples = self.samples or 0
        for times in self.repeats:
            if rows == samples * times * count:
                return IN_ORDER
        for times in self.repeats if self.is_guided else ():
            if rows == 2 * samples * times * count:
                owner = torch.arange(samples, device=device).repeat_interleave(times)
                return RowOwners(owner=owner.repeat(2).repeat_interleave(count))
        return None

    def _of_expert(
        self, x: Tensor, layout: RowLayout, expert: str, samples: int
    ) -> RowOwners | None:
        """Return the owners of the tokens that are routed to an expert, or of all tokens."""
        counts = self.counts(layout.stream) or [1]
        chosen = MOE_TOKENS.current
        tokens, number = None, x.shape[0]
        if chosen is not None and (tokens := chosen.tokens(expert)) is not None:
            number = chosen.number
            if tokens.shape[0] != x.shape[0]:
                return None
        if self.rows is None or not is_one_of(number, (self.rows * n for n in counts)):
            return None
        owners = self._in_blocks(number, x.device, number // self.rows)
        if tokens is None or owners is None:
            return owners
        each = number // samples
        return RowOwners(owner=tokens // each if owners.owner is None else owners.owner[tokens])

    def tokens(self, stream: str) -> int | None:
        """Return the number of tokens in a row of the inputs; None without token inputs."""
        sizes = {shape.name: shape.sizes for shape in self.shapes if len(shape.sizes) > 1}
        return next(
            (sizes[name][1 - self.batch_dim] for name in _TOKENS[stream] if name in sizes), None
        )

    def has_more_than_tokens(self) -> bool:
        """Return True if the forward also gets features that are not tokens, as images."""
        tokens = (*_TOKENS["main"], *_TOKENS["decoder"])
        return any(
            s.is_floating and s.name not in tokens and not NO_TOKENS.search(s.name)
            for s in self.shapes
        )

    def counts(self, stream: str, without_last: bool = False) -> list[int]:
        """Return the numbers of tokens of a row: `a` or `a · b` for an input `[rows, a, b]`."""
        counts: list[int] = []
        for name, sizes, is_floating in self.shapes:
            of_decoder = name.startswith("decoder_")
            if NO_TOKENS.search(name) or (of_decoder != (stream == "decoder") and name != "labels"):
                continue
            if len(sizes) <= self.batch_dim or sizes[self.batch_dim] != self.rows:
                continue
            inner = [size for dim, size in enumerate(sizes) if dim != self.batch_dim]
            for size in self._products(name, inner, is_floating, without_last):
                if size not in counts:
                    counts.append(size)
        return counts

    def _products(
        self, name: str, sizes: list[int], is_floating: bool, without_last: bool
    ) -> Iterator[int]:
        """Yield products of an input's leading sizes, and the numbers of patches of an image."""
        is_image = is_floating and any(word in name for word in ("pixel", "image", "video"))
        dims = len(sizes) - (3 if is_image else int(is_floating) + int(without_last))
        product = 1
        for size in sizes[: max(dims, 0)]:
            product *= size
            yield product
        if is_image and not without_last and len(sizes) >= 3:
            yield from (product * patches for patches in self._patches(*sizes[-2:]))

    def _patches(self, height: int, width: int) -> Iterator[int]:
        """Yield the numbers of tokens of an image: its patches; with class and register tokens."""
        config = getattr(self.root, "config", None)
        for part in (config, getattr(config, "vision_config", None)):
            patch = getattr(part, "patch_size", None)
            pair = patch if isinstance(patch, (list, tuple)) else (patch, patch)
            high, wide = pair if len(pair) == 2 else (None, None)
            if isinstance(high, int) and isinstance(wide, int) and high and wide:
                number = (height // high) * (width // wide)
                yield from (
                    number,
                    number + 1,
                    number + 1 + getattr(part, "num_register_tokens", 0),
                )

    def name_of(self, layer: object) -> str:
        """Return a layer's path in the model, or its class if it is not in it."""
        modules = () if self.root is None else walk(self.root)
        return (
            next((path for path, module in modules if module is layer), "") or type(layer).__name__
        )

    def error(self, x: Tensor, layer: LayerWithLayout, remedy: str) -> PeftValueError:
        """Return the error for a layer whose rows have no known owners, with a further remedy."""
        layout = layer.layout
        if layout.expert is not None:
            reason = "it is an expert, which is handed some of the tokens, and nothing tells which"
        elif x.shape[0] == 1:
            reason = "all of them share it"
        else:
            counts = sorted({*self.repeats, *self.counts(layout.stream)})
            number = " or ".join(map(str, counts))
            where = "second" if layout.sequence_first else "first"
            reason = f"here a sample can have {number} rows along the {where} dimension"
        return PeftValueError(
            f"{self.name_of(layer)} sees an input of shape {list(x.shape)} in a call of "
            f"{self.samples} samples, "
            f"and nothing tells which of them its rows belong to: {reason}. {remedy}, or call the "
            "model with one sample at a time, or leave this layer out of `target_modules`."
        )


def call_rows(
    root: nn.Module | None, arguments: Mapping[str, object], excluded: Iterable[str] = ()
) -> CallRows:
    """Return the counts of a call of a model by its arguments, leaving out those in `excluded`."""
    batch_dim = int(is_sequence_first(root))
    shapes = argument_shapes(arguments, excluded)
    is_vector = all(len(shape.sizes) == 1 and shape.is_floating for shape in shapes)
    if is_vector and not any(
        isinstance(value, (list, tuple, Mapping)) for value in arguments.values()
    ):
        shapes = []  # of a single sample
    return CallRows(count_samples(shapes, batch_dim), shapes, root, batch_dim=batch_dim)


def generation_rows(
    root: nn.Module, arguments: Mapping[str, object], excluded: Iterable[str] = ()
) -> CallRows:
    """Return the counts of a call of `generate`, with beams or returned sequences as repeats."""
    rows = call_rows(root, arguments, excluded)
    for name in ("num_beams", "num_return_sequences"):
        times = generation_option(root, arguments, name)
        if isinstance(times, int) and times not in rows.repeats:
            rows.repeats.append(times)
    guidance = generation_option(root, arguments, "guidance_scale")
    rows.is_guided = guidance is not None and guidance != 1
    return rows
