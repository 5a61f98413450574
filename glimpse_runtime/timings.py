# SPDX-License-Identifier: Apache-2.0
"""Where the time of a request went."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Timings:
    """Seconds of each phase; `ttft` is the time from call to the first token."""

    vision: float = 0.0
    before: float = 0.0
    select: float = 0.0
    after: float = 0.0
    ttft: float = 0.0
    decode: float = 0.0
    new_tokens: int = 0
