# SPDX-License-Identifier: Apache-2.0
"""The ground floor: errors, names and rules that every other folder uses. It imports torch only."""
