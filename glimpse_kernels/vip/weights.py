# SPDX-License-Identifier: Apache-2.0
"""Weights of the visual importance predictor, and how they are read from a GlimpsePrune checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

KINDS = {"AttnFuserV1": "v1", "AttnFuserV2": "v2", "AttnFuserDummy": "dummy"}
ACTIVATIONS = ("silu",)
EPS = 1e-6
THETA = 10000.0


@dataclass(frozen=True)
class Linear:
    """`weight [out, in]`, `bias [out]` or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class VipLayer:
    """One layer: pre-norm attention and a gated MLP.

    Attributes:
        norm1, norm2: `[F]` weights of the RMS norms.
        q, k: `[H * Dq, F + C]` (v1) or `[H * Dq, F]` (v2).
        v: `[H * Dv, F]`; o: `[F, H * Dv]`; gate, up: `[I, F]`; down: `[F, I]`.
    """

    norm1: Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    norm2: Tensor
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class VipWeights:
    """Everything `vip` and `vip_conditions` need.

    Attributes:
        kind: "v1" (conditioned on visual taps), "v2" (not conditioned), "dummy" (no weights at all).
        in_proj: glimpse scores (layers x heads, layer-major) to the working width F.
        cond_projs: visual tap i to condition i, one per layer; empty unless `kind` is "v1".
        layers: in the order in which they run.
        out_proj: working width to one logit.
        num_heads: attention heads.
        eps: of the RMS norms.
        act: activation of the gated MLP; only "silu".
        theta: base of the two-dimensional rotary frequencies.
    """

    kind: str
    in_proj: Linear | None = None
    cond_projs: tuple[Linear, ...] = ()
    layers: tuple[VipLayer, ...] = ()
    out_proj: Linear | None = None
    num_heads: int = 1
    eps: float = EPS
    act: str = "silu"
    theta: float = THETA

    @property
    def qk_dim(self) -> int:
        """Head dimension of queries and keys: what the rotary tables are made for; 0 without layers."""
        return self.layers[0].q.weight.shape[0] // self.num_heads if self.layers else 0

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights (float32 for the kind without weights)."""
        return torch.float32 if self.in_proj is None else self.in_proj.weight.dtype

    def to(self, *args: Any, **kwargs: Any) -> VipWeights:
        """The same weights on another device or in another dtype; arguments as `Tensor.to`."""
        return self.map(lambda t: t.to(*args, **kwargs))

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        found: list[Tensor] = []

        def take(t: Tensor) -> Tensor:
            found.append(t)
            return t

        self.map(take)
        return found

    def map(self, change: Callable[[Tensor], Tensor]) -> VipWeights:
        """The same structure with `change` applied to every tensor."""

        def linear(x: Linear) -> Linear:
            return Linear(change(x.weight), None if x.bias is None else change(x.bias))

        def layer(x: VipLayer) -> VipLayer:
            return VipLayer(
                change(x.norm1), linear(x.q), linear(x.k), linear(x.v), linear(x.o),
                change(x.norm2), linear(x.gate), linear(x.up), linear(x.down),
            )  # fmt: skip

        return replace(
            self,
            in_proj=None if self.in_proj is None else linear(self.in_proj),
            cond_projs=tuple(linear(c) for c in self.cond_projs),
            layers=tuple(layer(x) for x in self.layers),
            out_proj=None if self.out_proj is None else linear(self.out_proj),
        )

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | Any) -> VipWeights:
        """Read the `attn_fuser` state dict of a GlimpsePrune checkpoint. Tensors are taken as they are, not copied.

        Args:
            state_dict: names as the original writes them (`attn_in_proj.weight`, `layers.0.attn.q_proj.weight`, ...).
            config: mapping or object with `attn_fuse_type`, `attn_fuse_num_heads`, `attn_fuse_hidden_act` and
                `selected_visual_layers`; sizes that it names (`attn_fuse_size`, `visual_cond_size`) are compared.

        Raises:
            ValueError: a missing or left-over key, a shape that does not fit, an unknown type or activation.
        """
        return _Reader(state_dict, config).read()


class _Reader:
    """Takes tensors out of a state dict by name, checks their shapes and remembers which were used."""

    def __init__(self, state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | Any) -> None:
        self.tensors = dict(state_dict)
        self.config = config
        self.used: set[str] = set()
        self.missing: list[str] = []

    def setting(self, name: str, default: Any = None) -> Any:
        if isinstance(self.config, Mapping):
            return self.config.get(name, default)
        return getattr(self.config, name, default)

    def read(self) -> VipWeights:
        fuse_type = self.setting("attn_fuse_type")
        if fuse_type not in KINDS:
            raise ValueError(f"attn_fuse_type: expected one of {', '.join(KINDS)}, found {fuse_type!r}")
        kind = KINDS[fuse_type]
        if kind == "dummy":
            self._refuse_leftovers(fuse_type)
            return VipWeights(kind="dummy")
        act = self.setting("attn_fuse_hidden_act", "silu")
        if act not in ACTIVATIONS:
            raise ValueError(f"attn_fuse_hidden_act: expected one of {', '.join(ACTIVATIONS)}, found {act!r}")
        heads = self.setting("attn_fuse_num_heads")
        if not isinstance(heads, int) or heads < 1:
            raise ValueError(f"attn_fuse_num_heads: expected a positive int, found {heads!r}")
        visual_layers = self.setting("selected_visual_layers")
        count = len(visual_layers) if visual_layers is not None else self._count(r"layers\.(\d+)\.")

        in_proj = self.linear("attn_in_proj")
        conditions = tuple(self.linear(f"cond_in_projs.{i}") for i in range(count)) if kind == "v1" else ()
        layers = tuple(self.layer(f"layers.{i}") for i in range(count))
        out_proj = self.linear(f"attn_out_projs.{count - 1}")
        if self.missing:
            raise ValueError(
                f"attn_fuser ({fuse_type}, {count} layers): missing {', '.join(self.missing)}; found "
                f"{', '.join(sorted(self.tensors)) or 'nothing'}"
            )
        # With deep supervision earlier layers have outputs of their own; the last one is the one that is used.
        tolerated = (
            [rf"attn_out_projs\.(?:{'|'.join(map(str, range(count - 1)))})\.(?:weight|bias)"]
            if count > 1
            else []
        )
        if kind == "v2":
            tolerated.append(r"cond_in_projs\.\d+\.(?:weight|bias)")
        self._refuse_leftovers(fuse_type, tolerated)
        weights = VipWeights(
            kind=kind,
            in_proj=in_proj,
            cond_projs=conditions,
            layers=layers,
            out_proj=out_proj,
            num_heads=heads,
            act=act,
        )
        self._check_shapes(weights)
        return weights

    def tensor(self, name: str) -> Tensor:
        self.used.add(name)
        if name not in self.tensors:
            self.missing.append(name)
            return torch.empty(0)
        return self.tensors[name]

    def linear(self, name: str) -> Linear:
        bias = f"{name}.bias"
        has_bias = bias in self.tensors or ".attn." not in name
        return Linear(self.tensor(f"{name}.weight"), self.tensor(bias) if has_bias else None)

    def layer(self, name: str) -> VipLayer:
        return VipLayer(
            norm1=self.tensor(f"{name}.norm1.weight"),
            q=self.linear(f"{name}.attn.q_proj"),
            k=self.linear(f"{name}.attn.k_proj"),
            v=self.linear(f"{name}.attn.v_proj"),
            o=self.linear(f"{name}.attn.o_proj"),
            norm2=self.tensor(f"{name}.norm2.weight"),
            gate=self.linear(f"{name}.mlp.gate_proj"),
            up=self.linear(f"{name}.mlp.up_proj"),
            down=self.linear(f"{name}.mlp.down_proj"),
        )

    def _count(self, pattern: str) -> int:
        found = [int(m.group(1)) for m in (re.match(pattern, name) for name in self.tensors) if m]
        return max(found, default=-1) + 1

    def _refuse_leftovers(self, fuse_type: str, tolerated: list[str] | None = None) -> None:
        left = [
            name
            for name in sorted(self.tensors)
            if name not in self.used and not any(re.fullmatch(p, name) for p in tolerated or [])
        ]
        if left:
            raise ValueError(f"attn_fuser ({fuse_type}): left-over keys {', '.join(left)}")

    def _check_shapes(self, w: VipWeights) -> None:
        assert w.in_proj is not None and w.out_proj is not None
        width = w.in_proj.weight.shape[0]
        named = self.setting("attn_fuse_size")
        if named is not None and named != width:
            raise ValueError(f"attn_in_proj.weight: expected {named} rows (attn_fuse_size), found {width}")
        cond = w.cond_projs[0].weight.shape[0] if w.cond_projs else 0
        named = self.setting("visual_cond_size")
        if w.kind == "v1" and named is not None and named != cond:
            raise ValueError(
                f"cond_in_projs.0.weight: expected {named} rows (visual_cond_size), found {cond}"
            )

        def expect(name: str, tensor: Tensor | None, *shape: int) -> None:
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")

        expect("attn_in_proj.bias", w.in_proj.bias, width)
        for i, c in enumerate(w.cond_projs):
            expect(f"cond_in_projs.{i}.weight", c.weight, cond, c.weight.shape[-1])
            expect(f"cond_in_projs.{i}.bias", c.bias, cond)
        for i, x in enumerate(w.layers):
            qk, value, inner = x.q.weight.shape[0], x.v.weight.shape[0], x.gate.weight.shape[0]
            for name, tensor in (("norm1", x.norm1), ("norm2", x.norm2)):
                expect(f"layers.{i}.{name}.weight", tensor, width)
            for name, linear, rows, cols in (
                ("attn.q_proj", x.q, qk, width + cond),
                ("attn.k_proj", x.k, qk, width + cond),
                ("attn.v_proj", x.v, value, width),
                ("attn.o_proj", x.o, width, value),
                ("mlp.gate_proj", x.gate, inner, width),
                ("mlp.up_proj", x.up, inner, width),
                ("mlp.down_proj", x.down, width, inner),
            ):
                expect(f"layers.{i}.{name}.weight", linear.weight, rows, cols)
                expect(f"layers.{i}.{name}.bias", linear.bias, rows)
            if qk % (4 * w.num_heads) or value % w.num_heads:
                raise ValueError(
                    f"layers.{i}.attn: {qk} query and {value} value rows do not split into {w.num_heads} heads "
                    f"(attn_fuse_num_heads) with a query head dimension that is a multiple of 4"
                )
        expect("attn_out_projs.weight", w.out_proj.weight, 1, width)
        expect("attn_out_projs.bias", w.out_proj.bias, 1)
