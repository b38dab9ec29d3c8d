# SPDX-License-Identifier: Apache-2.0
"""The name of LoHa's layer class, of which there are no objects."""

from __future__ import annotations

from typing import Any, ClassVar

from ...utils.error import PeftNotSupportedError
from ...utils.peft_types import registered_methods
from ..lycoris_utils import LycorisLayer


class LoHaLayer(LycorisLayer):
    """A layer with LoHa adapters, which this package does not provide. Clients ask what its parameters would be called.

    Raises:
        PeftNotSupportedError: Always.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise PeftNotSupportedError(f"LoHa is not provided by this package; it provides {', '.join(registered_methods())}.")
