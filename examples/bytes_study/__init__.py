# SPDX-License-Identifier: Apache-2.0
"""Accuracy against stored bytes: VB-LoRA with its own or a shared bank, LoRA and LoKr, on
handwritten digits. See `python -m examples.bytes_study --help`; README.md has the results.

`python -m examples.bytes_study --help`; what it found is in README.md.
"""
