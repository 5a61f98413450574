# SPDX-License-Identifier: Apache-2.0
"""Text and pictures → the tensors a Qwen2.5-VL takes, under the names Hugging Face gives them.

`Processor` stands where ``AutoProcessor`` stands, without torchvision: tokenizer and chat template come from the
checkpoint's own files, pictures go through the ``patchify`` op, which also resizes, on the host or on a GPU.  Its outputs and
those of ``AutoProcessor`` are interchangeable.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, BatchFeature

from glimpse_runtime.images import flatten
from glimpse_runtime.loading import check_device
from glimpse_runtime.messages import is_nested, normal, pictures_of, prompts_of
from glimpse_runtime.pixels import pixel_values
from glimpse_runtime.processor_files import (
    ImageSettings,
    ProcessorError,
    load_chat_template,
    load_image_settings,
    resolve,
)

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"


class Processor:
    """Tokenizer, chat template and picture pipeline of one checkpoint.

    Attributes:
        tokenizer: the checkpoint's own tokenizer.
        image: the `ImageSettings` in force.
        chat_template: the Jinja template, or None where the checkpoint has none.
        device: where pictures are prepared, and ``pixel_values`` end up, where a call names no other.
    """

    def __init__(
        self,
        tokenizer: Any,
        image: ImageSettings,
        chat_template: str | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = check_device(device)
        self.tokenizer = tokenizer
        self.image = image
        self.chat_template = chat_template
        self.image_token = IMAGE_TOKEN
        self.image_token_id = self._id_of(IMAGE_TOKEN)
        self.video_token_id = self._id_of(VIDEO_TOKEN)
        if self.image_token_id is None:
            raise ProcessorError(f"the tokenizer has no image placeholder: expected a token {IMAGE_TOKEN!r}")

    def _id_of(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return None if found is None or found == self.tokenizer.unk_token_id else int(found)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        device: str | torch.device = "cpu",
    ) -> Processor:
        """The processor of a checkpoint.

        Args:
            folder: a checkpoint folder, or the name of one on the Hugging Face hub.
            min_pixels, max_pixels: override the checkpoint's bounds on a picture's area.
            device: prepare pictures there: the model's own, so that patches need not travel.

        Raises:
            ProcessorError: a file is missing or does not hold what it should.
            GlimpseError: torch cannot use the device.
        """
        root = resolve(folder)
        image = load_image_settings(root).with_bounds(min_pixels, max_pixels)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(root), local_files_only=True)
        except Exception as error:  # transformers raises many types here; all mean the same to the caller
            reason = str(error).strip().split("\n")[0]
            raise ProcessorError(f"no usable tokenizer in {str(root)!r}: {reason}") from error
        return cls(tokenizer, image, load_chat_template(root) or tokenizer.chat_template, device)

    def process_images(
        self,
        images: Any,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        device: str | torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures → patches.

        Args:
            images: a picture or any nesting of lists of them, see `glimpse_runtime.images`.
            device: where to prepare them; None: the processor's own.

        Returns:
            ``pixel_values [P, 3 * temporal * patch * patch]`` float32 on that device and ``image_grid_thw [images, 3]``
            int64 on the host (frames, rows and columns of patches).
        """
        settings = self.image.with_bounds(min_pixels, max_pixels)
        return pixel_values(images, settings, self.device if device is None else check_device(device))

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        *,
        videos: None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        add_special_tokens: bool = True,
        device: str | torch.device | None = None,
    ) -> BatchFeature:
        """Prompts and pictures → model inputs.

        Every ``<|image_pad|>`` of the text stands for one picture, in reading order, and is repeated once for each
        merged token of it.

        Args:
            text: one prompt or a list of them, with placeholders; usually from `apply_chat_template`.
            images: a picture, a list, or one list per prompt.
            padding, padding_side: as in Hugging Face's tokenizers.
            return_tensors: ``"pt"``, ``"np"`` or None for lists.
            device: of ``pixel_values`` (``"pt"`` only); None: the processor's own. All else is the host's, where the model
                reads it.

        Returns:
            BatchFeature with ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` ``[B, L]`` int64 (1 where a
            visual token stands) and, when there are pictures, ``pixel_values [P, 1176]`` float32 and
            ``image_grid_thw [images, 3]`` int64.

        Raises:
            ProcessorError: placeholders and pictures do not match in number.
            ImageError: a picture that cannot be used.
        """
        if videos is not None:
            raise ProcessorError("videos: not supported by this processor, pass the frames as images")
        if text is None and images is None:
            raise ProcessorError("text or images: at least one of them is needed")
        where = self.device if device is None else check_device(device)
        if return_tensors != "pt":
            if device is not None and where.type != "cpu":
                raise ProcessorError(
                    f'return_tensors: expected "pt" with device={where}, found {return_tensors!r}'
                )
            where = torch.device("cpu")  # arrays and lists are the host's
        prompts = None if text is None else prompts_of(text)
        data: dict[str, Any] = {}
        if images is not None and next(flatten(images), None) is not None:
            pixels, grid = self.process_images(
                images, min_pixels=min_pixels, max_pixels=max_pixels, device=where
            )
            data = {"pixel_values": pixels, "image_grid_thw": grid}
        if prompts is None:
            return BatchFeature(data, tensor_type=return_tensors)
        prompts = self._expand(prompts, data.get("image_grid_thw"), images)
        if padding and len(prompts) > 1 and self.tokenizer.pad_token is None:
            raise ProcessorError("padding: the tokenizer has no pad token, so prompts cannot be batched")
        tokens = self.tokenizer(
            prompts,
            padding=padding if self.tokenizer.pad_token is not None else False,
            padding_side=padding_side,
            add_special_tokens=add_special_tokens,
            return_token_type_ids=False,
        )
        kinds = {self.image_token_id: 1, self.video_token_id: 2}
        tokens["mm_token_type_ids"] = [[kinds.get(token, 0) for token in row] for row in tokens["input_ids"]]
        try:
            return BatchFeature({**tokens, **data}, tensor_type=return_tensors)
        except ValueError:
            raise ProcessorError(
                "padding: prompts of different length need padding=True to become one tensor"
            ) from None

    def _expand(self, prompts: list[str], grid: torch.Tensor | None, images: Any) -> list[str]:
        found = [prompt.count(self.image_token) for prompt in prompts]
        given = 0 if grid is None else len(grid)
        if isinstance(images, (list, tuple)) and len(images) == len(prompts) and is_nested(images):
            for row, (slots, own) in enumerate(zip(found, images, strict=True)):
                count = sum(1 for _ in flatten(own))
                if slots != count:
                    raise ProcessorError(
                        f"text[{row}]: expected one {self.image_token} for each of its {count} pictures, found {slots}"
                    )
        if sum(found) != given:
            raise ProcessorError(
                f"text: expected one {self.image_token} for each of the {given} pictures, found {sum(found)}"
                + ("" if sum(found) else " (build prompts with apply_chat_template, which places them)")
            )
        if grid is None:
            return prompts
        runs = iter((grid.prod(-1) // self.image.merge_size**2).tolist())
        expanded = []
        for prompt in prompts:
            pieces = prompt.split(self.image_token)
            expanded.append(
                pieces[0] + "".join(self.image_token * next(runs) + piece for piece in pieces[1:])
            )
        return expanded

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        return_dict: bool = True,
        chat_template: str | None = None,
        images: Any = None,
        **options: Any,
    ) -> Any:
        """Messages → prompt, and with ``tokenize=True`` → model inputs, pictures included.

        Args:
            conversation: messages ``{"role", "content"}``, or a list of such conversations. Content is a string or a
                list of ``{"type": "text", "text"}`` and ``{"type": "image", "image" | "path" | "url": picture}``.
            add_generation_prompt: end with the header of the assistant's turn (unlike Hugging Face, on by default:
                this package only ever generates).
            tokenize: False returns the prompt text (one string, or a list for a list of conversations).
            return_dict: with ``tokenize``, False returns ``input_ids`` alone.
            images: pictures for messages whose image entries carry none.
            options: passed to `__call__` when tokenizing, to the template otherwise.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise ProcessorError(
                "the checkpoint has no chat template (chat_template.jinja, chat_template.json or a chat_template in "
                "tokenizer_config.json): pass chat_template=, or a ready prompt to the processor"
            )
        if not conversation:
            raise ProcessorError("conversation: expected at least one message, found none")
        batched = isinstance(conversation[0], (list, tuple))
        conversations = [normal(messages) for messages in (conversation if batched else [conversation])]
        names = (
            "padding",
            "padding_side",
            "return_tensors",
            "min_pixels",
            "max_pixels",
            "add_special_tokens",
            "device",
        )
        call = {name: options.pop(name) for name in names if name in options}
        try:
            prompts = self.tokenizer.apply_chat_template(
                conversations,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **options,
            )
        except Exception as error:  # Jinja's own errors and the template's raise_exception
            raise ProcessorError(f"conversation: the chat template refused it: {error}") from error
        if not tokenize:
            return prompts if batched else prompts[0]
        pictures = [pictures_of(messages) for messages in conversations]
        given: Any = pictures if any(pictures) else None
        if images is not None:
            if given is not None:
                raise ProcessorError(
                    "images: the messages already carry pictures, pass them in one place only"
                )
            given = images
        features = self(prompts, given, **call)
        return features if return_dict else features["input_ids"]

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """Token ids ``[B, L]`` (or a list of lists) → texts."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **options)

    def decode(self, ids: Any, skip_special_tokens: bool = False, **options: Any) -> str:
        """Token ids ``[L]`` → text."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **options)
