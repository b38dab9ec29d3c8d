# SPDX-License-Identifier: Apache-2.0
"""The deltas of a routed adapter's experts, of all modules and of one."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...ops.low_rank import Deltas, LowRank


@dataclass
class Experts:
    """The experts of a routed adapter.

    Args:
        deltas: Each expert's deltas, by name.
        general: The mean delta of the general experts, to subtract, by module path.
    """

    deltas: dict[str, Deltas]
    general: Deltas = field(default_factory=dict)

    def paths(self) -> list[str]:
        """Return the paths of the modules that any expert adapts, each once."""
        return list(dict.fromkeys(path for deltas in self.deltas.values() for path in deltas))

    def at(self, path: str) -> LayerExperts:
        """Return the experts' deltas at a module."""
        experts = enumerate(self.deltas.values())
        parts = {number: deltas[path] for number, deltas in experts if path in deltas}
        return LayerExperts(parts, len(self.deltas), self.general.get(path))


@dataclass
class LayerExperts:
    """The deltas of a module.

    Args:
        deltas: Those of the experts that adapt it, by the expert's number.
        number: Number of experts of the adapter.
        general: The delta to subtract from each.
    """

    deltas: dict[int, LowRank]
    number: int
    general: LowRank | None = None
