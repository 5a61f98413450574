# SPDX-License-Identifier: Apache-2.0
"""The public face: load, prefill, generate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from glimpse_runtime import generate as generation
from glimpse_runtime import plans
from glimpse_runtime.engine import Engine, check_memory
from glimpse_runtime.entry import inference
from glimpse_runtime.errors import GlimpseError, UnsupportedOptionError
from glimpse_runtime.loading import BaseModel, check_device, load_base, share_base
from glimpse_runtime.masks import scores_from_masks
from glimpse_runtime.models.qwen2_5_vl.inputs import check_ids, pack, read_grids
from glimpse_runtime.models.qwen2_5_vl.layout import vision_layout
from glimpse_runtime.modules import GlimpseModules
from glimpse_runtime.plan import PrunePlan
from glimpse_runtime.plans.glimpse import GlimpseScorer
from glimpse_runtime.plans.registry import DEFAULT
from glimpse_runtime.prefill import Prefill
from glimpse_runtime.prefill_result import PrefillResult
from glimpse_runtime.report import GlimpseGenerateOutput, report_of
from glimpse_runtime.taps import VisionTaps
from glimpse_runtime.uploads import upload
from glimpse_runtime.warmup import WarmupReport, warm_up

logger = logging.getLogger(__name__)

_BUDGET = ("threshold", "max_remain_ratio", "min_remain_num", "anchor_positions")


class GlimpseModel:
    """A Qwen2.5-VL whose visual tokens may be pruned on the way.

    Args:
        base: loaded weights.
        plan: what `plan="default"` means; None: nothing is pruned.
        engine: what is kept on the device between calls.
    """

    def __init__(
        self, base: BaseModel, plan: PrunePlan | None = None, *, engine: Engine | None = None
    ) -> None:
        self.base = base
        self.plan = plan
        self.engine = Engine(base.decoder) if engine is None else engine
        self.generation_config = base.generation_config

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        glimpse: str | Path | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        quantize: str | None = None,
        kv_memory: int | None = None,
        graph_memory: int | None = None,
    ) -> GlimpseModel:
        """Load a Qwen2.5-VL and, if given, GlimpsePrune modules trained for it.

        Args:
            base: Hugging Face folder or hub id.
            glimpse: folder or hub id with `config.json` and `new_modules_gp.pt`; becomes the default plan.
            dtype: `torch.float32`, `torch.bfloat16`, or "auto" for the checkpoint's own.
            device: "cpu" or a GPU.
            quantize: "int8" keeps the decoder's matrices in 8 bits: about twice the decoding speed, half the memory.
            kv_memory: bytes of a GPU for keys and values; None: what calls turn out to need, or `warmup` finds.
            graph_memory: bytes of a GPU that captured work may hold; None: no bound.

        Raises:
            CheckpointError: a file, key or shape is missing, left over, or belongs to another base.
        """
        place = check_device(device)
        check_memory(place, kv_memory=kv_memory, graph_memory=graph_memory)
        loaded = load_base(base, dtype=dtype, device=place, quantize=quantize)
        engine = Engine(loaded.decoder, kv_bytes=kv_memory, graph_bytes=graph_memory)
        return cls(loaded, cls._load_plan(loaded, glimpse), engine=engine)

    @classmethod
    def from_hf(
        cls, hf_model: Any, glimpse: str | Path | None = None, *, quantize: str | None = None
    ) -> GlimpseModel:
        """Wrap a loaded `Qwen2_5_VLForConditionalGeneration`; its weights are used where they are.

        `quantize` as in `from_pretrained`: the decoder's matrices are then an 8-bit copy.
        """
        shared = share_base(hf_model, quantize=quantize)
        return cls(shared, cls._load_plan(shared, glimpse))

    @staticmethod
    def _load_plan(base: BaseModel, glimpse: str | Path | None) -> PrunePlan | None:
        if glimpse is None:
            return None
        decoder = base.decoder
        return plans.glimpse(
            GlimpseModules.from_pretrained(glimpse, base.config, dtype=decoder.dtype, device=decoder.device)
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.base.decoder.dtype

    @property
    def device(self) -> torch.device:
        return self.base.decoder.device

    @inference
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        **kwargs: Any,
    ) -> GlimpseGenerateOutput | torch.Tensor:
        """Answer a batch of prompts; Hugging Face's `generate` with pruning options.

        Args:
            inputs, generation_config, logits_processor, stopping_criteria: as in Hugging Face's `generate`.
            kwargs: the outputs of the processor (`input_ids` `[B, L]`, padded on either side, image tokens expanded;
                `attention_mask`, `pixel_values`, `image_grid_thw`, ...), generation options (`max_new_tokens`,
                `do_sample`, `streamer`, ...), and for this call alone `plan` (a `PrunePlan`, the name of a registered
                method, "default", or None for no pruning), `threshold`, `max_remain_ratio` (None: no cap),
                `min_remain_num`, `anchor_positions`, `ref_masks` (see `glimpse_runtime.masks`).

        Returns:
            `[B, L + new]` int64, or a `GlimpseGenerateOutput` with `return_dict_in_generate=True`.

        Raises:
            GlimpseError: inputs that do not fit together.
            UnsupportedOptionError: an option that cannot be honoured.
        """
        began = time.perf_counter()
        named = kwargs.pop("input_ids", None)
        ids = check_ids(named if inputs is None else inputs)
        given = {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
        }
        request = generation.Request.parse(self.generation_config, ids, {**kwargs, **given})
        context = self.base.config.text.max_positions
        if ids.shape[1] + request.max_new_tokens > context:
            logger.warning(
                "a prompt of %d tokens and up to %d new ones exceed the model's context of %d",
                ids.shape[1], request.max_new_tokens, context,
            )  # fmt: skip
        with self.engine.call():
            prefill = self.prefilled(ids, request)
            return generation.decode(prefill, ids, request, report_of(prefill), began)

    def prefilled(self, input_ids: torch.Tensor, request: generation.Request) -> Prefill:
        """The prompt of a `generate` call, ready to be continued."""
        prefill = self._prefill(
            input_ids, request.attention_mask, extra_rows=request.max_new_tokens, **request.model_inputs
        )
        if prefill.last_logits is None:
            prefill.choose()
        return prefill

    @inference
    def warmup(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        batch_sizes: Sequence[int] = (1,),
        tokens: int = 2048,
        max_new_tokens: int = 256,
        kv_share: float | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> WarmupReport:
        """Do beforehand what the first calls would wait for: on a GPU kernels are compiled and work is captured.

        Args:
            inputs: one prompt like the longest to come; each batch repeats it. None: only decoding is prepared.
            batch_sizes: the largest comes first; each also serves smaller batches, down to half of it.
            tokens: without `inputs`: rows that a sequence may come to after pruning, new ones included.
            max_new_tokens, options: as in the calls to come (`do_sample`, `top_k`, `max_remain_ratio`, ...).
            kv_share: how much of a GPU's free memory, less what the largest batch needs beside it, becomes the pool of
                keys and values (0.9, say), for good. Needs `inputs`. None: the pool grows with what is asked for.
            progress: is told how many batch sizes are done, of how many.

        Raises:
            GlimpseError: not enough memory, or arguments out of range.
        """
        return warm_up(
            self, inputs, batch_sizes=batch_sizes, tokens=tokens, max_new_tokens=max_new_tokens,
            kv_share=kv_share, progress=progress, options=options,
        )  # fmt: skip

    @inference
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
        ids = check_ids(input_ids)
        if max_new_tokens < 1:
            raise GlimpseError(
                f"max_new_tokens: expected room for at least one token, found {max_new_tokens}"
            )
        mask = (
            generation.infer_mask(ids, self.generation_config) if attention_mask is None else attention_mask
        )
        with self.engine.call(keep=True):
            state = self._prefill(ids, mask, extra_rows=max_new_tokens, **kwargs)
            if select and state.last_logits is None:
                state.choose()
        return PrefillResult(state, waiting=not select)

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
        # None means the plan's own value, but for the cap, where it is a value: no cap.
        changes = {k: v for k, v in options.items() if v is not None or k == "max_remain_ratio"}
        chosen = self._plan(plan, ref_masks is not None, changes)
        images = read_grids("image", image_grid_thw, pixel_values, config)
        videos = read_grids("video", video_grid_thw, pixel_values_videos, config)
        glance = chosen.glance if chosen else None
        batch = pack(
            input_ids,
            attention_mask,
            images,
            videos,
            config,
            seconds_per_grid=None if second_per_grid_ts is None else list(map(float, second_per_grid_ts)),
            probe_length=glance.probe.length if glance else 0,
            device=device,
        )
        given = None if ref_masks is None else scores_from_masks(ref_masks, batch)
        state = Prefill(self.base.decoder, batch, chosen, extra_rows, given, self.engine)
        vision = layout = None
        if images or videos:
            began = time.perf_counter()
            # In the model's dtype they take half the room, for as long as the tower works.
            given_pixels = (p for p in (pixel_values, pixel_values_videos) if p is not None)
            pixels = [upload(p, device).to(self.dtype) for p in given_pixels]
            layout = vision_layout((*images, *videos), config.vision, device)
            taps = chosen.taps if chosen else VisionTaps()
            vision = self.base.vision(pixels[0] if len(pixels) == 1 else torch.cat(pixels), layout, taps)
            del pixels  # on a GPU the layers need the room
            state.timings.vision = time.perf_counter() - began
        state.start(vision, layout)
        return state

    @property
    def modules(self) -> GlimpseModules | None:
        """GlimpsePrune's modules, if the model was loaded with some."""
        scorer = None if self.plan is None else self.plan.glance
        return scorer.modules if isinstance(scorer, GlimpseScorer) else None

    def _plan(
        self, plan: PrunePlan | str | None, masks_given: bool, changes: dict[str, Any]
    ) -> PrunePlan | None:
        chosen = self.plan if plan == DEFAULT else plans.resolve(plan, self.modules)
        if chosen is None:
            asked = [name for name, value in changes.items() if value is not None]
            asked += ["ref_masks"] if masks_given else []
            if asked:
                raise GlimpseError(f"{', '.join(asked)}: expected a pruning plan to apply to, found none")
            return None
        if "anchor_positions" in changes:
            anchors = changes["anchor_positions"]
            changes["anchor_positions"] = tuple(anchors) if isinstance(anchors, list) else anchors
        if masks_given:
            if "threshold" in changes:
                raise GlimpseError("threshold: expected none together with ref_masks, which are not scores")
            chosen = chosen.with_given_masks()
        return chosen.with_budget(**changes) if changes else chosen
