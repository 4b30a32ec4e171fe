"""Clips for tiny networks, made by hand: prompts with video tokens, and the patches behind them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aerogel.methods.tokens.policy import ClipPolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.video_tokens import Reduced
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.images import image_path_of
from aerogel.runtime.tokens.vision_tower import TowerPass, VisionTower
from tests.methods.tokens.staged import generated, seen
from tests.tiny import opened

VIDEO_TOKEN = 122


def clip_call(frames: int = 4, height: int = 4, width: int = 8, *, image: bool = False, times: bool = False, seed: int = 0) -> Call:
    """Two prompts for a network of a Qwen-VL family, a clip in each: that of the second has two frames more, and padding lines them up.

    A token is 2 x 2 patches. With `image`, a still image of eight tokens stands before each clip; with `times`, a token of text before each
    frame, as in Qwen3-VL.
    """
    random = torch.Generator().manual_seed(seed)
    grid_N3 = torch.tensor([[frames, height, width], [frames + 2, height, width]])
    rows = []
    for count in (frames, frames + 2):
        words = torch.randint(3, 112, (20 + count,), generator=random).tolist()
        frame = [VIDEO_TOKEN] * (height * width // 4)
        clip = [token for word in words[:count] for token in (word, 121, *frame)] if times else [121, *frame * count]
        rows.append([*words[-2:], *([121, *[120] * 8, words[-3]] if image else []), *clip, *words[-15:-3]])
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    given = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "use_cache": False,
        "pixel_values_videos": torch.randn(int(grid_N3.prod(1).sum()), 96, generator=random),
        "video_grid_thw": grid_N3,
        "mm_token_type_ids": (ids == 120).int() + 2 * (ids == VIDEO_TOKEN).int(),
    }
    if image:
        given |= {"pixel_values": torch.randn(64, 96, generator=random), "image_grid_thw": torch.tensor([[1, 4, 8]] * 2)}
    return Call((), given)


def with_another_question(call: Call) -> Call:
    """The same clips with other text."""
    ids = call.kwargs["input_ids"]
    text = (ids > 2) & (ids < 112)
    return Call((), {**call.kwargs, "input_ids": torch.where(text, 3 + (ids + 11) % 100, ids)})


def attention_in_tower(network: Network, call: Call) -> list[Tensor]:
    """What the tokens of both clips receive in the vision tower."""
    passes: list[TowerPass] = []
    path = image_path_of(network, call)
    with VisionTower.of(network, decoder_of(network), path.attention, path.class_token).watching(network, passes.append):
        network.run(call)
    image, clips = passes
    assert torch.equal(image.grid_N3, call.kwargs["image_grid_thw"])  # type: ignore[arg-type]
    return [part.view(-1, 8) for part in clips.received_by_tokens(80).split([32, 48])]


def require_rule(
    method: ClipPolicy,
    whole: ClipPolicy,
    counts: tuple[int, int],
    expected: Callable[[Tensor, Tensor], Reduced],
    name: str = "qwen2_5_vl",
) -> None:
    """Raise AssertionError unless a method does to clips of a network what a function does to their features, and nothing else.

    `whole` is the method at its full budget; `counts` are the tokens that stay of each clip; `expected` gets the features of a clip and the
    attention in the vision tower. Text and images stay as they are, the choice does not see the question, and five tokens are generated.
    """
    network, call = opened(name), clip_call(image=True, times=name == "qwen3_vl_moe")
    attention = attention_in_tower(network, call)
    stage, selection = seen(network, call, method)[0]
    assert selection is not None
    assert selection.hidden_BKC is not None
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        clip_N = ids_N == VIDEO_TOKEN
        x_FPC = stage.hidden_BKC[row, clip_N].view(4 + 2 * row, 8, -1)
        reduced = expected(x_FPC, attention[row])
        assert selection.keep_BK[row, clip_N].tolist() == reduced.keep_FP.flatten().tolist()
        assert int(reduced.keep_FP.sum()) == counts[row]
        assert torch.equal(selection.hidden_BKC[row, clip_N][reduced.keep_FP.flatten()], reduced.x_FPC[reduced.keep_FP])
        assert selection.keep_BK[row, ~clip_N].all()
        assert torch.equal(selection.hidden_BKC[row, ~clip_N], stage.hidden_BKC[row, ~clip_N])
    assert torch.equal(seen(network, with_another_question(call), method)[0][1].keep_BK, selection.keep_BK)  # type: ignore[union-attr]
    dense = generated(network, call)
    for policy, equal in ((whole, True), (method, False)):
        with policy.on(network, policy.calibrate(network, [call])):
            made = generated(network, call)
        assert torch.equal(torch.stack(made.logits), torch.stack(dense.logits)) == equal
    assert made.past_key_values.layers[0].keys.shape[2] == int(selection.keep_BK.sum(1).max()) + 4
