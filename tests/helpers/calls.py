# SPDX-License-Identifier: Apache-2.0
"""Cost of work as a number of function calls."""

import gc
import sys


def calls_of(work):
    """How many functions are called, in Python and in C."""
    count = 0

    def note(frame, event, function):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count
