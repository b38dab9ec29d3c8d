# SPDX-License-Identifier: Apache-2.0
"""Does sharing skills help? Compare Poly, multi-head routing and input routing with LoRA, on 28
tasks and 6 that come later.

Run it from the repository's root: ``python -m examples.multitask_study --help``.
"""
