"""Every policy that drops image tokens, on rows with no image, one and two: text alone is as it was, and images lose tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel import catalog
from aerogel.methods.tokens.policy import TokenPolicy
from aerogel.model.calls import Call
from tests.methods.matrix import made
from tests.tiny import IMAGE_TOKEN, VISION_START, opened

RULES = [name for name in catalog.names("methods") if issubclass(catalog.find("methods", name), TokenPolicy)]
PAIRS = [(name, rule) for name in ("llava", "qwen2_5_vl") for rule in RULES if name == "llava" or "patch_grid" not in made(rule).requires]
TEXT = 9


def batch(name: str) -> Call:
    """Three rows, padded on the left."""
    random = torch.Generator().manual_seed(0)
    places, pixels = (4, {"pixel_values": torch.randn(3, 3, 16, 16, generator=random)})
    if name == "qwen2_5_vl":
        places, pixels = (8, {"pixel_values": torch.randn(96, 96, generator=random), "image_grid_thw": torch.tensor([[1, 4, 8]] * 3)})
    rows = []
    for images in (0, 1, 2):
        words = torch.randint(3, 100, (TEXT,), generator=random).tolist()
        image = [VISION_START, *[IMAGE_TOKEN] * places, 99]
        rows.append([*words[:4], *image * images, *words[4:]])
    length = max(map(len, rows))
    ids_BN = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    given: dict[str, Any] = {"input_ids": ids_BN, "attention_mask": (ids_BN != 0).long(), **pixels}
    if name == "qwen2_5_vl":
        given["mm_token_type_ids"] = (ids_BN == IMAGE_TOKEN).long()
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


@pytest.mark.parametrize(("name", "rule"), [pair for pair in PAIRS if pair[0] == "qwen2_5_vl"])
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
