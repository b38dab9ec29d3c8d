# SPDX-License-Identifier: Apache-2.0
"""What does sharing skills give? Poly, multi-head routing and input routing against LoRA, on 28
tasks and 6 that come later.

Run it from the repository's root: ``python -m examples.multitask_study --help``.
"""
