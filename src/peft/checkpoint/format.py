# SPDX-License-Identifier: Apache-2.0
"""`CheckpointFormat`: conversion of an adapter's tensors between a model and a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

C = TypeVar("C")


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

    def export_state(self, state: dict[str, Tensor], config: C) -> dict[str, Tensor]:
        """Convert the tensors of an adapter in a model to those of a checkpoint.

        Args:
            state: Tensors by checkpoint key.
            config: The adapter's config.
        """
        return state

    def import_state(
        self, state: dict[str, Tensor], config: C, names: Collection[str]
    ) -> dict[str, Tensor]:
        """Convert the tensors of a checkpoint to those of an adapter in a model.

        Args:
            state: Tensors by checkpoint key.
            config: The adapter's config.
            names: Keys of the tensors that the adapter in the model has; they show its storage
                format.
        """
        return state
