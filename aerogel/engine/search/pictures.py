"""Images with the tokens of them that a policy leaves, for the report of a search."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from aerogel.data import chats
from aerogel.data.chats import Chat
from aerogel.engine.policies import CalibratedPolicy
from aerogel.errors import AerogelError
from aerogel.methods.tokens.policy import DroppingPolicy
from aerogel.model.network import Network
from aerogel.runtime.token_types import VISION, Vocabulary
from aerogel.runtime.tokens.grids import Grid, grids_of

MOST, SIDE = 6, 256
"""Images that are shown, and their longest side in pixels."""


def pictures(network: Network, policy: CalibratedPolicy, asked: Sequence[Chat]) -> list[dict[str, Any]]:
    """Return the first images of some chats, with the tokens that reach the last block; none of images that are no grid of tokens."""
    found: list[dict[str, Any]] = []
    for chat in (chat for chat in asked if chat.images):
        try:
            found += _of_chat(network, policy, chat)
        except AerogelError:  # tiles, whose grid is not the image's
            return []
        if len(found) >= MOST:
            break
    return found[:MOST]


def _of_chat(network: Network, policy: CalibratedPolicy, chat: Chat) -> list[dict[str, Any]]:
    method = policy.step.method
    assert isinstance(method, DroppingPolicy)
    (inputs,) = chats.prompts([chat], network.processor, 1, network.device)
    with method.acting(network, policy.state) as shortening, torch.no_grad():  # type: ignore[arg-type]
        network.module(**inputs)
    kind_BN = shortening.kind_BN
    assert kind_BN is not None
    vocabulary = Vocabulary.of(network)
    vision_BN = kind_BN == VISION
    separator_BN = (vocabulary.kinds(inputs) == VISION) & ~vision_BN
    left_N = torch.ones_like(vision_BN[0]) if shortening.left is None else torch.zeros_like(vision_BN[0])
    if shortening.left is not None:
        left_N[shortening.left.at_BK[0]] = True
    grids = list(grids_of(vision_BN & ~vocabulary.of_video(inputs["input_ids"]), inputs, separator_BN))
    if len(grids) != len(chat.images):
        raise AerogelError("images of this model are read as tiles")
    return [_picture(chat, image, grid, left_N) for image, grid in zip(chat.images, grids, strict=True)]


def _picture(chat: Chat, image: Image.Image, grid: Grid, left_N: torch.Tensor) -> dict[str, Any]:
    small, written = image.copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(written, "PNG")
    content = chat.messages[-2]["content"] if len(chat.messages) > 1 else ""
    question = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content).strip()
    return {
        "question": question[:200],
        "png": base64.b64encode(written.getvalue()).decode(),
        "rows": grid.height,
        "columns": grid.width,
        "kept": left_N[grid.place_P].nonzero()[:, 0].tolist(),
    }
