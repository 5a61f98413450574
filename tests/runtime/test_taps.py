# SPDX-License-Identifier: Apache-2.0
"""What pruning methods read in the vision tower, against dense sums over what transformers' own tower computes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from glimpse_kernels import dispatch
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.loading import share_base
from glimpse_runtime.models.qwen2_5_vl import tapping, vision
from glimpse_runtime.models.qwen2_5_vl.layout import vision_layout
from glimpse_runtime.models.qwen2_5_vl.linear import GatedLinear, Linear
from glimpse_runtime.models.qwen2_5_vl.vision import VisionBlock, VisionOutput, VisionTower
from glimpse_runtime.taps import NO_TAPS, Received, VisionTaps

from .conftest import load_hf
from .on_stand_in import device

Grid = tuple[int, int, int]
CPU = torch.device("cpu")
METHODS = Path(__file__).parents[1] / "golden" / "methods"
BLOCKS = range(4)  # 1 and 3 have full attention
MIXED: tuple[Grid, ...] = ((1, 6, 10), (1, 2, 2), (3, 4, 6), (1, 12, 4), (2, 10, 18))
"""Pictures and two videos: windows whole and cut, frames smaller than a window."""
EVERYTHING = VisionTaps(
    hidden=tuple(BLOCKS),
    received=tuple(Received(block, rotations) for block in BLOCKS for rotations in (1, 2)),
    keys=tuple(BLOCKS),
)


# -- what transformers computes ----------------------------------------------------------------------------------


@dataclass
class Seen:
    """What transformers' attention of one block was given: queries and keys `[L, heads, head_dim]` of each segment."""

    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)


_seen: defaultdict[Any, Seen] = defaultdict(Seen)


def _watched(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any):
    _seen[module].queries.append(query[0].transpose(0, 1))
    _seen[module].keys.append(key[0].transpose(0, 1))
    weights = torch.softmax((query @ key.transpose(2, 3)).float() * scaling, -1).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("watched", _watched)


@dataclass(frozen=True)
class Theirs:
    """Results of transformers' tower; `rotary`: the table its attention was given, window order."""

    seen: list[Seen]
    hidden: list[Tensor]
    rotary: tuple[Tensor, Tensor]
    places: Tensor

    def pooled(self, patches: Tensor) -> Tensor:
        """Mean over the 4 patches of each token, raster order, of `[P, ...]` in window order."""
        tokens = patches.double().unflatten(0, (-1, 4)).mean(1)
        return torch.empty_like(tokens).index_copy(0, self.places, tokens)

    def keys(self, block: int) -> Tensor:
        return self.pooled(torch.cat(self.seen[block].keys).double().mean(1))

    def received(self, block: int, rotations: int) -> Tensor:
        q, k = torch.cat(self.seen[block].queries), torch.cat(self.seen[block].keys)
        if rotations == 2:
            q, k = apply_rotary_pos_emb_vision(q, k, *self.rotary)
        lengths = [len(part) for part in self.seen[block].queries]
        columns = []
        for own_q, own_k in zip(q.split(lengths), k.split(lengths), strict=True):
            logits = torch.einsum("ihd,jhd->hij", own_q.double(), own_k.double()) * q.shape[2] ** -0.5
            columns.append(torch.softmax(logits, -1).sum(1).mean(0))
        return self.pooled(torch.cat(columns))


