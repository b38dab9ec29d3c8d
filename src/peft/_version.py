# SPDX-License-Identifier: Apache-2.0
"""The package's version, also read by the build.

The part after `+` tells this package from Hugging Face's of the same name. Comparisons of versions,
such as `peft>=0.21`, ignore it or take it for later than the version without it.
"""

__version__ = "0.22.0+independent"
