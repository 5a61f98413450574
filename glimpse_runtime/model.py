# SPDX-License-Identifier: Apache-2.0
"""The public face: load, prefill, generate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from glimpse_runtime import generate as generation
from glimpse_runtime.decode import DecodeLoop
from glimpse_runtime.errors import GlimpseError, UnsupportedOptionError
from glimpse_runtime.loading import BaseModel, load_base, share_base
from glimpse_runtime.models.qwen2_5_vl.inputs import check_ids, pack, read_grids
from glimpse_runtime.models.qwen2_5_vl.layout import vision_layout
from glimpse_runtime.modules import GlimpseModules
from glimpse_runtime.plan import PrunePlan
from glimpse_runtime.plans import glimpse as glimpse_plan
from glimpse_runtime.prefill import Prefill, Timings
from glimpse_runtime.report import GlimpseGenerateOutput, PruningReport

DEFAULT = "default"
_BUDGET = ("threshold", "max_remain_ratio", "min_remain_num", "anchor_positions")


class GlimpseModel:
    """A Qwen2.5-VL whose visual tokens may be pruned on the way.

    Args:
        base: loaded weights.
        plan: what `plan="default"` means; None: nothing is pruned.
    """

    def __init__(self, base: BaseModel, plan: PrunePlan | None = None) -> None:
        self.base = base
        self.plan = plan

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        glimpse: str | Path | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
    ) -> GlimpseModel:
        """Load a Qwen2.5-VL and, if given, GlimpsePrune modules trained for it.

        Args:
            base: Hugging Face folder or hub id.
            glimpse: folder or hub id with `config.json` and `new_modules_gp.pt`; becomes the default plan.
            dtype: `torch.float32`, `torch.bfloat16`, or "auto" for the checkpoint's own.
            device: "cpu".

        Raises:
            CheckpointError: a file, key or shape is missing, left over, or belongs to another base.
        """
        place = torch.device(device)
        loaded = load_base(base, dtype=dtype, device=place)
        return cls(loaded, cls._load_plan(loaded, glimpse))

    @classmethod
    def from_hf(cls, hf_model: Any, glimpse: str | Path | None = None) -> GlimpseModel:
        """Wrap a loaded `Qwen2_5_VLForConditionalGeneration`; its weights are used where they are."""
        shared = share_base(hf_model)
        return cls(shared, cls._load_plan(shared, glimpse))

    @staticmethod
    def _load_plan(base: BaseModel, glimpse: str | Path | None) -> PrunePlan | None:
        if glimpse is None:
            return None
        decoder = base.decoder
        return glimpse_plan(
            GlimpseModules.from_pretrained(glimpse, base.config, dtype=decoder.dtype, device=decoder.device)
        )

    @property
    def generation_config(self) -> GenerationConfig:
        return self.base.generation_config

    @property
    def dtype(self) -> torch.dtype:
        return self.base.decoder.dtype

    @property
    def device(self) -> torch.device:
        return self.base.decoder.device

    @torch.inference_mode()
    def generate(
        self, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> GlimpseGenerateOutput | torch.Tensor:
        """Answer a batch of prompts; Hugging Face's `generate` with pruning options.

        Args:
            input_ids: `[B, L]`, padded on either side; image tokens already expanded.
            kwargs: the other outputs of the processor (`attention_mask`, `pixel_values`, `image_grid_thw`, ...),
                generation options (`max_new_tokens`, `do_sample`, `streamer`, ...), and for this call alone `plan`
                (a `PrunePlan`, "default", or None for no pruning), `threshold`, `max_remain_ratio`,
                `min_remain_num`, `anchor_positions`, `ref_masks`.

        Returns:
            `[B, L + new]` int64, or a `GlimpseGenerateOutput` with `return_dict_in_generate=True`.

        Raises:
            GlimpseError: inputs that do not fit together.
            UnsupportedOptionError: an option that cannot be honoured.
        """
        began = time.perf_counter()
        ids = check_ids(kwargs.pop("inputs", None) if input_ids is None else input_ids)
        request = generation.Request.parse(self.generation_config, ids, kwargs)
        context = self.base.config.text.max_positions
        if ids.shape[1] + request.max_new_tokens > context and ids.shape[1] <= context:
            request.max_new_tokens = max(1, context - ids.shape[1])
        prefill = self._prefill(
            ids, request.attention_mask, extra_rows=request.max_new_tokens, **request.model_inputs
        )
        if prefill.last_logits is None:
            prefill.choose()
        return generation.decode(prefill, ids, request, self._report(prefill), began)

    @torch.inference_mode()
    def prefill(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        select: bool = True,
        max_new_tokens: int = 64,
        **kwargs: Any,
    ) -> PrefillResult:
        """Run the prompt only.

        Args:
            select: False stops inside the pruning layer, with the scores known; `PrefillResult.select` goes on.
            max_new_tokens: room kept for `PrefillResult.decode`.
            kwargs: processor outputs and pruning options as in `generate`.
        """
        ids = check_ids(kwargs.pop("inputs", None) if input_ids is None else input_ids)
        prefill = self._prefill(ids, attention_mask, extra_rows=max_new_tokens, **kwargs)
        result = PrefillResult(self, prefill)
        if select and prefill.last_logits is None:
            prefill.choose()
        return result

    def _prefill(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        extra_rows: int,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: Sequence[float] | torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        plan: PrunePlan | str | None = DEFAULT,
        ref_masks: torch.Tensor | Sequence[torch.Tensor] | None = None,
        **options: Any,
    ) -> Prefill:
        del mm_token_type_ids  # the ids themselves say which tokens are visual
        config, device = self.base.config, self.device
        unknown = sorted(set(options) - set(_BUDGET))
        if unknown:
            raise UnsupportedOptionError(f"arguments that are not known here: {', '.join(unknown)}")
        chosen = self._plan(plan, ref_masks is not None, {k: v for k, v in options.items() if v is not None})
        images = read_grids("image", image_grid_thw, pixel_values, config)
        videos = read_grids("video", video_grid_thw, pixel_values_videos, config)
        scorer = chosen.stages[0].score if chosen else None
        batch = pack(
            input_ids,
            attention_mask,
            images,
            videos,
            config,
            seconds_per_grid=None if second_per_grid_ts is None else [float(s) for s in second_per_grid_ts],
            probe_length=scorer.probe.length if scorer else 0,
            device=device,
        )
        given = None if ref_masks is None else _given_scores(ref_masks, batch.num_visual, device)
        state = Prefill(self.base.decoder, batch, chosen, extra_rows, Timings(), given)
        vision = layout = None
        if images or videos:
            began = time.perf_counter()
            pixels = [p.to(device) for p in (pixel_values, pixel_values_videos) if p is not None]
            layout = vision_layout((*images, *videos), config.vision, device)
            taps = scorer.vision_taps if scorer else ()
            vision = self.base.vision(pixels[0] if len(pixels) == 1 else torch.cat(pixels), layout, taps)
            state.timings.vision = time.perf_counter() - began
        state.start(vision, layout)
        return state

    def _plan(
        self, plan: PrunePlan | str | None, masks_given: bool, changes: dict[str, Any]
    ) -> PrunePlan | None:
        if isinstance(plan, str) and plan != DEFAULT:
            raise GlimpseError(f"plan: expected a PrunePlan, None or {DEFAULT!r}, found {plan!r}")
        chosen = self.plan if isinstance(plan, str) else plan
        if chosen is None:
            if masks_given or changes:
                asked = [*changes, *(["ref_masks"] if masks_given else [])]
                raise GlimpseError(f"{', '.join(asked)}: expected a pruning plan to apply to, found none")
            return None
        if "anchor_positions" in changes:
            changes["anchor_positions"] = tuple(changes["anchor_positions"])
        if masks_given:
            chosen = chosen.with_given_masks()
        return chosen.with_budget(**changes) if changes else chosen

    @staticmethod
    def _report(prefill: Prefill) -> PruningReport | None:
        if prefill.selection is None:
            return None
        assert prefill.plan is not None
        scores = prefill.scores if prefill.plan.stages[0].score is not None else None
        return PruningReport.of(prefill.batch, prefill.selection.keep, scores)


class PrefillResult:
    """A prompt batch after prefill, or waiting inside the pruning layer for its selection."""

    def __init__(self, model: GlimpseModel, state: Prefill) -> None:
        self._model = model
        self._state = state

    @property
    def scores(self) -> torch.Tensor | None:
        """`[N]` fp32 importance of every visual token, prompt order; known before the selection."""
        return self._state.scores

    @torch.inference_mode()
    def select(self, keep: torch.Tensor | Sequence[torch.Tensor] | None = None) -> PrefillResult:
        """Go on after `prefill(..., select=False)`.

        Args:
            keep: bool masks, `[N]` or one a picture, taken as they are; None: the plan's own selection.

        Raises:
            GlimpseError: the selection was made already, or the mask has another size.
        """
        state = self._state
        if state.last_logits is not None:
            raise GlimpseError(
                "select(): expected a prefill made with select=False that was not selected yet"
            )
        if keep is None:
            state.choose()
        else:
            assert state.plan is not None
            scores = _given_scores(keep, state.batch.num_visual, state.batch.device)
            plan = state.plan
            state.plan = plan.with_budget(
                threshold=0.5, max_remain_ratio=None, min_remain_num=0, anchor_positions=(), group="picture"
            )
            state.choose(scores)
        return self

    @property
    def last_logits(self) -> torch.Tensor:
        """`[B, vocabulary]` after the last prompt token, in the model's dtype."""
        self._require_done()
        assert self._state.last_logits is not None
        return self._state.last_logits

    @property
    def pruning(self) -> PruningReport | None:
        """What was kept of each picture; None if nothing was pruned."""
        self._require_done()
        return self._model._report(self._state)

    @property
    def timings(self) -> Timings:
        return self._state.timings

    @property
    def kept_positions(self) -> list[torch.Tensor]:
        """Rotary positions of each row's prompt tokens that stayed, `[3, kept]` int64 each."""
        self._require_done()
        state = self._state
        assert state.pool is not None and state.kept_positions is not None
        return list(state.kept_positions.split(state.pool.lengths.tolist(), dim=1))

    def kv(self, row: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (rotated) and values `[kept, kv heads, head_dim]` of one row in one layer."""
        self._require_done()
        assert self._state.pool is not None
        return self._state.pool.rows(row, layer)

    @torch.inference_mode()
    def decode(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Continue greedily for exactly `steps` tokens, without regard for end tokens; once.

        Returns:
            tokens `[B, steps]` int64 and the logits `[B, steps, vocabulary]` from which they were taken.
        """
        self._require_done()
        state = self._state
        assert state.pool is not None
        loop = DecodeLoop(state.decoder, state.pool, state.batch.next_positions)
        logits = [self.last_logits]
        tokens = [logits[0].argmax(-1)]
        while len(tokens) < steps:
            logits.append(loop.step(tokens[-1]))
            tokens.append(logits[-1].argmax(-1))
        return torch.stack(tokens, 1), torch.stack(logits, 1)

    def _require_done(self) -> None:
        if self._state.last_logits is None:
            raise GlimpseError("expected a finished prefill: it waits for select()")


def _given_scores(
    masks: torch.Tensor | Sequence[torch.Tensor], tokens: int, device: torch.device
) -> torch.Tensor:
    """Keep masks as scores: +1 stays, -1 goes."""
    parts = [masks] if isinstance(masks, torch.Tensor) else list(masks)
    flat = torch.cat([torch.as_tensor(part).flatten() for part in parts]) if parts else torch.zeros(0)
    if flat.shape[0] != tokens:
        raise GlimpseError(f"keep masks: expected {tokens} values, one a visual token, found {flat.shape[0]}")
    return torch.where(flat.to(device) > 0, 1.0, -1.0)
