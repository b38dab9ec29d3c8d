# SPDX-License-Identifier: Apache-2.0
"""Kill a process at one of its file events."""

import os
import sys

EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.chmod",
    "os.mkdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "tempfile.mkstemp",
}
# Those that change something on the disk.
CHANGING = frozenset(EVENTS - {"open"})
KILLED = 77


def run_killed(save, folder, step, events=frozenset(EVENTS)):
    """Run `save` in a child that ends for good just before its `step`-th event in `folder`; how it
    ended.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event, arguments):
            nonlocal seen
            if event in events and any(str(folder) in str(argument) for argument in arguments):
                if seen == step:
                    os._exit(KILLED)
                seen += 1

        sys.addaudithook(watch)
        try:
            save()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
