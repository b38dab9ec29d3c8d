# SPDX-License-Identifier: Apache-2.0
"""Batches of several tasks: collator, samplers, labels."""
