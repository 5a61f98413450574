# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens, with Hugging Face's own processors so that every option means the same here."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glimpse_runtime.device_sampling import Choice
from glimpse_runtime.errors import GlimpseError, UnsupportedOptionError

# Options that are honoured; any other field of a GenerationConfig must be at its default.
HONOURED = frozenset(
    """max_length max_new_tokens min_length min_new_tokens stop_strings do_sample temperature top_k top_p min_p
    repetition_penalty no_repeat_ngram_size pad_token_id bos_token_id eos_token_id return_dict_in_generate
    output_scores output_logits transformers_version use_cache""".split()
)
# Spelled-out neutral values of the options that are not honoured, where Hugging Face's default is None.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "guidance_scale": (1.0,),
    "early_stopping": (False,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "penalty_alpha": (0.0,),
    "is_assistant": (False,),
    "token_healing": (False,),
    "low_memory": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "disable_compile": (False, True),
}


def resolve_config(
    defaults: GenerationConfig, given: GenerationConfig | None, options: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Lay a call's options over the model's defaults, as Hugging Face does.

    Returns the config and the keyword arguments that are not generation options.

    Raises:
        UnsupportedOptionError: an option is set that cannot be honoured (beams, assisted decoding, ...).
    """
    config = GenerationConfig(**{k: v for k, v in defaults.to_dict().items() if v is not None})
    if given is not None:
        for name, value in given.to_dict().items():
            if value is not None:
                setattr(config, name, value)
    try:
        rest = config.update(**options)
    except ValueError as error:  # Hugging Face's own check of the values
        raise GlimpseError(str(error)) from error
    refused = []
    plain = GenerationConfig().to_dict()
    for name, value in config.to_dict().items():
        if name in HONOURED or name.startswith("_") or value is None or value == plain.get(name):
            continue
        if value not in _NEUTRAL.get(name, ()):
            refused.append(f"{name}={value!r}")
    if refused:
        raise UnsupportedOptionError(
            f"generation options that cannot be honoured: {', '.join(sorted(refused))}; "
            "expected greedy or sampled decoding of one sequence a row"
        )
    return config, rest


def eos_ids(config: GenerationConfig) -> list[int]:
    """End tokens as a list."""
    ids = config.eos_token_id
    return [] if ids is None else [int(i) for i in ids] if isinstance(ids, (list, tuple)) else [int(ids)]


def token_budget(config: GenerationConfig, prompt: int) -> int:
    """New tokens a call may make for prompts of `prompt` (padded) tokens; 20 if nothing says otherwise.

    Raises:
        GlimpseError: the budget is not positive.
    """
    if config.max_new_tokens is not None:
        budget = int(config.max_new_tokens)
    elif config.max_length is not None:
        budget = int(config.max_length) - prompt
    else:
        budget = 20
    if budget < 1:
        raise GlimpseError(
            f"expected room for at least one new token, found {budget} (prompt of {prompt} tokens)"
        )
    return budget


class PerRow(LogitsProcessor):
    """Shows a history-dependent processor each row without its padding, so that a batch changes no row."""

    def __init__(self, inner: LogitsProcessor, padding: torch.Tensor) -> None:
        """`padding [B, L]` bool: true where the prompt is padding."""
        self.inner = inner
        self._padding = padding

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        prompt = self._padding.shape[1]
        rows = []
        for ids, row, padding in zip(input_ids, scores, self._padding, strict=True):
            seen = torch.cat([ids[:prompt][~padding], ids[prompt:]])
            rows.append(self.inner(seen[None], row[None]))
        return cast(torch.FloatTensor, torch.cat(rows))


def processors(config: GenerationConfig, padding: torch.Tensor, extra: Any) -> LogitsProcessorList:
    """The logits processors of a call, in Hugging Face's order; empty for plain greedy decoding.

    Args:
        padding: `[B, L]` bool, true where the prompt is padding.
        extra: the caller's own; one of the same kind takes the place of an option's.
    """
    chain = LogitsProcessorList()
    ends = eos_ids(config)
    prompt, device = padding.shape[1], str(padding.device)
    if config.repetition_penalty not in (None, 1.0):
        chain.append(PerRow(RepetitionPenaltyLogitsProcessor(penalty=config.repetition_penalty), padding))
    if config.no_repeat_ngram_size:
        chain.append(PerRow(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size), padding))
    if config.min_length and ends:
        chain.append(MinLengthLogitsProcessor(config.min_length, ends, device=device))
    if config.min_new_tokens and ends:
        chain.append(MinNewTokensLengthLogitsProcessor(prompt, config.min_new_tokens, ends, device=device))
    warpers_from = len(chain)
    if config.do_sample:
        if config.temperature not in (None, 1.0):
            chain.append(TemperatureLogitsWarper(config.temperature))
        top_k = 50 if config.top_k is None else config.top_k  # Hugging Face's own default when sampling
        if top_k:
            chain.append(TopKLogitsWarper(top_k=top_k))
        if config.top_p is not None and config.top_p < 1.0:
            chain.append(TopPLogitsWarper(top_p=config.top_p))
        if config.min_p is not None:
            chain.append(MinPLogitsWarper(min_p=config.min_p))
    own = list(extra or ())
    kinds = {type(processor) for processor in own}
    fresh = [p for p in chain if type(p.inner if isinstance(p, PerRow) else p) not in kinds]
    at = sum(p in chain[:warpers_from] for p in fresh)
    return LogitsProcessorList([*fresh[:at], *own, *fresh[at:]])


def on_device(config: GenerationConfig, prompt: int, logits_processor: Any) -> Choice | None:
    """How a GPU chooses a call's tokens by itself; None if it cannot: the caller's own code is the host's.

    Args:
        prompt: (padded) tokens of the prompts.
        logits_processor: the caller's own.
    """
    if logits_processor or config.no_repeat_ngram_size or config.output_scores or config.output_logits:
        return None
    processors(
        config, torch.zeros(1, prompt, dtype=torch.bool, device="cpu"), None
    )  # Hugging Face's own check of the values
    return Choice(
        sample=bool(config.do_sample),
        temperature=1.0 if config.temperature is None else float(config.temperature),
        top_k=50 if config.top_k is None else int(config.top_k),
        top_p=1.0 if config.top_p is None else float(config.top_p),
        min_p=None if config.min_p is None else float(config.min_p),
        least=max(config.min_new_tokens or 0, (config.min_length or 0) - prompt),
        ends=frozenset(eos_ids(config)),
        pad=config.pad_token_id or 0,
        penalty=1.0 if config.repetition_penalty is None else float(config.repetition_penalty),
    )


def stopping(config: GenerationConfig, tokenizer: Any, extra: Any) -> StoppingCriteriaList:
    """What ends a row besides its length and end tokens: a stop string, or the caller's own criteria. Mostly nothing."""
    criteria = StoppingCriteriaList()
    if config.stop_strings is not None:
        if tokenizer is None:
            raise GlimpseError(
                "stop_strings: expected the tokenizer too (generate(..., tokenizer=...)), found none"
            )
        criteria.append(StopStringCriteria(stop_strings=config.stop_strings, tokenizer=tokenizer))
    if extra is not None:
        criteria.extend(extra)
    return criteria


def pick(scores: torch.Tensor, *, sample: bool) -> torch.Tensor:
    """`[B]` next tokens from `[B, vocabulary]` processed scores; of equal ones the first."""
    if sample:
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
    if scores.device.type == "cpu" and scores.dtype is torch.float32:
        # numpy's search is vectorised, torch's is not: for 150 000 words 0.01 ms instead of 0.1 ms.
        return torch.from_numpy(scores.detach().numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


class Tokens:
    """The growing sequences of a batch, in memory that was taken once.

    Attributes:
        length: tokens of each row so far.
    """

    def __init__(self, prompt: torch.Tensor, room: int) -> None:
        batch, self.length = prompt.shape
        self._buffer = prompt.new_empty(batch, self.length + room)
        self._buffer[:, : self.length] = prompt

    def append(self, tokens: torch.Tensor) -> None:
        """One more token `[B]` for every row."""
        self._buffer.select(1, self.length).copy_(tokens)
        self.length += 1

    def so_far(self) -> torch.Tensor:
        """`[B, length]`, contiguous, for whom it concerns: of several rows this is a copy."""
        return self._buffer[:, : self.length].contiguous()

    def result(self) -> torch.Tensor:
        """`[B, length]` in memory of its own."""
        return self._buffer[:, : self.length].clone(memory_format=torch.contiguous_format)