def places_of(grids: tuple[Grid, ...]) -> Tensor:
    """Where each token lies in raster order, in the order of the tower: windows of 4 x 4 tokens, frame by frame."""
    places, start = [], 0
    for frames, height, width in ((t, h // 2, w // 2) for t, h, w in grids):
        for _ in range(frames):
            for top in range(0, height, 4):
                for left in range(0, width, 4):
                    for y in range(top, min(top + 4, height)):
                        places += [start + y * width + x for x in range(left, min(left + 4, width))]
            start += height * width
    return torch.tensor(places)


@contextmanager
def hooked(visual: Any, outputs: list[Tensor], tables: list[Any]) -> Iterator[None]:
    hooks = [block.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for block in visual.blocks]
    hooks += [
        block.attn.register_forward_pre_hook(
            lambda _m, _a, given: tables.append(given["position_embeddings"]), with_kwargs=True
        )
        for block in visual.blocks
    ]
    before, visual.config._attn_implementation = visual.config._attn_implementation, "watched"
    _seen.clear()
    try:
        yield
    finally:
        visual.config._attn_implementation = before
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def run_theirs(hf: Any, pixels: Tensor, grids: tuple[Grid, ...]) -> Theirs:
    visual, outputs, tables = hf.model.visual, [], []
    with hooked(visual, outputs, tables):
        visual(pixels.to(visual.dtype), grid_thw=torch.tensor(grids))
    return Theirs([_seen[b.attn] for b in visual.blocks], outputs, tables[0], places_of(grids))


def spread(hf: Any) -> Any:
    """The same model with queries and keys twice as long: else every token receives about as much as the next."""
    with torch.no_grad():
        for block in hf.model.visual.blocks:
            width = block.attn.qkv.weight.shape[1]
            block.attn.qkv.weight[: 2 * width] *= 2
            block.attn.qkv.bias[: 2 * width] *= 2
    return hf


@pytest.fixture(scope="module")
def hf() -> Any:
    return spread(load_hf())


@pytest.fixture(scope="module")
def tower(hf: Any) -> VisionTower:
    return share_base(hf).vision


def pixels_of(grids: tuple[Grid, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), 1176, generator=generator)


@torch.inference_mode()
def run(
    tower: VisionTower, grids: tuple[Grid, ...], taps: VisionTaps, pixels: Tensor | None = None
) -> VisionOutput:
    pixels = pixels_of(grids) if pixels is None else pixels
    return tower(pixels, vision_layout(grids, tower.config, CPU), taps)


def close(found: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.double(), want.double(), atol=tolerance * float(want.abs().max()), rtol=0
    )


# -- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grids", [MIXED, *((grid,) for grid in MIXED)], ids=str)
def test_against_transformers(hf: Any, tower: VisionTower, grids: tuple[Grid, ...]) -> None:
    theirs, ours = run_theirs(hf, pixels_of(grids), grids), run(tower, grids, EVERYTHING)
    tokens = len(theirs.places)
    for block in BLOCKS:
        close(ours.hidden[block], theirs.pooled(theirs.hidden[block]))
        assert ours.keys[block].dtype == torch.float32 and ours.keys[block].shape == (tokens, 16)
        close(ours.keys[block], theirs.keys(block))
        for rotations in (1, 2):
            found = ours.received[Received(block, rotations)]
            assert found.dtype == torch.float32 and found.shape == (tokens,)
            close(found, theirs.received(block, rotations))


def test_the_pictures_tell_tokens_and_rotations_apart(hf: Any) -> None:
    """Else the test above would show nothing: neither values that are all alike, nor a second rotation that changes nothing."""
    theirs = run_theirs(hf, pixels_of(MIXED), MIXED)
    for block in BLOCKS:
        once, twice = theirs.received(block, 1), theirs.received(block, 2)
        assert once.std() > 0.2 and (once - twice).abs().max() > 0.5


def test_bf16_is_as_close_to_fp32_as_transformers_is(hf: Any) -> None:
    low = spread(load_hf(torch.bfloat16))
    grids, pixels = MIXED, pixels_of(MIXED).bfloat16()
    truth, stock = run_theirs(hf, pixels.float(), grids), run_theirs(low, pixels, grids)
    ours = run(share_base(low).vision, grids, EVERYTHING, pixels)
    for block in BLOCKS:
        assert ours.keys[block].dtype == torch.float32
        pairs = [(ours.keys[block], stock.keys(block), truth.keys(block))]
        for rotations in (1, 2):
            found = ours.received[Received(block, rotations)]
            assert found.dtype == torch.float32
            pairs.append((found, stock.received(block, rotations), truth.received(block, rotations)))
        for found, theirs, want in pairs:
            close(found, want, 5e-2)
            assert (found - want).abs().max() <= 2 * (theirs - want).abs().max()


# -- who sees whom -----------------------------------------------------------------------------------------------


def test_nobody_gives_to_another_picture_or_frame(tower: VisionTower) -> None:
    out = run(tower, MIXED, EVERYTHING)
    frames = [h * w // 4 for t, h, w in MIXED for _ in range(t)]
    changed = pixels_of(MIXED)
    first = MIXED[0][1] * MIXED[0][2]
    changed[:first] = pixels_of(MIXED, seed=1)[:first]
    other = run(tower, MIXED, EVERYTHING, changed)
    for tap, found in out.received.items():
        for own in found.split(frames):
            torch.testing.assert_close(own.sum(), torch.tensor(float(len(own))), rtol=1e-5, atol=0)
        assert not torch.allclose(found[: first // 4], other.received[tap][: first // 4], atol=1e-3)
        torch.testing.assert_close(
            found[first // 4 :], other.received[tap][first // 4 :], rtol=1e-5, atol=1e-6
        )


def test_a_picture_of_many_as_alone(tower: VisionTower) -> None:
    together, start, pixels = run(tower, MIXED, EVERYTHING), 0, pixels_of(MIXED)
    for grid in MIXED:
        patches = grid[0] * grid[1] * grid[2]
        alone = run(tower, (grid,), EVERYTHING, pixels[start : start + patches])
        rows = slice(start // 4, (start + patches) // 4)
        for kind in ("hidden", "received", "keys"):
            for name, tap in getattr(alone, kind).items():
                close(getattr(together, kind)[name][rows], tap)
        start += patches


def test_several_passes_on_a_gpu_that_is_none(
    tower: VisionTower, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taps = VisionTaps(
        hidden=(0, -1), received=(Received(), Received("first_full", 2), Received(0)), keys=(-1, 2)
    )
    wanted = run(model.base.vision, MIXED, taps)
    monkeypatch.setattr(vision, "MOST_PATCHES", 130)
    assert len(vision._passes(MIXED)) == 3
    with device() as here:
        place = torch.device("cuda", 0)
        ours = here.model(None).base.vision
        layout, pixels = vision_layout(MIXED, ours.config, place), pixels_of(MIXED).to(place)
        with here.gpu.nothing_waits():
            found = ours(pixels, layout, taps)
        close(found.embeds.cpu(), wanted.embeds)
        for kind in ("hidden", "received", "keys"):
            assert getattr(found, kind).keys() == getattr(wanted, kind).keys()
            for name, tap in getattr(wanted, kind).items():
                assert getattr(found, kind)[name].dtype == tap.dtype
                close(getattr(found, kind)[name].cpu(), tap)


# -- recordings of the original methods --------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """In the place of a block's first product: queries, keys and values `[P, 3 * width]` whatever comes in."""

    qkv: Tensor

    def __call__(self, x: Tensor, *, out: Tensor) -> Tensor:
        return out.copy_(self.qkv)


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [P, heads, head_dim]` before its rotary position; `cos`, `sin`: `[P, head_dim / 2]`."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


def tower_of(config: Any, pairs: list[tuple[Tensor, Tensor]]) -> VisionTower:
    """A tower whose blocks have these queries and keys `[P, heads, head_dim]`, before their rotary position, in window order."""
    rows, heads, dim = pairs[0][0].shape
    wide, inner = heads * dim, config.intermediate_size

    def zeros(outputs: int, inputs: int) -> Linear:
        return Linear(torch.zeros(outputs, inputs))

    def block(q: Tensor, k: Tensor) -> VisionBlock:
        qkv: Any = Given(torch.stack([q, k, torch.zeros_like(q)], 1).view(rows, -1))
        gated = GatedLinear(zeros(inner, wide), zeros(inner, wide))
        return VisionBlock(
            torch.ones(wide), qkv, zeros(wide, wide), torch.ones(wide), gated, zeros(wide, inner)
        )

    return VisionTower(
        replace(config, depth=len(pairs), hidden_size=wide, num_heads=heads, full_attention_blocks=(0, 1)),
        zeros(wide, 1176), tuple(block(q, k) for q, k in pairs), torch.ones(wide),
        zeros(4 * wide, 4 * wide), zeros(config.out_hidden_size, 4 * wide),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "grid"),
    [("visionzip_qwen_eager_16x24", (1, 16, 24)), ("visionzip_qwen_flash_20x14", (1, 20, 14))],
)
def test_visionzip(tower: VisionTower, case: str, grid: Grid) -> None:
    """Scores and the metric by which tokens are merged, of the original, from its last block."""
    data = load_file(METHODS / f"{case}.safetensors")
    config = replace(tower.config, hidden_size=48, num_heads=4)
    layout = vision_layout((grid,), config, CPU)
    assert torch.equal(layout.token_order, data["in.window_index"])
    pair = tuple(unrotated(data[f"in.{x}_rot"], *layout.rotary) for x in "qk")
    out = run(tower_of(config, [pair]), (grid,), VisionTaps(received=(Received(),), keys=(-1,)))
    close(out.received[Received()], data["out.score"])
    close(out.keys[-1], data["out.metric"])


def test_vscan(tower: VisionTower) -> None:
    """Scores of the original from its first full block and its last one, rotated twice; it takes a mean over patches and a sum
    over heads where the tap has a sum and a mean."""
    data, grid = load_file(METHODS / "vscan_qwen_double_22x18.safetensors"), (1, 22, 18)
    cos, sin = (data[f"in.{name}"][:, :6] for name in ("cos", "sin"))
    pairs = [
        tuple(unrotated(data[f"in.{which}_{x}_rot"], cos, sin) for x in "qk") for which in ("local", "global")
    ]
    taps = Received("first_full", 2), Received(-1, 2)
    out = run(tower_of(tower.config, pairs), (grid,), VisionTaps(received=taps))
    for tap, which in zip(taps, ("local", "global"), strict=True):
        close(out.received[tap] * 4 / 396, data[f"out.score_{which}"])


# -- names and costs ---------------------------------------------------------------------------------------------


def names_of(out: VisionOutput) -> tuple[set[Any], ...]:
    return set(out.hidden), set(out.received), set(out.keys)


def test_names(tower: VisionTower) -> None:
    """Each tap comes back under the name it was asked for by; two names of one block are one result."""
    taps = VisionTaps(
        hidden=(-1, 3, 0),
        received=(Received(), Received(3), Received("first_full"), Received(-4, 2)),
        keys=(-2,),
    )
    out, plain = run(tower, MIXED, taps), run(tower, MIXED, EVERYTHING)
    assert names_of(out) == (set(taps.hidden), set(taps.received), set(taps.keys))
    assert out.hidden[-1] is out.hidden[3] and out.received[Received()] is out.received[Received(3)]
    pairs = {Received(): (3, 1), Received("first_full"): (1, 1), Received(-4, 2): (0, 2)}
    for tap, (block, rotations) in pairs.items():
        assert torch.equal(out.received[tap], plain.received[Received(block, rotations)])
    assert torch.equal(out.keys[-2], plain.keys[2]) and torch.equal(out.hidden[-1], plain.hidden[3])


def test_union() -> None:
    one = VisionTaps(hidden=(3, 1), received=(Received(),), keys=(2,))
    two = VisionTaps(hidden=(1, 0), received=(Received(-1, 2), Received(-1)), keys=(2, -1))
    assert one | two == VisionTaps((3, 1, 0), (Received(), Received(-1, 2)), (2, -1))
    assert one | NO_TAPS == NO_TAPS | one == one


@pytest.mark.parametrize(
    ("taps", "words"),
    [
        (VisionTaps(hidden=(4,)), "from -4 to 3 or 'first_full', found 4"),
        (VisionTaps(keys=(-5,)), "from -4 to 3 or 'first_full', found -5"),
        (VisionTaps(received=(Received(31),)), "from -4 to 3 or 'first_full', found 31"),
        (VisionTaps(received=(Received("last"),)), "found 'last'"),  # type: ignore[arg-type]
    ],
)
def test_blocks_that_are_not_there(tower: VisionTower, taps: VisionTaps, words: str) -> None:
    with pytest.raises(GlimpseError, match=words):
        run(tower, MIXED, taps)


def test_other_mistakes() -> None:
    with pytest.raises(GlimpseError, match="none among 4"):
        VisionTaps(received=(Received("first_full"),)).by_block(4, ())
    with pytest.raises(GlimpseError, match="expected 1 or 2, found 3"):
        Received(-1, 3)


@pytest.mark.parametrize(
    ("taps", "scored", "extra"),
    [
        (NO_TAPS, 0, 0),
        (VisionTaps(hidden=(0, 3), keys=(1, 3)), 0, 0),
        (VisionTaps(received=(Received(), Received(3))), 1, 0),
        (VisionTaps(received=(Received(1), Received("first_full", 2))), 2, 1),
    ],
    ids=["nothing", "no attention", "one", "twice rotated"],
)
def test_only_what_was_asked_for_is_computed(
    tower: VisionTower, monkeypatch: pytest.MonkeyPatch, taps: VisionTaps, scored: int, extra: int
) -> None:
    """Nor does a tap change what comes out of the tower, not even one that rotates queries and keys again."""
    wanted = run(tower, MIXED, NO_TAPS).embeds
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(f"{name} with lse" if options.get("return_lse") else name)
            return plain(*args, **options)

        monkeypatch.setattr(module, name, call)

    counted(vision, "attention")
    counted(tapping, "attention")
    counted(tapping, "received_attention")
    out = run(tower, MIXED, taps)
    blocks = {tap.block for tap in taps.received}
    with_lse = bool(blocks) + extra
    assert calls.count("received_attention") == scored and calls.count("attention with lse") == with_lse
    assert calls.count("attention") == 4 - bool(blocks)
    assert torch.equal(out.embeds, wanted)
    assert names_of(out) == (set(taps.hidden), set(taps.received), set(taps.keys))


# -- memory ------------------------------------------------------------------------------------------------------

ONE_BLOCK = """
import sys
import torch
from glimpse_kernels.received_attention import naive
from glimpse_runtime.models.qwen2_5_vl.config import VisionConfig
from glimpse_runtime.models.qwen2_5_vl.layout import vision_layout
from glimpse_runtime.models.qwen2_5_vl.linear import GatedLinear, Linear
from glimpse_runtime.models.qwen2_5_vl.vision import VisionBlock, VisionTower
from glimpse_runtime.taps import Received, VisionTaps

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

naive.CHUNK = 1 << 20  # the definition's own pieces: small beside the matrix that must not be there
side, wide = int(sys.argv[1]), 16
config = VisionConfig(
    depth=1, hidden_size=wide, num_heads=1, intermediate_size=wide, out_hidden_size=wide, patch_size=2,
    temporal_patch_size=1, merge_size=2, in_channels=1, window_size=16, full_attention_blocks=(0,),
    tokens_per_second=2.0, rope_theta=10000.0,
)
torch.manual_seed(0)

def linear(outputs, inputs=wide):
    return Linear(torch.randn(outputs, inputs) * inputs**-0.5, torch.zeros(outputs))

block = VisionBlock(
    torch.ones(wide), linear(3 * wide), linear(wide), torch.ones(wide),
    GatedLinear(linear(wide), linear(wide)), linear(wide),
)
tower = VisionTower(
    config, Linear(torch.randn(wide, 4), None), (block,), torch.ones(wide), linear(4 * wide, 4 * wide),
    linear(wide, 4 * wide),
)
taps = VisionTaps(hidden=(0,), received=(Received(),), keys=(0,))

def see(side):
    with torch.inference_mode():
        layout = vision_layout(((1, side, side),), config, torch.device("cpu"))
        return tower(torch.randn(side * side, 4), layout, taps).received[Received()]

see(40)  # what the first call loads
before = memory("VmRSS")
found = see(side)
assert found.shape == (side * side // 4,) and abs(found.double().mean() - 1) < 1e-4 and found.std() > 1e-2
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("side", [96, 256], ids=["9,216 patches", "65,536 patches"])
def test_memory_grows_with_the_patches_not_with_their_square(side: int) -> None:
    """One full block. 65,536 patches are a picture of 16,384 tokens, whose attention matrix alone had 16 GiB a head; the
    definition of `received_attention` would need minutes for it, so it waits for a machine with a kernel."""
    for op in ("attention", "received_attention"):
        if side > 100 and dispatch.choose(op, "cpu", torch.float32) == "naive":
            pytest.skip(f"{op} has no compiled backend here")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", ONE_BLOCK, str(side)], cwd=root, env=os.environ | {"PYTHONPATH": root},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    matrix = side**4 * 4
    assert int(done.stdout) < matrix / (2 if side < 100 else 32)
