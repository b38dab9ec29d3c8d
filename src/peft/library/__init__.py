# SPDX-License-Identifier: Apache-2.0
"""Libraries of adapters: a folder with an index, packs of many adapters, and fleets on a model."""

from __future__ import annotations

from .entry import AdapterEntry, Place
from .fleet import AdapterFleet, FleetStatus
from .library import AdapterLibrary
from .listing import AdapterList, LibraryReport
from .pack import AdapterPack
from .placing import adapter_sizes

__all__ = [
    "AdapterEntry",
    "AdapterFleet",
    "AdapterLibrary",
    "AdapterList",
    "AdapterPack",
    "FleetStatus",
    "LibraryReport",
    "Place",
    "adapter_sizes",
]
