# SPDX-License-Identifier: Apache-2.0
"""One page per pruning method."""

from glimpse_runtime.plans.glimpse import glimpse

__all__ = ["glimpse"]
