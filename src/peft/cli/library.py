# SPDX-License-Identifier: Apache-2.0
"""`peft library`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import click

from ..base.plain_values import JsonObject
from ..library import AdapterLibrary, LibraryReport
from ..library.pruning import prune as prune_library
from .common import PLACE, Result, shared_options, show

F = TypeVar("F", bound=Callable[..., object])


@click.group()
def library() -> None:
    """Keep a folder of many adapters.

    Each command but check brings the index in the folder, adapter_library.jsonl, up to date: only
    files that changed are read.
    """


def _library_options(command: F) -> F:
    """Add the arguments that all commands here have."""
    text = "File of the index, for folders that can't be written to."
    for option in (
        click.option("--follow-links", is_flag=True, help="Read what symbolic links lead to."),
        click.option("--index", "index_file", type=PLACE, help=text),
        click.argument("folder", type=PLACE),
    ):
        command = option(command)
    return command


@library.command()
@_library_options
@shared_options
def index(folder: str, index_file: str | None, follow_links: bool, as_json: bool) -> None:
    """Bring the index up to date; show what changed."""
    opened = AdapterLibrary(folder, index=index_file, follow_links=follow_links, refresh=False)
    changes = opened.refresh()
    result: JsonObject = {
        "folder": folder,
        "index": str(opened.index_file),
        "adapters": len(opened),
        "bytes": opened.entries.bytes,
        **changes._asdict(),
    }
    show(Result(result, f"{changes}\n{opened!r}"), as_json)


@library.command("list")
@_library_options
@click.option("--method", multiple=True, help="Only adapters of this method; may be repeated.")
@click.option("--tag", "tags", multiple=True, help="Only adapters with this tag; may be repeated.")
@click.option("--base", help="Only adapters for this base model.")
@click.option("--task", help="Only adapters with this task.")
@click.option("--rank", type=int, help="Only adapters of this rank.")
@click.option(
    "--min-score",
    "scores",
    multiple=True,
    metavar="NAME=VALUE",
    help="Only adapters with at least this score; may be repeated.",
)
@shared_options
def list_adapters(
    folder: str,
    index_file: str | None,
    follow_links: bool,
    method: Sequence[str],
    tags: Sequence[str],
    base: str | None,
    task: str | None,
    rank: int | None,
    scores: Sequence[str],
    as_json: bool,
) -> None:
    """List adapters: method, rank, base model, tasks, size, tags, scores."""
    least = dict(map(_score, scores))
    opened = AdapterLibrary(folder, index=index_file, follow_links=follow_links)
    found = opened.filter(
        method=[name.upper() for name in method] or None,
        base_model=base,
        tags=list(tags) or None,
        task=task,
        rank=rank,
        min_scores=least or None,
    )
    left_out = [entry._asdict() for entry in opened.left_out]
    content: JsonObject = {"folder": folder, "adapters": found.to_json(), "left_out": left_out}
    is_all = not any((method, tags, base, task, rank, scores))
    show(Result(content, str(opened if is_all else found)), as_json)


@library.command()
@_library_options
@shared_options
def check(folder: str, index_file: str | None, follow_links: bool, as_json: bool) -> None:
    """Read all files and compare them with the index; exit code 1 if not sound.

    A folder without an index gets one first.
    """
    opened = AdapterLibrary(folder, index=index_file, follow_links=follow_links, refresh=False)
    if not opened.index_file.exists():
        opened.refresh()
    report = opened.check()
    show(Result(report.to_json(), str(report)), as_json)
    if not report.ok:
        click.get_current_context().exit(1)


@library.command()
@_library_options
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--delete-files", is_flag=True, help="Delete the files too; needs --force.")
@click.option("--force", is_flag=True, help="Allow to delete files.")
@shared_options
def prune(
    folder: str,
    index_file: str | None,
    follow_links: bool,
    dry_run: bool,
    delete_files: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Remove from the index what is missing, damaged or left out.

    Files stay, and are passed over until they are added again; --delete-files deletes those of what
    is damaged or left out.
    """
    if delete_files and not (force or dry_run):
        raise click.UsageError("`--delete-files` deletes for good; pass `--force` too.")
    opened = AdapterLibrary(folder, index=index_file, follow_links=follow_links)
    report = prune_library(opened, delete_files=delete_files, dry_run=dry_run)
    content: JsonObject = {
        "removed": [problem._asdict() for problem in report.problems],
        "dry_run": dry_run,
    }
    show(Result(content, _pruned(report, dry_run)), as_json)


def _pruned(report: LibraryReport, dry_run: bool) -> str:
    """Return the text for what was, or would be, removed."""
    if not report.problems:
        return f"Nothing to remove; {report.checked} adapters are sound."
    verb = "Would remove" if dry_run else "Removed"
    lines = [f"{verb} '{p.name}': {p.kind}. {p.detail}" for p in report.problems]
    return "\n".join(lines)


def _score(text: str) -> tuple[str, float]:
    """Return a score's name and least value from an argument."""
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise click.UsageError(f"`--min-score {text}`: write it as NAME=VALUE.") from None
