# SPDX-License-Identifier: Apache-2.0
"""Base models: from Hugging Face files, or from a Hugging Face model that is already loaded."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig

from glimpse_kernels import quantize_int8
from glimpse_kernels.linear.torch_gemm import one_below_the_other
from glimpse_runtime.errors import CheckpointError, GlimpseError
from glimpse_runtime.hub import read_json, resolve_folder
from glimpse_runtime.models.qwen2_5_vl.config import ModelConfig
from glimpse_runtime.models.qwen2_5_vl.decoder import Decoder
from glimpse_runtime.models.qwen2_5_vl.vision import VisionTower
from glimpse_runtime.models.qwen2_5_vl.weights import WeightReader, read_decoder, read_vision
from glimpse_runtime.threads import respect_limits

DTYPES = (torch.float32, torch.bfloat16)
QUANTIZATIONS = (None, "int8")
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class BaseModel:
    """A loaded base: config, weights, and the generation defaults that came with it.

    quantization: how the decoder's matrices are kept: None (in the model's dtype) or "int8".
    """

    config: ModelConfig
    vision: VisionTower
    decoder: Decoder
    generation_config: GenerationConfig
    quantization: str | None = None


def load_base(
    name: str | Path, *, dtype: torch.dtype | str, device: torch.device, quantize: str | None = None
) -> BaseModel:
    """Read `config.json` and the safetensors files of a folder or hub id.

    Args:
        dtype: `torch.float32`, `torch.bfloat16`, or "auto" for the checkpoint's own.
        quantize: None, or "int8": the decoder's matrices in 8 bits (see `check_quantization`).

    Raises:
        CheckpointError: another model family, missing or left-over keys, or wrong shapes.
    """
    respect_limits(device)
    path = resolve_folder(name, "config.json", patterns=("*.safetensors", "*.json"))
    raw = read_json(path / "config.json")
    if raw.get("model_type") != "qwen2_5_vl":
        raise CheckpointError(f"{path}: expected model_type 'qwen2_5_vl', found {raw.get('model_type')!r}")
    hf_config = Qwen2_5_VLConfig.from_pretrained(path)
    config = ModelConfig.from_hf(hf_config)
    wanted = check_dtype(raw.get("dtype", raw.get("torch_dtype", "float32")) if dtype == "auto" else dtype)
    with ExitStack() as stack:
        files = {}
        for file in _weight_files(path):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: expected a safetensors file: {error}") from error
            files.update({key: opened for key in opened.keys()})

        def read(key: str) -> torch.Tensor:
            # A copy, or every tensor would keep the whole mapped file resident.
            return files[key].get_tensor(key).to(dtype=wanted, device=device, copy=True)

        return _build(WeightReader(files.keys(), read), config, _generation_config(path, hf_config), quantize)


def share_base(hf_model: Any, *, quantize: str | None = None) -> BaseModel:
    """Use the weights of a loaded `Qwen2_5_VLForConditionalGeneration`; nothing is held twice.

    On a CPU they stay where they are. On a GPU the matrices of a layer that have the same input (query, key and value; gate and
    up) are moved next to each other: the model's parameters are the same objects with the same values, in other memory.
    With `quantize` the decoder's matrices are copied to 8 bits, and the rest is shared where it is.

    Raises:
        CheckpointError: the model is of another family, lies on several devices, or has a dtype without kernels.
    """
    config = ModelConfig.from_hf(hf_model.config)
    parameters = dict(hf_model.named_parameters())
    places = {(p.device, p.dtype) for p in parameters.values()}
    if len(places) != 1:
        found = sorted(f"{device}/{dtype}" for device, dtype in places)
        raise CheckpointError(f"expected all weights on one device and of one dtype, found {found}")
    place, dtype = next(iter(places))
    check_dtype(dtype)
    respect_limits(place)
    if place.type == "cuda" and check_quantization(quantize) is None:
        _move_together(parameters)
    reader = WeightReader(parameters.keys(), lambda name: parameters[name].detach())
    return _build(reader, config, hf_model.generation_config, quantize)


def check_device(device: torch.device | str) -> torch.device:
    """`device` as a torch device that works here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise GlimpseError(
            f"device: expected one that torch can use here, found {str(device)!r} ({error})"
        ) from error


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """`dtype` as a torch dtype for which there are kernels."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise CheckpointError(f"dtype: expected one of {known} or 'auto', found {dtype!r}")
    return found


def check_quantization(quantize: object) -> str | None:
    """`quantize` as one of the ways to keep the decoder's matrices.

    "int8": symmetric 8-bit integers with one scale for 128 inputs of an output (`glimpse_kernels.quantize_int8`). Rows
    are still multiplied in the model's dtype, so it halves what a decoded token reads and leaves prefill as it was. The
    vision tower, the token embedding, norms and biases, and GlimpsePrune's modules stay as they are.
    """
    if quantize not in QUANTIZATIONS:
        known = ", ".join(repr(known) for known in QUANTIZATIONS)
        raise GlimpseError(f"quantize: expected one of {known}, found {quantize!r}")
    return quantize


def _build(
    reader: WeightReader, config: ModelConfig, generation_config: GenerationConfig, quantize: str | None
) -> BaseModel:
    chosen = check_quantization(quantize)
    vision = read_vision(reader, config)
    decoder = read_decoder(reader, config, quantize_int8) if chosen else read_decoder(reader, config)
    reader.finish()
    if chosen:
        _return_free_memory()
    return BaseModel(config, vision, decoder, generation_config, chosen)


@torch.inference_mode(False)
@torch.no_grad()
def _move_together(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Parameters with the same input one below the other, in one tensor each; one layer is held twice at a time."""
    for name in parameters:
        for group in _TOGETHER:
            names = [name.replace(f".{group[0]}.", f".{other}.") for other in group]
            found = [parameters[n] for n in names if n in parameters]
            if f".{group[0]}." not in name or len(found) < len(group):
                continue
            if one_below_the_other(found) is None:
                whole = torch.cat([p.data for p in found])
                for p, part in zip(found, whole.split([len(p) for p in found]), strict=True):
                    p.data = part


def _return_free_memory() -> None:
    """Give what the allocator kept of the plain matrices back to the system (glibc; elsewhere it stays)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: expected a 'weight_map', found {type(weight_map).__name__}")
        names = sorted(set(weight_map.values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path}: expected the weight files {names}, missing {missing}")
    return [path / name for name in names]


def _generation_config(path: Path, hf_config: Qwen2_5_VLConfig) -> GenerationConfig:
    if (path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(path)
    return GenerationConfig.from_model_config(hf_config)
