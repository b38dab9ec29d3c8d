# SPDX-License-Identifier: Apache-2.0
"""Adapt one pretrained vision transformer to many tasks, with every method of this library.

Run it from the repository's root: ``python -m examples.multitask_digits --help``.
"""
