# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face state dict to the runtime's weights, each key used exactly once."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import torch

from glimpse_runtime.errors import CheckpointError
from glimpse_runtime.models.qwen2_5_vl.config import ModelConfig
from glimpse_runtime.models.qwen2_5_vl.decoder import Decoder, DecoderLayer
from glimpse_runtime.models.qwen2_5_vl.linear import GatedLinear, Linear, LinearGroup, Weight, lay_together
from glimpse_runtime.models.qwen2_5_vl.vision import VisionBlock, VisionTower

# Checkpoints spell the two halves differently: the hub's older files, and what transformers 5 holds in memory.
_SPELLINGS = (
    (re.compile(r"^(model\.)?visual\."), "visual."),
    (re.compile(r"^model\.(language_model\.)?(?=embed_tokens|layers|norm)"), "text."),
    (re.compile(r"^lm_head\."), "lm_head."),
)


def canonical(key: str) -> str:
    """One name for each weight, whatever the checkpoint calls it."""
    for pattern, name in _SPELLINGS:
        renamed, count = pattern.subn(name, key)
        if count:
            return renamed
    return key


class WeightReader:
    """Hands out tensors by canonical name and keeps account.

    Args:
        keys: names as the source spells them.
        read: gives the tensor of a source name in the wanted dtype and on the wanted device.
    """

    def __init__(self, keys: Collection[str], read: Callable[[str], torch.Tensor]) -> None:
        self._source = {canonical(key): key for key in keys}
        self._read = read
        self._left = set(self._source)
        self._missing: list[str] = []

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor `name`, which must have `shape`."""
        if name not in self._source:
            self._missing.append(name)
            return torch.empty(shape)
        self._left.discard(name)
        tensor = self._read(self._source[name])
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self._source[name]}: expected shape {list(shape)}, found {list(tensor.shape)}"
            )
        return tensor

    def has(self, name: str) -> bool:
        return name in self._source

    def linear(self, name: str, rows: int, cols: int, *, bias: bool) -> Linear:
        return Linear(
            self.take(f"{name}.weight", rows, cols), self.take(f"{name}.bias", rows) if bias else None
        )

    def gated(self, at: str, inner: int, width: int, *, bias: bool) -> GatedLinear:
        both = [self.linear(f"{at}.{name}_proj", inner, width, bias=bias) for name in ("gate", "up")]
        return GatedLinear(*lay_together(both))

    def finish(self) -> None:
        """Raise `CheckpointError` if a key was missing or is left over."""
        if self._missing or self._left:
            told = [
                f"{what} {len(names)}: {', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''}"
                for what, names in (
                    ("missing", self._missing),
                    ("left over", [self._source[n] for n in self._left]),
                )
                if names
            ]
            raise CheckpointError(f"checkpoint keys do not match the config: {'; '.join(told)}")


def read_vision(reader: WeightReader, config: ModelConfig) -> VisionTower:
    """The vision tower's weights."""
    c = config.vision
    width, inner, merged = c.hidden_size, c.intermediate_size, c.hidden_size * c.merge_unit
    kernel = (c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
    patch = reader.take("visual.patch_embed.proj.weight", width, *kernel).view(width, -1)
    blocks = []
    for i in range(c.depth):
        at = f"visual.blocks.{i}"
        blocks.append(
            VisionBlock(
                norm1=reader.take(f"{at}.norm1.weight", width),
                qkv=reader.linear(f"{at}.attn.qkv", 3 * width, width, bias=True),
                proj=reader.linear(f"{at}.attn.proj", width, width, bias=True),
                norm2=reader.take(f"{at}.norm2.weight", width),
                gated=reader.gated(f"{at}.mlp", inner, width, bias=True),
                down=reader.linear(f"{at}.mlp.down_proj", width, inner, bias=True),
            )
        )
    return VisionTower(
        config=c,
        patch_embed=Linear(patch),
        blocks=tuple(blocks),
        merger_norm=reader.take("visual.merger.ln_q.weight", width),
        merger_in=reader.linear("visual.merger.mlp.0", merged, merged, bias=True),
        merger_out=reader.linear("visual.merger.mlp.2", c.out_hidden_size, merged, bias=True),
    )


def read_decoder(
    reader: WeightReader, config: ModelConfig, pack: Callable[[torch.Tensor], Weight] = lambda weight: weight
) -> Decoder:
    """The decoder's weights; on a GPU those of the query, key and value projections of a layer lie together, and those of gate and up.

    Args:
        pack: how the matrices that rows are multiplied with are kept. The token embedding, which is only looked up, and
            the norms stay as they are.
    """
    c = config.text

    def product(name: str, rows: int, cols: int, *, bias: bool) -> Linear:
        plain = reader.linear(name, rows, cols, bias=bias)
        assert isinstance(plain.weight, torch.Tensor)
        return Linear(pack(plain.weight), plain.bias)

    width, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layers = []
    for i in range(c.num_layers):
        at = f"text.layers.{i}"
        layers.append(
            DecoderLayer(
                input_norm=reader.take(f"{at}.input_layernorm.weight", width),
                qkv=LinearGroup(
                    lay_together(
                        [
                            product(f"{at}.self_attn.{name}_proj", rows, width, bias=True)
                            for name, rows in (("q", q), ("k", kv), ("v", kv))
                        ]
                    )
                ),
                o_proj=product(f"{at}.self_attn.o_proj", width, q, bias=False),
                post_norm=reader.take(f"{at}.post_attention_layernorm.weight", width),
                gated=GatedLinear(
                    *lay_together(
                        [
                            product(f"{at}.mlp.{name}_proj", c.intermediate_size, width, bias=False)
                            for name in ("gate", "up")
                        ]
                    )
                ),
                down=product(f"{at}.mlp.down_proj", width, c.intermediate_size, bias=False),
            )
        )
    embed = reader.take("text.embed_tokens.weight", c.vocab_size, width)
    if c.tie_word_embeddings and not reader.has("lm_head.weight"):
        head = embed
    else:  # a checkpoint may hold a head of its own although its config says it is tied
        head = reader.take("lm_head.weight", c.vocab_size, width)
        head = embed if c.tie_word_embeddings and torch.equal(head, embed) else head
    exponents = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
    return Decoder(
        config=c,
        embed=embed,
        layers=tuple(layers),
        norm=reader.take("text.norm.weight", width),
        lm_head=Linear(pack(head)),
        inv_freq=(1.0 / (c.rope_theta**exponents)).to(embed.device),
    )
