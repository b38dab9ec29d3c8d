# SPDX-License-Identifier: Apache-2.0
"""The command `peft`. Each command does in one line what functions of the package do.

`import peft` does not import this folder.
"""

from .program import main, program

__all__ = ["main", "program"]
