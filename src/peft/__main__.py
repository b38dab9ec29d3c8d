# SPDX-License-Identifier: Apache-2.0
"""The command line as `python -m peft`."""

from .cli import main

main()
