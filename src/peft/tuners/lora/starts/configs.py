# SPDX-License-Identifier: Apache-2.0
"""Settings of the starts that have some."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from ....base.errors import PeftTypeError, PeftValueError
from ....base.field_help import add_field_help
from ....base.validation import at_least, boolean, choice, number, text
from .gradient import DIRECTIONS, SCALES

S = TypeVar("S", bound="StartConfig")


@dataclass
class StartConfig:
    """Base class: values are checked when an object is made.

    Raises:
        PeftValueError: Values are not allowed; the message names all.
    """

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise PeftValueError(f"{type(self).__name__}: " + " ".join(problems))

    def _problems(self) -> Iterator[str]:
        yield from ()

    @classmethod
    def of(cls: type[S], value: object, name: str) -> S:
        """Return settings given as an object, as a dictionary (of a file), or as None."""
        if isinstance(value, cls):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise PeftTypeError(
                f"`{name}`={value!r} must be a `{cls.__name__}`, a dictionary or None."
            )
        known = {item.name for item in fields(cls)}
        given: Iterable[tuple[str, object]] = (value or {}).items()
        return cls(**{key: entry for key, entry in given if key in known})


@add_field_help
@dataclass
class LoftQConfig(StartConfig):
    """Settings of LoftQ.

    Args:
        loftq_bits: Bits of the quantized weight: 4 (NF4) or 8 (integers).
        loftq_iter: Turns of quantizing the weight and factorizing the rest.
    """

    __module__ = "peft.tuners.lora.config"  # where pickles look for it

    loftq_bits: int = 4
    loftq_iter: int = 1

    def _problems(self) -> Iterator[str]:
        yield from choice("loftq_bits", self.loftq_bits, (4, 8))
        yield from at_least("loftq_iter", self.loftq_iter)


@add_field_help
@dataclass
class EvaConfig(StartConfig):
    """Settings of EVA.

    Args:
        rho: A layer's rank can grow to `rho` times its configured one; 1 leaves the ranks.
        tau: Cosine similarity between a direction after one batch and after the next from which it
            counts as found.
        use_label_mask: Leave out tokens without a label.
        label_mask_value: The label of tokens without one.
        whiten: Divide each direction by the square root of its singular value.
        adjust_scaling_factors: Change alpha with the rank, so that the scale stays.
    """

    __module__ = "peft.tuners.lora.config"  # where pickles look for it

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def _problems(self) -> Iterator[str]:
        yield from number("rho", self.rho)
        yield from number("tau", self.tau)
        if isinstance(self.rho, (int, float)) and self.rho < 1:
            yield f"`rho` must be >= 1.0, found {self.rho!r}."
        if isinstance(self.tau, (int, float)) and not 0 <= self.tau <= 1:
            yield f"`tau` must be between 0.0 and 1.0, found {self.tau!r}."
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            yield from boolean(name, getattr(self, name))


@add_field_help
@dataclass
class CordaConfig(StartConfig):
    """Settings of CorDA.

    Args:
        cache_file: A file of the components: read if it exists, else written.
        covariance_file: A file of the covariances, for adapters of other ranks; it is as large as
            the model. Read if it exists, else written.
        corda_method: "ipm" starts from the components that the inputs use most; "kpm" from those
            they use least, to keep what the model knows about them.
        verbose: Show a progress bar.
        use_float16_for_covariance: Compute covariances in the dtype of the inputs, which takes half
            the memory for a model of 16 bits.
        prune_temporary_fields: False leaves covariances and counts on the layers.
    """

    __module__ = "peft.tuners.lora.config"  # where pickles look for it

    cache_file: str | os.PathLike[str] | None = None
    covariance_file: str | os.PathLike[str] | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        for name in ("cache_file", "covariance_file"):
            file = getattr(self, name)
            setattr(self, name, os.fspath(file) if isinstance(file, os.PathLike) else file)
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        yield from choice("corda_method", self.corda_method, ("ipm", "kpm"))
        for name in ("cache_file", "covariance_file"):
            yield from text(name, getattr(self, name))
        for name in ("verbose", "use_float16_for_covariance", "prune_temporary_fields"):
            yield from boolean(name, getattr(self, name))


@add_field_help
@dataclass
class LoraGAConfig(StartConfig):
    """Settings of LoRA-GA.

    Args:
        direction: The gradient's singular values that `A` and `B` start from: "ArB2r", "A2rBr",
            "ArBr" or "random", see `starts/gradient.py`.
        scale: Scale of the factors: "stable", "weight_svd", "gd_scale" or "unit".
        stable_gamma: `γ` of "stable"; larger values start smaller.
    """

    __module__ = "peft.tuners.lora.config"  # where pickles look for it

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def _problems(self) -> Iterator[str]:
        yield from choice("direction", self.direction, DIRECTIONS)
        yield from choice("scale", self.scale, SCALES)
        yield from number("stable_gamma", self.stable_gamma, positive=True)
