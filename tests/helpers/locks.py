# SPDX-License-Identifier: Apache-2.0
"""Locks of folders."""

import os


def is_locked(folder):
    """Return whether a process, this one too, has the lock of a folder."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
