# SPDX-License-Identifier: Apache-2.0
"""What an adapter costs: this package, Hugging Face PEFT and LyCORIS on the same work.
`python -m benchmarks --help`.
"""
