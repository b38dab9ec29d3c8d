# SPDX-License-Identifier: Apache-2.0
"""Time that an adapter costs: this package, Hugging Face PEFT and LyCORIS on the same work. See
`python -m benchmarks --help`.
"""
