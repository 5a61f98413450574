# SPDX-License-Identifier: Apache-2.0
"""What a kernel measurement is made of: the sizes of a model shape, one piece of work, and the registry of all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from bench.shapes import SHAPES

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KEPT_SHARE = 0.074  # of the image tokens, as in bench.e2e_cpu
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes one model shape gives the ops, for one square picture.

    side: merged image tokens along an edge. text: other tokens of the prompt. heads, kv_heads, dim, hidden, inner: of the
    language model. cached: layers up to and with the glimpse layer, whose cache is compacted. vision_*: of the tower.
    taps: layers of the predictor, whose working width, condition width and heads are as published.
    """

    name: str
    side: int
    text: int
    heads: int
    kv_heads: int
    dim: int
    hidden: int
    inner: int
    cached: int
    vision_hidden: int
    vision_heads: int
    vision_inner: int
    taps: int = 4
    vip_width: int = 256
    vip_condition: int = 512
    vip_heads: int = 4

    @property
    def model(self) -> str:
        """The name without the picture: `sizes` names pictures of other than 32 x 32 tokens."""
        return self.name.split()[0]

    @property
    def image(self) -> int:
        return self.side**2

    @property
    def patches(self) -> int:
        return 4 * self.image

    @property
    def window(self) -> int:
        """Patches of one attention window of the vision tower: 8 x 8, if the picture has as many."""
        return min(64, self.patches)

    @property
    def rows(self) -> int:
        return self.image + self.text

    @property
    def kept_image(self) -> int:
        return int(KEPT_SHARE * self.image)

    @property
    def kept(self) -> int:
        return self.text + self.kept_image

    @property
    def vision_dim(self) -> int:
        return self.vision_hidden // self.vision_heads


def sizes(name: str, side: int = 32, text: int = 61) -> Sizes:
    """Sizes of a shape of `bench.shapes` with a picture of `side` x `side` tokens (32: 896 pixels)."""
    config, glimpse_layer, taps = SHAPES[name]
    llm, vision = config["text_config"], config["vision_config"]
    return Sizes(
        name=name if side == 32 else f"{name} {side}x{side}",
        side=side,
        text=text,
        heads=llm["num_attention_heads"],
        kv_heads=llm["num_key_value_heads"],
        dim=llm["hidden_size"] // llm["num_attention_heads"],
        hidden=llm["hidden_size"],
        inner=llm["intermediate_size"],
        cached=glimpse_layer + 1,
        vision_hidden=vision["hidden_size"],
        vision_heads=vision["num_heads"],
        vision_inner=vision["intermediate_size"],
        taps=len(taps),
    )


TINY = Sizes(
    name="tiny", side=8, text=9, heads=4, kv_heads=2, dim=16, hidden=64, inner=96, cached=2,
    vision_hidden=32, vision_heads=2, vision_inner=48, taps=2, vip_width=32, vip_condition=16, vip_heads=2,
)  # fmt: skip
"""For --quick: seconds instead of minutes; its figures say nothing."""


@dataclass(frozen=True)
class Work:
    """One thing to check and to time. The functions take nothing and return the tensors they wrote.

    ours: the op, dispatched. plain: plain torch for the same result, and how far its rounding goes. truth: the definition on
    the same values. Each is called once on untouched inputs for the check; the others many times afterwards.
    amount: the least one call can do, FLOPs or bytes (every input read once, every result written once).
    tolerance: None for the rounding rule of `bench.gate`, 0 for equality, else a share of the largest true value.
    others: more formulations in plain torch by name; the fastest of all is what ours is compared with.
    """

    ours: Callable[[], Results]
    plain: Callable[[], Results]
    truth: Callable[[], Results]
    amount: float
    unit: Literal["byte", "flop"]
    tolerance: float | None = None
    plain_name: str = ""
    others: Mapping[str, Callable[[], Results]] = field(default_factory=dict)

    def contenders(self) -> dict[str, Callable[[], Results]]:
        return {self.plain_name: self.plain, **self.others}


Where = Literal["any", "cpu", "gpu"]


@dataclass(frozen=True)
class Row:
    """One registered measurement.

    per_picture: it depends on the picture only, neither on the model nor on the dtype. per_model: it brings its own
    lengths and depends on the model only. where: the benchmark it belongs to, `bench.ops_cpu`, `bench.ops_gpu` or both.
    """

    op: str
    what: str
    build: Callable[[Sizes, torch.dtype], Work]
    per_picture: bool = False
    per_model: bool = False
    where: Where = "any"


@dataclass(frozen=True)
class Case:
    """A row at a shape and dtype; nothing is allocated before `build`."""

    row: Row
    sizes: Sizes
    dtype: torch.dtype

    @property
    def shape_name(self) -> str:
        if self.row.per_picture:
            return f"{28 * self.sizes.side} px"
        return self.sizes.model if self.row.per_model else self.sizes.name

    @property
    def dtype_name(self) -> str:
        if self.row.per_picture:
            return "-"
        return next(name for name, dtype in DTYPES.items() if dtype is self.dtype)

    @property
    def label(self) -> str:
        return f"{self.row.op}: {self.row.what} ({self.shape_name}, {self.dtype_name})"

    def build(self) -> Work:
        torch.manual_seed(0)
        return self.row.build(self.sizes, self.dtype)


@dataclass
class Registry:
    """All rows, in the order in which they were registered."""

    rows: list[Row] = field(default_factory=list)

    def add(
        self, op: str, what: str, *, per_picture: bool = False, per_model: bool = False, where: Where = "any"
    ) -> Callable[[Callable[[Sizes, torch.dtype], Work]], Callable[[Sizes, torch.dtype], Work]]:
        """Decorator: registers a function (sizes, dtype) -> Work as the row `what` of `op`."""

        def register(build: Callable[[Sizes, torch.dtype], Work]) -> Callable[[Sizes, torch.dtype], Work]:
            self.rows.append(Row(op, what, build, per_picture, per_model, where))
            return build

        return register

    def ops(self) -> list[str]:
        return list(dict.fromkeys(row.op for row in self.rows))

    def cases(
        self,
        ops: Sequence[str],
        shapes: Sequence[Sizes],
        dtypes: Sequence[torch.dtype],
        where: Where = "any",
    ) -> Iterator[Case]:
        """Every chosen row at every shape and dtype; rows about the picture once a size of picture (their results are fp32 or
        exact), rows about the model once a model. where: only the rows of one benchmark."""
        for row in self.rows:
            if (ops and row.op not in ops) or (where != "any" and row.where not in ("any", where)):
                continue
            for size in _distinct(row, shapes):
                for dtype in (torch.float32,) if row.per_picture else dtypes:
                    yield Case(row, size, dtype)


def _distinct(row: Row, shapes: Sequence[Sizes]) -> list[Sizes]:
    """The first shape of each picture or model, for rows that depend on nothing else."""
    found: dict[object, Sizes] = {}
    for size in shapes:
        key: object = size
        if row.per_picture:
            key = size.side
        elif row.per_model:
            key = replace(size, name="", side=0, text=0)
        found.setdefault(key, size)
    return list(found.values())


REGISTRY = Registry()
