"""Random inputs of denoisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
TEXT, CHANNELS, HEADS, HEAD = 32, 8, 4, 16
WIDTH = HEADS * HEAD
SHAPE: Inputs = {"num_attention_heads": HEADS, "attention_head_dim": HEAD}


@dataclass(frozen=True)
class Draw:
    """Draws the inputs of one forward."""

    batch: int
    tokens: int
    """Tokens of the prompt."""
    generator: torch.Generator

    def noise(self, *shape: int) -> Tensor:
        """Return normal noise of a shape, the batch before it."""
        return torch.randn(self.batch, *shape, generator=self.generator)

    def pixels(self, side: int = 8, channels: int = CHANNELS) -> Tensor:
        return self.noise(channels, side, side)

    def clip(self, frames: int = 2, side: int = 8, channels: int = CHANNELS) -> Tensor:
        return self.noise(channels, frames, side, side)

    def patches(self, width: int = 32) -> Tensor:
        """Return a row of 4 x 4 patches."""
        return self.noise(16, width)

    def text(self, width: int = TEXT) -> Tensor:
        return self.noise(self.tokens, width)

    def mask(self, dtype: torch.dtype = torch.bool) -> Tensor:
        return torch.ones(self.batch, self.tokens, dtype=dtype)

    def steps(self) -> Tensor:
        """Return time steps out of a thousand."""
        return torch.tensor([500.0, 40.0])[: self.batch]

    def whole_steps(self) -> Tensor:
        return self.steps().long()

    def shares(self) -> Tensor:
        """Return time steps as shares of the way."""
        return torch.tensor([0.9, 0.1])[: self.batch]

    def full(self, value: float, *shape: int) -> Tensor:
        return torch.full((self.batch, *shape), value)

    def positions(self, axes: int = 3) -> dict[str, Tensor]:
        """Return the place of each patch of a row of 4 x 4 and of each token of text."""
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        places = torch.zeros(16, axes)
        places[:, 1], places[:, 2] = rows.flatten(), columns.flatten()
        return {"img_ids": places, "txt_ids": torch.zeros(self.tokens, axes)}

    def angles(self, places: int, width: int = HEAD) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of rotary positions."""
        turns = torch.outer(torch.arange(float(places)), 0.1 * torch.arange(1.0, width // 2 + 1)).repeat_interleave(2, dim=1)
        return turns.cos(), turns.sin()


@dataclass(frozen=True)
class Denoiser:
    """One denoiser: how its class is made small, and what one forward takes."""

    inputs: Callable[[Draw], Inputs]
    options: Inputs = field(default_factory=dict)
    class_name: str = ""
    """Class in diffusers; empty where it is the name in the table."""
    tokens: int = 0
    """Length of the prompt where it is fixed."""


def image(draw: Draw) -> Inputs:
    """Return an image, its time step out of a thousand, and a prompt."""
    return {"hidden_states": draw.pixels(), "timestep": draw.steps(), "encoder_hidden_states": draw.text()}


def video(draw: Draw) -> Inputs:
    """Return two frames, their time step out of a thousand, and a prompt."""
    return {"hidden_states": draw.clip(), "timestep": draw.steps(), "encoder_hidden_states": draw.text()}


def packed(draw: Draw) -> Inputs:
    """Return a row of patches, its time step as a share of the way, and a prompt."""
    return {"hidden_states": draw.patches(), "timestep": draw.shares(), "encoder_hidden_states": draw.text()}


def placed(draw: Draw) -> Inputs:
    """Return a row of patches with their places."""
    return packed(draw) | draw.positions()


def pooled(inputs: Inputs, draw: Draw) -> Inputs:
    """Add the vector of a whole prompt."""
    return inputs | {"pooled_projections": draw.noise(TEXT)}


def guided(inputs: Inputs, draw: Draw) -> Inputs:
    """Add the guidance scale as an input."""
    return inputs | {"guidance": draw.full(3.5)}


def masked(inputs: Inputs, draw: Draw, name: str = "encoder_attention_mask") -> Inputs:
    """Add the mask of the prompt."""
    return inputs | {name: draw.mask()}
