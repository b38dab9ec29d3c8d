# SPDX-License-Identifier: Apache-2.0
"""Reports, measures, loss terms and figures of routing."""
