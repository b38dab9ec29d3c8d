# SPDX-License-Identifier: Apache-2.0
"""`CheckpointFormat`: the tensors of a method's adapters in a checkpoint, and those in a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

C = TypeVar("C")


class ModuleShape(NamedTuple):
    """The size of an adapted module and an adapter's rank there, as the shapes of its tensors tell.

    Attributes:
        out_features: Rows of the weight.
        in_features: Columns of the weight; of a convolution, all input channels, or those of a
            group where `groups` is 1.
        rank: The adapter's rank; None if its factors are full.
        kernel_size: Empty unless the tensors show a convolution.
        groups: The convolution's groups, if the tensors show them.
        is_table: True for an embedding.
    """

    out_features: int
    in_features: int
    rank: int | None
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    is_table: bool = False


Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the tensors of one module by the end of their keys, such as "lora_A.weight"."""


class FusedPart(NamedTuple):
    """An adapter of one expert's layer, which is a part of a stack now.

    Args:
        path: The layer's former path.
        part: Which of the layers whose weights lie one below the other.
        expert: The expert's index.
        tensors: The adapter's tensors by the end of their keys.
    """

    path: str
    part: int
    expert: int
    tensors: Mapping[str, Tensor]


class CheckpointFormat(Generic[C]):
    """Conversion of an adapter's tensors between a model and a checkpoint.

    This class converts nothing. A method whose checkpoints differ sets an instance of a subclass as
    the `checkpoint_format` of its tuner. `C` is the class of its configs.
    """

    # Tensors that a checkpoint may have in parts, with the names and dtypes of the parts; for the
    # loader of transformers.
    parts: ClassVar[Mapping[str, Mapping[str, torch.dtype]]] = {}
    # Containers of modules with one parameter, and its name, which the keys leave out.
    inner_names: ClassVar[Mapping[str, str]] = {}
    # Parameters with one entry for each token of an embedding, and the dimension.
    token_dims: ClassVar[Mapping[str, int]] = {}
    # Tensors in which minus infinity is an ordinary value.
    masked: ClassVar[tuple[str, ...]] = ()
    # Names of tensors in other programs' files, at the end of a key, and the names here.
    other_names: ClassVar[Mapping[str, str]] = {}
    # Ends of keys of a single expert's adapter, if the next two methods make one of a stack.
    expert_tensors: ClassVar[tuple[str, ...]] = ()

    def stack_experts(
        self, config: C, parts: Sequence[FusedPart], shape: tuple[int, ...] | None
    ) -> tuple[dict[str, Tensor], Mapping[str, float]]:
        """Return the adapter of a stack `[experts, out, in]` by the ends of its keys, made of those
        of single experts, and its `stack_settings`.
        """
        raise NotImplementedError

    def stack_settings(self, config: C, paths: Mapping[int, str]) -> Mapping[str, float]:
        """Return the values of pattern fields for a stack, from a former path of each part."""
        raise NotImplementedError

    def fit_to_stacks(self, config: C) -> None:
        """Change the settings of a config that adapters of stacks do not have, with a warning."""

    def module_shape(self, shapes: Shapes) -> ModuleShape | None:
        """Return the size of a module from the shapes of an adapter's tensors for it, and of those
        that all modules share; None if they don't tell.
        """
        return None

    def export_state(self, state: dict[str, Tensor], config: C) -> dict[str, Tensor]:
        """Convert an adapter's tensors in a model, by checkpoint key, to a checkpoint's."""
        return state

    def import_state(
        self, state: dict[str, Tensor], config: C, names: Collection[str]
    ) -> dict[str, Tensor]:
        """Convert the tensors of a checkpoint to those of an adapter in a model.

        Args:
            names: Keys of the tensors that the adapter in the model has; they show its storage
                format.
        """
        return state
