# SPDX-License-Identifier: Apache-2.0
"""Generation with Hugging Face's call and return types."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import StoppingCriteriaList

from glimpse_runtime import sampling
from glimpse_runtime.decode import DecodeLoop
from glimpse_runtime.device_decode import DeviceLoop, loop_for
from glimpse_runtime.device_sampling import Choice
from glimpse_runtime.errors import UnsupportedOptionError
from glimpse_runtime.prefill import Prefill
from glimpse_runtime.report import GlimpseGenerateOutput, PruningReport
from glimpse_runtime.uploads import upload

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
    """Sample from a finished prefill until every row has ended; `began` is when the call started.

    A GPU samples by itself, and the host reads the tokens some steps later, unless the call needs it for more than that:
    `no_repeat_ngram_size`, scores or logits to be given back, or code of the caller's (`logits_processor`,
    `stopping_criteria`, `stop_strings`). Then the host waits for every step.
    """
    config = request.config
    criteria = sampling.stopping(config, request.tokenizer, request.stopping_criteria)
    choice = sampling.on_device(config, input_ids.shape[1], request.logits_processor)
    kept = _Kept()
    with closing(loop_for(prefill)) as loop:
        if request.streamer is not None:
            request.streamer.put(input_ids.cpu())
        if isinstance(loop, DeviceLoop) and choice is not None and not criteria:
            sequences = _read(loop, prefill, input_ids, request, choice, began)
        else:
            sequences = _sampled(loop, prefill, input_ids, request, criteria, began, kept)
    if request.streamer is not None:
        request.streamer.end()
    if not config.return_dict_in_generate:
        return sequences
    return GlimpseGenerateOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=tuple(kept.scores) if config.output_scores else None,  # type: ignore[arg-type]
        logits=tuple(kept.logits) if config.output_logits else None,  # type: ignore[arg-type]
        pruning=report,
        timings=prefill.timings,
    )


@dataclass
class _Kept:
    """What was asked for beside the tokens, one tensor a step."""

    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


def _read(
    loop: DeviceLoop,
    prefill: Prefill,
    input_ids: torch.Tensor,
    request: Request,
    choice: Choice,
    began: float,
) -> torch.Tensor:
    """`[B, L + new]`, of tokens that the device chooses."""
    assert prefill.last_logits is not None
    timings, streamer, ends = prefill.timings, request.streamer, choice.ends
    running = [True] * input_ids.shape[0]
    made: list[torch.Tensor] = []
    first_token_at = began
    said = None
    if choice.penalty != 1.0:  # padding was said by nobody
        padding = request.attention_mask.to(input_ids.device) == 0
        said = input_ids.masked_fill(padding, prefill.last_logits.shape[1])
    for tokens in loop.tokens(prefill.last_logits, choice, request.max_new_tokens, said):
        made.append(tokens)
        if streamer is not None:
            streamer.put(tokens)
        timings.new_tokens += 1
        if timings.new_tokens == 1:
            first_token_at = time.perf_counter()
            timings.ttft = first_token_at - began
        if ends:
            running = [on and token not in ends for on, token in zip(running, tokens.tolist(), strict=True)]
            if not any(running):
                break
    timings.decode = time.perf_counter() - first_token_at
    return torch.cat([input_ids, upload(torch.stack(made, 1), input_ids.device)], 1)


def _sampled(
    loop: DecodeLoop | DeviceLoop,
    prefill: Prefill,
    input_ids: torch.Tensor,
    request: Request,
    criteria: StoppingCriteriaList,
    began: float,
    kept: _Kept,
) -> torch.Tensor:
    """`[B, L + new]`, of tokens that the host chooses."""
    config, timings, streamer = request.config, prefill.timings, request.streamer
    assert prefill.last_logits is not None
    prompt = upload(input_ids, prefill.last_logits.device)
    padding = upload(request.attention_mask, prompt.device) == 0
    chain = sampling.processors(config, padding, request.logits_processor)
    ends, sample = frozenset(sampling.eos_ids(config)), bool(config.do_sample)
    # Whoever else sees the scores may keep them, or write to them.
    private = bool(chain or criteria or config.output_scores or config.output_logits)
    sequences, logits = sampling.Tokens(prompt, request.max_new_tokens), prefill.last_logits
    running = [True] * input_ids.shape[0]
    first_token_at = began
    while True:
        raw = logits.to(torch.float32, copy=private)
        scores = raw
        if chain:
            own = raw.clone() if config.output_logits else raw
            scores = chain(sequences.so_far(), own)  # type: ignore[arg-type]
        if config.output_scores:
            kept.scores.append(scores)
        if config.output_logits:
            kept.logits.append(raw)
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
    return sequences.result().to(input_ids.device)


def _mask(rows: list[bool], like: torch.Tensor) -> torch.Tensor:
    return upload(torch.tensor(rows, dtype=torch.bool, device="cpu"), like.device)
