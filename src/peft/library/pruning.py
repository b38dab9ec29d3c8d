# SPDX-License-Identifier: Apache-2.0
"""Take what can't be used out of a library."""

from __future__ import annotations

from ..base.validation import check_flags
from .library import AdapterLibrary
from .listing import LibraryReport

_UNUSABLE = ("missing", "damaged", "left out")


def prune(
    library: AdapterLibrary, *, delete_files: bool = False, dry_run: bool = False
) -> LibraryReport:
    """Remove adapters that are missing, damaged or left out from a library's index.

    Files stay, and are passed over until `AdapterLibrary.add`. Tags and scores of missing adapters
    are forgotten.

    Args:
        library: The library.
        delete_files: Delete the files of what is damaged or left out too; links are kept.
        dry_run: Only report what would be removed.

    Returns:
        The check that found them; its `problems` are what was removed.
    """
    check_flags(delete_files=delete_files, dry_run=dry_run)
    report = library.check()
    found = [problem for problem in report.problems if problem.kind in _UNUSABLE]
    if not dry_run:
        linked = {p.name for p in found if (library.folder / p.name).is_symlink()}
        gone = {p.name for p in found if p.kind == "missing"}
        to_delete = {p.name for p in found} - linked - gone if delete_files else set()
        library.remove([p.name for p in found if p.name not in to_delete])
        if to_delete:
            library.remove(sorted(to_delete), delete_files=True)
    return LibraryReport(report.checked, report.bytes, tuple(found))
