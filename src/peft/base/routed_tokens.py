# SPDX-License-Identifier: Apache-2.0
"""Which tokens a mixture of experts hands to which expert, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from .call_stack import CallStack


class RoutedTokens:
    """The tokens that experts are handed, in the order in which they are.

    Args:
        choose: Gives `[experts, choices, tokens]`, not 0 where a token goes to an expert.
        places: The experts' places in it, by name.
    """

    def __init__(self, choose: Callable[[], Tensor], places: Mapping[str, int]) -> None:
        self.choose = choose
        self.places = places
        self._tokens: dict[str, Tensor] = {}

    @cached_property
    def chosen(self) -> Tensor:
        """What `choose` gives."""
        return self.choose()

    @property
    def number(self) -> int:
        """How many tokens there are, handed to an expert or not."""
        return self.chosen.shape[2]

    def tokens(self, expert: str) -> Tensor | None:
        """The numbers of an expert's tokens; None if there is no such expert."""
        if expert not in self.places:
            return None
        if expert not in self._tokens:
            self._tokens[expert] = torch.where(self.chosen[self.places[expert]])[1]
        return self._tokens[expert]


ROUTED_TOKENS: CallStack[RoutedTokens] = CallStack()
