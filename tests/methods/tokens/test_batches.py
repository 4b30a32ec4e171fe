"""Every policy that drops image tokens, on rows with no image, one and two: text alone is as it was, and images lose tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from aerogel import catalog
from aerogel.methods.tokens.policy import TokenPolicy
from aerogel.methods.video_tokens.policy import ClipPolicy
from aerogel.model.calls import Call
from tests.methods.matrix import made
from tests.methods.tokens.staged import generated
from tests.tiny import IMAGE_TOKEN, TINY, VISION_START, opened
from tests.tiny_vision import TILED, padded

RULES = [name for name in catalog.names("methods") if issubclass(catalog.find("methods", name), TokenPolicy)]
SOME = ("divprune", "fastv", "visionzip")
"""Rules before the decoder, in it, and at the projector."""
TEXT = 9


def applies(name: str, rule: str) -> bool:
    """Clips are no tiles; what needs a grid of patches has one where tokens are patches, in windows of two of an even side."""
    if "patch_grid" in made(rule).requires:
        return name in ("llava", "llava_next") or (name, rule) == ("llava_onevision", "tome")
    return name not in TILED or not isinstance(made(rule), ClipPolicy)


PAIRS = [(name, rule) for name in ("llava", "qwen2_5_vl") for rule in RULES if applies(name, rule)] + [
    pytest.param(name, rule, marks=[] if rule in (*SOME, "tome", "sparsevlm") and name == "llava_next" else pytest.mark.slow)
    for name in ("llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "internvl")
    for rule in RULES
    if applies(name, rule)
]


def batch(name: str) -> Call:
    """Three rows, padded on the left."""
    random = torch.Generator().manual_seed(0)
    places, pixels = (4, 4, 4), {"pixel_values": torch.randn(3, 3, 16, 16, generator=random)}
    if name.startswith("qwen"):
        places, pixels = (8, 8, 8), {"pixel_values": torch.randn(96, 96, generator=random), "image_grid_thw": torch.tensor([[1, 4, 8]] * 3)}
    if tiles := TILED.get(name):
        places, sizes = (*tiles.tokens, tiles.tokens[0]), torch.tensor([*tiles.sizes, tiles.sizes[0]])
        pixels = {"pixel_values": torch.randn(3, 5, 3, tiles.side, tiles.side, generator=random), "image_sizes": sizes}
    rows = []
    for images in (places[:0], places[:1], places[1:]):
        words = torch.randint(3, 100, (TEXT,), generator=random).tolist()
        rows.append([*words[:4], *(token for place in images for token in (VISION_START, *[IMAGE_TOKEN] * place, 99)), *words[4:]])
    given: dict[str, Any] = {**padded(rows), **pixels}
    if name.startswith("qwen"):
        given["mm_token_type_ids"] = (given["input_ids"] == IMAGE_TOKEN).long()
    return Call((), given)


@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_rows_without_an_image_one_and_two(name: str, rule: str) -> None:
    network, call, policy = opened(name), batch(name), made(rule)
    state = policy.calibrate(network, [call])
    before = network.run(call).logits
    with policy.on(network, state):
        after = network.run(call).logits
    read_BN = call.kwargs["attention_mask"].bool()
    torch.testing.assert_close(after[0][read_BN[0]], before[0][read_BN[0]], rtol=0, atol=1e-5)
    gone_BN = after.isnan().any(-1)
    assert not (gone_BN & (call.kwargs["input_ids"] != IMAGE_TOKEN)).any()
    assert gone_BN[1].any()
    assert gone_BN[2].any()
    assert 0 < state.kept < 1


def alone(call: Call) -> list[Call]:
    """Each row of such a batch by itself, without padding."""
    rows = []
    for row, images in enumerate((slice(0, 0), slice(0, 1), slice(1, 3))):
        real_N = call.kwargs["attention_mask"][row].bool()
        given = {name: call.kwargs[name][row : row + 1, real_N] for name in call.kwargs if call.kwargs[name].shape[:2] == (3, len(real_N))}
        pixels = {name: value for name, value in call.kwargs.items() if name not in given}
        each = len(pixels["pixel_values"]) // 3
        cut = {"pixel_values": slice(each * images.start, each * images.stop)}
        rows.append(Call((), given | ({name: value[cut.get(name, images)] for name, value in pixels.items()} if row else {})))
    return rows


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(name, rule, marks=[] if name == "llava_next" and rule in (*SOME, "random_tokens", "sparsevlm") else pytest.mark.slow)
        for name in ("llava_next", "qwen2_5_vl")
        for rule in RULES
        if applies(name, rule)
    ],
)
def test_a_batch_costs_what_its_rows_cost_alone(name: str, rule: str) -> None:
    """Rows that keep fewer tokens than others are filled up and masked: calibration measures the same divergence, and the same share."""
    network, call, policy = opened(name), batch(name), made(rule)
    together, apart = (policy.calibrate(network, calls) for calls in ([call], alone(call)))
    assert together.answer_tokens == apart.answer_tokens
    assert together.kl == pytest.approx(apart.kl, abs=1e-5)
    assert together.kept == pytest.approx(apart.kept, abs=1e-9)
    assert together.kl > 1e-4


@pytest.mark.parametrize(("name", "rule"), [pair for pair in PAIRS if isinstance(pair, tuple) and pair[0] == "qwen2_5_vl"])
def test_generation_chooses_what_a_forward_chooses(name: str, rule: str) -> None:
    """`generate` of transformers runs the vision tower first, and does not hand on all arguments."""
    network, call, policy = opened(name), batch(name), made(rule)
    state = policy.calibrate(network, [call])
    with policy.on(network, state):
        logits = network.run(call).logits[:, -1]
        drawn = network.module.generate(
            **call.kwargs, max_new_tokens=2, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(drawn.logits[0], logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(name, rule, marks=[] if name == "llava_next" and rule in SOME else pytest.mark.slow)
        for name in ("llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl")
        for rule in RULES
        if applies(name, rule) and not isinstance(made(rule), ClipPolicy)
    ],
)
def test_a_full_budget_changes_no_bit(name: str, rule: str) -> None:
    """In a forward of padded rows and in generation."""
    network, call, policy = opened(name), TINY[name].calls(2)[1], made(rule)
    policy = replace(policy, **policy.strength(1.0))
    state = policy.calibrate(network, [call])
    before = network.run(call).logits, torch.stack(generated(network, call, 2, suppress_tokens=[IMAGE_TOKEN]).logits)
    with policy.on(network, state):
        after = network.run(call).logits, torch.stack(generated(network, call, 2, suppress_tokens=[IMAGE_TOKEN]).logits)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert state.kept == 1
