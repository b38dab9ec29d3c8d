# SPDX-License-Identifier: Apache-2.0
"""Similarity of adapters, and few experts from many adapters. Source: arXiv:2405.11157"""

from .similarity import AdapterSimilarity, adapter_similarity

__all__ = ["AdapterSimilarity", "adapter_similarity"]
