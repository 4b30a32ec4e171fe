"""Chats about images that differ in length: their statistics are those of every chat by itself, because no call has padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from aerogel.data import chats
from aerogel.data.chats import Chat
from aerogel.engine.calibration import reading
from aerogel.io.processors import Pair
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.statistics import InputStatistics, collect
from aerogel.model.walk import Walk
from tests.tiny import IMAGE_TOKEN, VISION_START, opened

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }} {% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<start> <image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}</s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
LINEARS = ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


def words() -> PreTrainedTokenizerFast:
    """A word for each number, and the tokens of images where the tiny models have them."""
    vocabulary = {f"w{number}": number for number in range(4, IMAGE_TOKEN)}
    vocabulary |= {"[UNK]": 0, "</s>": 1, "user": 2, "assistant": 3, "<image>": IMAGE_TOKEN, "<start>": VISION_START}
    inner: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken("<image>", special=True), AddedToken("<start>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE, padding_side="left"
    )


def of_llava() -> Any:
    image = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        image, words(), patch_size=8, chat_template=TEMPLATE, num_additional_image_tokens=1, vision_feature_select_strategy="default"
    )


def of_qwen() -> Any:
    image = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    return Pair(words(), image, "<image>")


PROCESSORS: dict[str, Callable[[], Any]] = {"llava": of_llava, "qwen2_5_vl": of_qwen}


def talks() -> list[Chat]:
    """Seven chats of three lengths, two without an image, with images of two sizes."""
    found = []
    for number in range(7):
        said = " ".join(f"w{10 + 5 * number + place}" for place in range(2 + 4 * (number % 3)))
        image = Image.new("RGB", (16, 16) if number < 5 else (32, 16), (40 * number, 80, 255 - 30 * number))
        shown = number % 4 != 3
        parts = [*([{"type": "image"}] if shown else []), {"type": "text", "text": said}]
        answer = {"role": "assistant", "content": f"w{90 + number}"}
        found.append(Chat([{"role": "user", "content": parts}, answer], (image,) if shown else ()))
    return found


def statistics(network: Network, calls: list[Call]) -> dict[str, InputStatistics]:
    """Those of some layers of both blocks of the language model."""
    found: dict[str, InputStatistics] = {}
    for block in Walk(network, calls):
        if isinstance(dict(block.module.named_modules()).get(LINEARS[0]), nn.Linear) and "language" in block.name:
            found |= {block.full_name(name): seen for name, seen in collect(block, LINEARS, moment=True, ranges=True).items()}
    return found


@pytest.mark.parametrize("family", sorted(PROCESSORS))
def test_statistics_of_a_batch_are_those_of_its_chats(family: str) -> None:
    network, processor = opened(family), PROCESSORS[family]()
    calls, alone = chats.calls(talks(), processor, batch=4), chats.calls(talks(), processor, batch=1)
    assert max(len(call.kwargs["input_ids"]) for call in calls) > 1
    assert len(calls) < len(alone) == 7
    assert reading(network, calls).tokens
    assert all(call.kwargs["attention_mask"].all() for call in calls)
    ours, expected = statistics(network, calls), statistics(network, alone)
    assert len(ours) == 2 * len(LINEARS)
    for name, seen in ours.items():
        assert seen.tokens == expected[name].tokens == sum(call.kwargs["input_ids"].numel() for call in alone)
        torch.testing.assert_close(seen.moment(), expected[name].moment(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.absmax(), expected[name].absmax())
        assert min(low for low, _ in seen.extremes) == pytest.approx(min(low for low, _ in expected[name].extremes))


@pytest.mark.parametrize("family", sorted(PROCESSORS))
def test_padding_would_change_them(family: str) -> None:
    """What the grouping is for: chats of two lengths in one call, padded as prompts are."""
    network, processor = opened(family), PROCESSORS[family]()
    shown = [chat for chat in talks() if chat.images and chat.images[0].size == (16, 16)][:3]
    (call,) = chats.calls(shown, processor, padded=True)
    assert not call.kwargs["attention_mask"].all()
    ours, expected = statistics(network, [call]), statistics(network, chats.calls(shown, processor))
    assert all(ours[name].tokens > expected[name].tokens for name in ours)
    assert any(not torch.allclose(seen.moment(), expected[name].moment(), rtol=1e-2) for name, seen in ours.items())
