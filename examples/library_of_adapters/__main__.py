# SPDX-License-Identifier: Apache-2.0
"""``python -m examples.library_of_adapters``."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
