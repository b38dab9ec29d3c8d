# SPDX-License-Identifier: Apache-2.0
"""Functions of tensors: no adapter name, no config."""
