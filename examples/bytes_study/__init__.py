# SPDX-License-Identifier: Apache-2.0
"""What accuracy costs in stored bytes: VB-LoRA with a bank of its own or a shared one, LoRA and
LoKr, on handwritten digits.

`python -m examples.bytes_study --help`; what it found is in README.md.
"""
