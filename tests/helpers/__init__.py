# SPDX-License-Identifier: Apache-2.0
"""Models, methods and comparisons that several tests use."""
