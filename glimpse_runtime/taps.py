# SPDX-License-Identifier: Apache-2.0
"""What a pruning method may ask a vision tower for besides its embeddings: named, so that nothing else is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from glimpse_runtime.errors import GlimpseError

Block = int | Literal["first_full"]


@dataclass(frozen=True)
class Received:
    """The attention that each visual token receives in a block: the sum over the patches that look, the mean over heads
    and over the patches of the token.

    VisionZip (arXiv 2412.04467), VScan (arXiv 2505.22654) and VisPruner (arXiv 2412.01818) rank tokens by it in a tower
    without a class token. A patch looks at what its block lets it see: its frame, or its window.

    Attributes:
        block: the block; negative numbers count from the last one. "first_full": the first one with full attention
            (7 in the published Qwen2.5-VL).
        rotations: 2: queries and keys get their rotary position twice, for this score alone, as in the flash-attention
            class of the original VScan for Qwen2.5-VL.
    """

    block: Block = -1
    rotations: int = 1

    def __post_init__(self) -> None:
        if self.rotations not in (1, 2):
            raise GlimpseError(f"Received: rotations: expected 1 or 2, found {self.rotations!r}")


@dataclass(frozen=True)
class VisionTaps:
    """What is wanted from the blocks of a vision tower. Negative block numbers count from the last block.

    Attributes:
        hidden: blocks whose output is wanted, averaged over the patches of each visual token.
        received: attention that each visual token receives.
        keys: blocks whose keys are wanted, with their rotary position, averaged over heads and over the patches of each
            visual token: by them VisionZip tells which tokens are alike.
    """

    hidden: tuple[int, ...] = ()
    received: tuple[Received, ...] = ()
    keys: tuple[int, ...] = ()

    def __or__(self, other: VisionTaps) -> VisionTaps:
        """What either of the two asks for, nothing twice."""
        return VisionTaps(
            hidden=tuple(dict.fromkeys(self.hidden + other.hidden)),
            received=tuple(dict.fromkeys(self.received + other.received)),
            keys=tuple(dict.fromkeys(self.keys + other.keys)),
        )

    def by_block(self, depth: int, full_attention: Sequence[int]) -> dict[int, VisionTaps]:
        """The same taps, each under the number (from 0) of its block, and there as it was asked for.

        Args:
            depth: blocks of the tower.
            full_attention: numbers of those with full attention.

        Raises:
            GlimpseError: the tower has no such block.
        """
        found: dict[int, VisionTaps] = {}
        asked: list[tuple[Block, VisionTaps]] = [
            (block, VisionTaps(hidden=(block,))) for block in self.hidden
        ]
        asked += [(tap.block, VisionTaps(received=(tap,))) for tap in self.received]
        asked += [(block, VisionTaps(keys=(block,))) for block in self.keys]
        for block, taps in asked:
            number = _number(block, depth, full_attention)
            found[number] = found.get(number, NO_TAPS) | taps
        return found


NO_TAPS = VisionTaps()


def _number(block: Block, depth: int, full_attention: Sequence[int]) -> int:
    if isinstance(block, int) and -depth <= block < depth:
        return block % depth
    if block == "first_full":
        found = [number for number in full_attention if number < depth]
        if found:
            return min(found)
        raise GlimpseError(
            f"vision tap: block 'first_full': expected a block with full attention, found none among {depth}"
        )
    raise GlimpseError(
        f"vision tap: expected a block from {-depth} to {depth - 1} or 'first_full', found {block!r}"
    )
