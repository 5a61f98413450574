# SPDX-License-Identifier: Apache-2.0
"""Generation with Hugging Face's call and return types."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from glimpse_runtime import sampling
from glimpse_runtime.decode import DecodeLoop
from glimpse_runtime.errors import UnsupportedOptionError
from glimpse_runtime.prefill import Prefill
from glimpse_runtime.report import GlimpseGenerateOutput, PruningReport

# Arguments of Hugging Face's generate() that ask for something else than decoding one sequence a row.
_REFUSED = (
    "assistant_model",
    "assistant_tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "prefix_allowed_tokens_fn",
    "custom_generate",
    "inputs_embeds",
    "past_key_values",
    "position_ids",
    "cache_position",
)


@dataclass
class Request:
    """What a `generate` call asks for, sorted and checked.

    Attributes:
        config: generation options.
        model_inputs: what is left for the model: processor outputs and pruning options.
        max_new_tokens: budget of each row.
    """

    config: GenerationConfig
    model_inputs: dict[str, Any]
    max_new_tokens: int
    attention_mask: torch.Tensor
    streamer: Any
    tokenizer: Any
    logits_processor: Any
    stopping_criteria: Any

    @classmethod
    def parse(cls, defaults: GenerationConfig, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> Request:
        """Sort the keyword arguments of a call.

        Raises:
            UnsupportedOptionError: an argument cannot be honoured.
            GlimpseError: an argument has a wrong value.
        """
        options = dict(kwargs)
        refused = [name for name in _REFUSED if options.pop(name, None) is not None]
        if refused:
            raise UnsupportedOptionError(
                f"generate() arguments that cannot be honoured: {', '.join(refused)}"
            )
        streamer = options.pop("streamer", None)
        tokenizer = options.pop("tokenizer", None)
        logits_processor = options.pop("logits_processor", None)
        stopping_criteria = options.pop("stopping_criteria", None)
        options.pop("synced_gpus", None)
        config, inputs = sampling.resolve_config(defaults, options.pop("generation_config", None), options)
        mask = inputs.pop("attention_mask", None)
        if mask is None:
            mask = infer_mask(input_ids, config)
        if config.pad_token_id is None:
            config.pad_token_id = next(iter(sampling.eos_ids(config)), None)
        return cls(
            config=config,
            model_inputs=inputs,
            max_new_tokens=sampling.token_budget(config, input_ids.shape[1]),
            attention_mask=mask,
            streamer=streamer,
            tokenizer=tokenizer,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
        )


def infer_mask(input_ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Without a mask, the pad id marks padding, unless it also ends a text."""
    pad = config.pad_token_id
    if pad is None or pad in sampling.eos_ids(config):
        return torch.ones_like(input_ids)
    return (input_ids != pad).to(input_ids.dtype)


def decode(
    prefill: Prefill, input_ids: torch.Tensor, request: Request, report: PruningReport | None, began: float
) -> GlimpseGenerateOutput | torch.Tensor:
    """Sample from a finished prefill until every row has ended; `began` is when the call started."""
    config, timings = request.config, prefill.timings
    assert prefill.last_logits is not None and prefill.pool is not None
    padding = request.attention_mask.to(input_ids.device) == 0
    chain = sampling.processors(config, padding, request.logits_processor)
    criteria = sampling.stopping(config, request.tokenizer, request.stopping_criteria)
    ends = frozenset(sampling.eos_ids(config))
    sample, streamer = bool(config.do_sample), request.streamer
    # Whoever else sees the scores may keep them, or write to them.
    private = bool(chain or criteria or config.output_scores or config.output_logits)
    loop = DecodeLoop(prefill.decoder, prefill.pool, prefill.batch.next_positions, prefill.extra_rows)
    sequences, logits = sampling.Tokens(input_ids, request.max_new_tokens), prefill.last_logits
    running = [True] * input_ids.shape[0]
    kept_scores: list[torch.Tensor] = []
    kept_logits: list[torch.Tensor] = []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    first_token_at = began
    while True:
        raw = logits.to(torch.float32, copy=private)
        scores = raw
        if chain:
            own = raw.clone() if config.output_logits else raw
            scores = chain(sequences.so_far(), own)  # type: ignore[arg-type]
        if config.output_scores:
            kept_scores.append(scores)
        if config.output_logits:
            kept_logits.append(raw)
        tokens = sampling.pick(scores, sample=sample)
        if ends and not all(running):
            tokens = torch.where(_mask(running, tokens), tokens, config.pad_token_id)
        sequences.append(tokens)
        if streamer is not None:
            streamer.put(tokens.cpu())
        timings.new_tokens += 1
        if timings.new_tokens == 1:
            first_token_at = time.perf_counter()
            timings.ttft = first_token_at - began
        before = sum(running)
        if ends:
            running = [on and token not in ends for on, token in zip(running, tokens.tolist(), strict=True)]
        if criteria:
            done = criteria(sequences.so_far(), scores).tolist()
            running = [on and not over for on, over in zip(running, done, strict=True)]
        if timings.new_tokens == request.max_new_tokens or not any(running):
            break
        # Without end tokens rows go on until all have stopped, as Hugging Face's do.
        if ends and sum(running) < before:
            loop.retire(~_mask(running, tokens))
        logits = loop.advance(tokens)
    timings.decode = time.perf_counter() - first_token_at
    if request.streamer is not None:
        request.streamer.end()
    if not config.return_dict_in_generate:
        return sequences.result()
    return GlimpseGenerateOutput(
        sequences=sequences.result(),  # type: ignore[arg-type]
        scores=tuple(kept_scores) if config.output_scores else None,  # type: ignore[arg-type]
        logits=tuple(kept_logits) if config.output_logits else None,  # type: ignore[arg-type]
        pruning=report,
        timings=timings,
    )


def _mask(rows: list[bool], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool, device=like.device)
