# SPDX-License-Identifier: Apache-2.0
"""The package's version, also read by the build."""

__version__ = "0.22.0"
