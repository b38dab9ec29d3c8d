# SPDX-License-Identifier: Apache-2.0
"""Progress bars of long work, and the switch for all of them.

A long loop of this package runs over `track(items, "Converting to LoRA")`. Without a bar this is
`items` itself, so that loops cost nothing when no one watches.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Generator, Iterable, Iterator
from threading import get_ident
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from .errors import PeftTypeError

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

# Seconds until a bar appears: quick work shows none.
_DELAY = 1.0
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_chosen: bool | None = None
# Threads that show a bar. Work inside that work shows none.
_busy: set[int] = set()


def show_progress(enabled: bool | None = None) -> bool | None:
    """Switch the progress bars of this package on or off, for the whole process.

    By default a bar is shown on the standard error of a terminal or notebook, by the first process
    of a distributed run, for work of more than a second, and unless huggingface_hub's or
    transformers' bars are switched off. The environment variable `PEFT_PROGRESS` ("1" or "0") sets
    the same switch.

    Args:
        enabled: True shows bars always, of quick work and in logs too; False never; None as
            described.

    Returns:
        The setting until now.

    Raises:
        PeftTypeError: `enabled` is not a boolean or None.

    Example:
        >>> before = show_progress(False)
        >>> show_progress(before)
        False
    """
    global _chosen
    if not (enabled is None or isinstance(enabled, bool)):
        raise PeftTypeError(f"`enabled`={enabled!r} must be True, False or None.")
    before, _chosen = _chosen, enabled
    return before


def track(
    items: Collection[T], description: str, *, unit: str = "layer", wanted: bool = False
) -> Iterable[T]:
    """Return items to loop over, with a progress bar where one is to be shown.

    Args:
        items: The items of the loop. A single one is not worth a bar.
        description: The words before the bar: "Converting to LoRA".
        unit: The word for an item.
        wanted: The caller asked for a bar: show it at once and leave it there at the end, unless
            bars are switched off.
    """
    if get_ident() in _busy or (len(items) < 2 and not wanted):
        return items
    delay = _delay(wanted)
    return items if delay is None else _Bar(items, description, unit, delay, wanted)


def remark(items: object, text: str) -> None:
    """Show a few words behind the bar of `items`, as `track` returned them."""
    if isinstance(items, _Bar):
        items.remark(text)


class _Bar(Generic[T]):
    """Items that move a progress bar when they are looped over."""

    def __init__(
        self, items: Collection[T], description: str, unit: str, delay: float, leave: bool
    ) -> None:
        self.items, self.description, self.unit = items, description, unit
        self.delay, self.leave = delay, leave
        self.bar: tqdm[T] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Generator[T, None, None]:
        # Of several kinds; in a notebook a widget.
        from tqdm.auto import tqdm

        thread = get_ident()
        _busy.add(thread)
        try:
            with tqdm(
                self.items,
                desc=self.description,
                unit=self.unit,
                leave=self.leave,
                delay=self.delay,
                dynamic_ncols=True,
            ) as self.bar:
                yield from self.bar
        finally:
            _busy.discard(thread)
            self.bar = None

    def remark(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)


def _delay(wanted: bool) -> float | None:
    """Return the seconds after which a bar that starts now appears, None if it does not."""
    setting = _chosen
    if setting is None:
        word = os.environ.get("PEFT_PROGRESS", "").lower()
        setting = True if word in _YES else False if word in _NO else None
    if setting is not None or wanted:
        return None if setting is False else 0.0
    is_shown = _is_watched() and _is_first_process() and not any(_neighbors_off())
    return _DELAY if is_shown else None


def _is_watched() -> bool:
    """Return whether standard error is a terminal or a notebook's cell."""
    try:
        return "ipykernel" in sys.modules or sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _is_first_process() -> bool:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def _neighbors_off() -> Iterator[bool]:
    """Yield whether libraries that are loaded, whose bars look like these, show none."""
    hub = sys.modules.get("huggingface_hub.utils")
    logging = sys.modules.get("transformers.utils.logging")
    word = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "")
    yield word.lower() in _YES
    yield bool(getattr(hub, "are_progress_bars_disabled", bool)())
    yield not getattr(logging, "is_progress_bar_enabled", lambda: True)()
