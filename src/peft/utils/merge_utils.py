# SPDX-License-Identifier: Apache-2.0
"""Merging of task vectors, at its documented place."""

from ..ops.task_vectors import (
    calculate_majority_sign_mask,
    dare_linear,
    dare_ties,
    disjoint_merge,
    magnitude_based_pruning,
    magnitude_prune,
    prune,
    random_pruning,
    reshape_weight_task_tensors,
    task_arithmetic,
    ties,
)

__all__ = [
    "calculate_majority_sign_mask", "dare_linear", "dare_ties", "disjoint_merge",
    "magnitude_based_pruning", "magnitude_prune", "prune", "random_pruning",
    "reshape_weight_task_tensors", "task_arithmetic", "ties",
]  # fmt: skip
