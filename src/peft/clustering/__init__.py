# SPDX-License-Identifier: Apache-2.0
"""Similarity of adapters, and few experts from many adapters. Source: arXiv:2405.11157"""

from .clusters import AdapterClusters, cluster_adapters, clusters_of
from .similarity import AdapterSimilarity, adapter_similarity

__all__ = [
    "AdapterClusters",
    "AdapterSimilarity",
    "adapter_similarity",
    "cluster_adapters",
    "clusters_of",
]
