# SPDX-License-Identifier: Apache-2.0
"""A folder of adapters of several methods becomes one model that routes.

Run it from the repository's root: ``python -m examples.library_of_adapters --help``.
"""
