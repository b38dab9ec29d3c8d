# SPDX-License-Identifier: Apache-2.0
"""Layers, models and injection, the same for all methods."""
