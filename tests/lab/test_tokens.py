# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: words whole, digits and capitals single, text unchanged by a round trip, files that load offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glimpse_lab.tokens import SPECIAL_TOKENS, build_tokenizer, save_processor_files
from glimpse_lab.world import COLOURS, SHAPES, ask, caption, make_scene


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_words_are_whole_and_characters_single(tokenizer: PreTrainedTokenizerFast) -> None:
    for word in (*COLOURS, *SHAPES):
        assert len(tokenizer.encode(word)) == 1
        assert len(tokenizer.encode(" " + word)) == 1
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("4821")) == list("4821")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("KQZW")) == list("KQZW")


def test_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["Grüße, 日本 🙂\n\tx", "a  b"]
    for seed in range(20):
        scene = make_scene(seed, 168, 224)
        texts += [t for q in (*ask(scene), caption(scene)) for t in (q.question, q.answer)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_saved_files_load_offline(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_processor_files(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the word?"}]}
    ]
    prompt = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is the word?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert loaded.eos_token == "<|im_end|>" and loaded.pad_token == "<|endoftext|>"
    assert all(len(loaded.encode(t)) == 1 for t in SPECIAL_TOKENS)
