# SPDX-License-Identifier: Apache-2.0
"""Experts of clusters: weighted sums of their members' deltas, as LoRA adapters or as skills of a
Poly adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import PeftTypeError, PeftValueError
from ..base.progress import track
from ..base.suggestions import did_you_mean
from ..base.validation import is_int, number
from ..checkpoint.files import write_report
from ..core.conversion import write_conversion
from ..core.low_rank_deltas import Deltas
from ..ops.low_rank import check_rank, weighted_sum
from ..tuners.lora.conversion import LoraConversion, adapter_from_deltas
from ..tuners.poly.conversion import PolyConversion, inventory_from_deltas
from .sources import DeltaSource

# The file beside an expert that lists its members.
MEMBERS_NAME = "members.json"


@dataclass(frozen=True)
class Cluster:
    """A cluster's name, and the weight of each member in its expert."""

    name: str
    members: Mapping[str, float]


def weighted_members(
    members: Mapping[str, Sequence[str]], weights: Mapping[str, float] | None
) -> list[Cluster]:
    """Return clusters with the weights of their members: those given, or equal ones of sum 1."""
    if weights is None:
        return [
            Cluster(cluster, dict.fromkeys(names, 1 / len(names)))
            for cluster, names in members.items()
        ]
    if not isinstance(weights, Mapping):
        raise PeftTypeError(f"`weights`={weights!r} must be a dictionary: adapter → number.")
    adapters = [name for names in members.values() for name in names]
    if unknown := [name for name in weights if name not in adapters]:
        raise PeftValueError(
            f"`weights` has {unknown[0]!r}, which is no adapter of the clusters."
            f"{did_you_mean(str(unknown[0]), adapters)}"
        )
    if missing := [name for name in adapters if name not in weights]:
        raise PeftValueError(
            f"`weights` must have a number for each adapter; {missing[0]!r} lacks."
        )
    for name, value in weights.items():
        for problem in number(f"weights[{name!r}]", value):
            raise PeftValueError(problem)
    return [
        Cluster(cluster, {name: float(weights[name]) for name in names})
        for cluster, names in members.items()
    ]


def expert_deltas(
    source: DeltaSource, clusters: Sequence[Cluster], rank: int | float | None
) -> dict[str, Deltas]:
    """Return each cluster's weighted sum, of a rank or exact. The members of one cluster are in
    memory at a time.
    """
    check_rank(rank)
    result = {}
    for cluster in track(clusters, "Summing clusters", unit="cluster"):
        members = source.read_some(list(cluster.members))
        paths = dict.fromkeys(path for deltas in members.values() for path in deltas)
        result[cluster.name] = {
            path: weighted_sum(
                [deltas[path] for deltas in members.values() if path in deltas],
                [cluster.members[name] for name, deltas in members.items() if path in deltas],
                rank,
            )
            for path in paths
        }
    return result


def save_experts(
    folder: Path, source: DeltaSource, clusters: Sequence[Cluster], rank: int | float | None
) -> dict[str, float]:
    """Write each cluster's expert as a LoRA adapter; return the errors."""
    experts = expert_deltas(source, clusters, rank)
    converted: dict[str, LoraConversion] = {
        cluster.name: adapter_from_deltas(
            source.model, experts[cluster.name], source.config_of(next(iter(cluster.members)))
        )
        for cluster in clusters
    }
    for cluster in clusters:
        expert = converted[cluster.name]
        write_conversion(folder / cluster.name, source.model, expert)
        content = {"members": dict(cluster.members), "error": expert.error}
        write_report(folder / cluster.name / MEMBERS_NAME, content)
    return {name: expert.error for name, expert in converted.items()}


def inventory_of_experts(
    source: DeltaSource, clusters: Sequence[Cluster], rank: int | float | None, own_weight: float
) -> PolyConversion:
    """Return the Poly adapter with a skill for each cluster and a task for each member."""
    skills = expert_deltas(source, clusters, rank)
    tasks = {member: cluster.name for cluster in clusters for member in cluster.members}
    like = source.config_of(next(iter(tasks)))
    return inventory_from_deltas(
        source.model, skills, tasks, like, rank if is_int(rank) else None, own_weight
    )
