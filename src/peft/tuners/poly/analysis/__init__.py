# SPDX-License-Identifier: Apache-2.0
"""Reports, measures, losses and figures of trained routing."""
