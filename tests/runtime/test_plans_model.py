# SPDX-License-Identifier: Apache-2.0
"""All named plans on the tiny model, and the scores that look at the prompt's text against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from glimpse_runtime import plans
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.plan import PrunePlan

from .conftest import IMAGE, for_hf, make_batch
from .slow_way import Drop, slow_way
from .test_pruned import assert_same_row

ROWS = [[5, (5, 4), 7], [9], [2, (1, 1), 3, (6, 2), 4], [1, (9, 7), 2]]
PUBLISHED = [name for name in plans.names() if name != "glimpse"]
SPARSE: dict[str, Any] = {"layers": (0.1, 0.3, 0.7), "fewer_heads": "all"}
"""The tiny model has six layers and four heads."""
ALL: dict[str, dict[str, Any]] = {
    "visionzip": {"dominant": 1.0},
    "divprune": {"ratio": 1.0, "repeat": False},
    "vscan": {"ratio": 1.0, "later": (1.0,)},
    "pyramiddrop": {"ratios": (1.0, 1.0, 1.0), "positions": "keep"},
    "sparsevlm": {"shares": (1.0, 1.0, 1.0), **SPARSE},
}


def named(name: str, **options: Any) -> PrunePlan:
    return plans.make(name, **{**(SPARSE if name == "sparsevlm" else {}), **options})


@pytest.mark.parametrize("name", PUBLISHED)
def test_row_of_a_batch_equals_row_alone(model, name):
    plan = named(name)
    batch, alone = make_batch(ROWS)
    together = model.prefill(**batch, plan=plan, max_new_tokens=4)
    singles = [model.prefill(**inputs, plan=plan, max_new_tokens=4) for inputs in alone]
    tokens, _ = together.decode(4)
    for row, single in enumerate(singles):
        assert_same_row(together, row, single, 6)
        assert tokens[row].tolist() == single.decode(4)[0][0].tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_everything_kept_is_nothing_pruned(model, name):
    batch, _ = make_batch(ROWS)
    wanted = model.prefill(**batch, plan=None, max_new_tokens=4)
    found = model.prefill(**batch, plan=named(name, **ALL.get(name, {"ratio": 1.0})), max_new_tokens=4)
    torch.testing.assert_close(found.last_logits, wanted.last_logits, atol=2e-5, rtol=0)
    assert found.decode(4)[0].tolist() == wanted.decode(4)[0].tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_budget_leaves_in_the_cache(model, name):
    """The share that `at_budget` promises, up to the tokens that rounding takes or gives."""
    height, width, layers = 20, 20, 6
    options = {"layers": (0.1, 0.3, 0.7), "fewer_heads": "all"} if name == "sparsevlm" else {}
    plan = plans.at_budget(name, 0.6, layers, **options)
    batch, _ = make_batch([[3, (height, width), 5]])
    result = model.prefill(**batch, plan=plan, max_new_tokens=1)
    text = batch["input_ids"].shape[1] - height * width
    left = [result.kv(0, layer)[0].shape[0] - text for layer in range(layers)]
    assert sum(left) / layers / (height * width) == pytest.approx(0.6, abs=2 / (height * width))


def text_side(hf_model, inputs):
    """Input embeddings, positions, and which rows are pictures."""
    core, ids = hf_model.model, inputs["input_ids"]
    seen = core.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    seen = torch.cat(list(seen)) if isinstance(seen, (tuple, list)) else seen
    hidden = core.language_model.embed_tokens(ids)
    hidden[ids == IMAGE] = seen
    positions, _ = core.get_rope_index(
        ids, for_hf(inputs)["mm_token_type_ids"], inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
    )  # fmt: skip
    return hidden, positions, ids[0] == IMAGE


ROW = [4, (5, 6), 3, (2, 2), 6]
SIZES = (30, 4)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("heads", [2, None])
def test_raters_of_the_model(model, hf_model, heads, corrected):
    """Raters from input embeddings, attention of layer 1 with the positions of Qwen2.5-VL; then the rest of the model."""
    (inputs,) = make_batch([ROW])[1]
    plan = plans.sparsevlm((0.3,), (1,), heads=heads, corrected=corrected)
    found = model.prefill(**inputs, plan=plan, max_new_tokens=1)
    text = hf_model.model.language_model
    with torch.inference_mode():
        hidden, positions, visual = text_side(hf_model, inputs)
        embedded, length = hidden[0], hidden.shape[1]
        rotary = text.rotary_emb(hidden, positions)
        causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
        out = text.layers[0](hidden, attention_mask=causal, position_embeddings=rotary, position_ids=None)
        x = text.layers[1].input_layernorm(out[0] if isinstance(out, tuple) else out)
        asking = text.layers[1].self_attn
        q, k = (
            project(x).view(1, length, -1, asking.head_dim).transpose(1, 2)
            for project in (asking.q_proj, asking.k_proj)
        )
        ones, _ = apply_rotary_pos_emb(torch.ones_like(q[:, :1]), k, *rotary)
        q, k = (heads[0] for heads in apply_rotary_pos_emb(q, k, *rotary))
        k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
        weights = (q @ k.transpose(1, 2) * asking.head_dim**-0.5 + causal[0]).softmax(-1)
        if corrected:
            weights = weights / (ones[0, 0] @ ones[0, 0].T * asking.head_dim**-0.5)
        scores = []
        for own in visual.nonzero()[:, 0].split(SIZES):
            words = [row for row in range(int(own[-1]) + 1, length) if not visual[row]]
            share = (embedded[own] @ embedded[words].T).softmax(-1).mean(0)
            raters = torch.tensor(words)[share > share.mean()]
            per_head = weights[:, raters][:, :, own].sum(1)
            used = per_head.sum(1).argsort(descending=True)[:heads]
            scores.append(per_head[used].mean(0) / len(raters))
    wanted = torch.cat(scores)
    assert (found.scores - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    keep = torch.cat([picture.keep.flatten() for picture in found.pruning])
    logits, _, _ = slow_way(hf_model, inputs, [Drop(2, keep)])
    torch.testing.assert_close(found.last_logits[0], logits, atol=2e-5, rtol=0)
    assert [int(part.sum()) for part in keep.split(SIZES)] == [9, 1]


def test_relevance_of_the_model(model, hf_model):
    """Cosines of merged tokens with the embeddings of all text of the prompt."""
    (inputs,) = make_batch([ROW])[1]
    found = model.prefill(**inputs, plan=plans.cdpruner(0.3), max_new_tokens=1)
    with torch.inference_mode():
        hidden, _, visual = text_side(hf_model, inputs)
        alike = torch.cosine_similarity(hidden[0][visual][:, None], hidden[0][~visual][None], dim=-1).mean(1)
    wanted = torch.cat([(own - own.min()) / (own.max() - own.min()) for own in alike.split(SIZES)])
    torch.testing.assert_close(found.scores, wanted, atol=1e-4, rtol=0)


def test_too_few_heads(model):
    (inputs,) = make_batch([ROW])[1]
    with pytest.raises(GlimpseError, match="heads: expected at most the 4 heads of the model, found 14"):
        model.prefill(**inputs, plan=plans.sparsevlm(layers=(0, 1, 2)), max_new_tokens=1)


def test_by_name(model):
    """`generate` takes a registered name, and a plan that raters and a cascade make."""
    batch, _ = make_batch(ROWS)
    plan = plans.cascade(plans.visionzip(), named("sparsevlm"))
    for given, same in (("fastv", plans.fastv()), ("vscan", plans.vscan()), (plan, plan)):
        first, second = (model.generate(**batch, plan=p, max_new_tokens=4) for p in (given, same))
        assert torch.equal(first, second)
