# SPDX-License-Identifier: Apache-2.0
"""The contract suite runs for every method."""

from helpers.methods import MADE_OF_OTHERS, METHODS

from peft.base.registry import registered_methods


def test_every_registered_method_is_in_the_table():
    assert sorted([*METHODS, *MADE_OF_OTHERS]) == registered_methods()
