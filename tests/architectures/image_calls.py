"""Forwards of the image-text models that take images otherwise than in the places of image tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.architectures.audio import SOUNDS, with_audio
from tests.architectures.configs import IMAGE, TEXT_IDS, VIDEO
from tests.architectures.images import Arguments, Sizes, placeholder_arguments, sizes, squares, tiles

QUERIES = 8
"""Tokens that a resampler makes of one image (`num_query_tokens`, `latent_query_num`)."""
Inputs = Callable[[Sizes, Tensor], Arguments]


def _beside_text(s: Sizes, ids: Tensor) -> Arguments:
    return squares(s) | {"input_ids": ids}


def _text_only(s: Sizes, ids: Tensor) -> Arguments:
    return {"input_ids": ids}


def _image_to_text(s: Sizes, ids: Tensor) -> Arguments:
    return squares(s) | {"decoder_input_ids": ids}


def _masked_places(ids: Tensor) -> Tensor:
    mask = torch.zeros(ids.shape)
    mask[:, 2 : 2 + QUERIES] = 1
    return mask


def _kosmos2(s: Sizes, ids: Tensor) -> Arguments:
    return squares(s) | {"input_ids": ids, "image_embeds_position_mask": _masked_places(ids)}


def _flat_patches(s: Sizes) -> Tensor:
    """Return patches of 64 values, each after its row and column."""
    places = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), dim=-1).reshape(1, 16, 2)
    return torch.cat([places.expand(s.images, -1, -1), s.random(s.images, 16, 64)], dim=-1)


def _kosmos2_5(s: Sizes, ids: Tensor) -> Arguments:
    return {"flattened_patches": _flat_patches(s), "input_ids": ids, "image_embeds_position_mask": _masked_places(ids)}


def _pix2struct(s: Sizes, ids: Tensor) -> Arguments:
    return {"flattened_patches": _flat_patches(s), "decoder_input_ids": ids}


def _idefics(s: Sizes, ids: Tensor) -> Arguments:
    return tiles(s) | {"input_ids": ids, "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long)}


def _mllama(s: Sizes, ids: Tensor) -> Arguments:
    """Return one image of one tile, the other tiles padding."""
    mask = torch.tensor([1, 0, 0, 0])
    return {
        "input_ids": ids,
        "pixel_values": s.random(s.images, 1, 4, s.channels, s.side, s.side) * mask.view(1, 1, 4, 1, 1, 1),
        "aspect_ratio_ids": torch.ones(s.images, 1, dtype=torch.long),
        "aspect_ratio_mask": mask.expand(s.images, 1, 4).clone(),
        "cross_attention_mask": mask.expand(*ids.shape, 1, 4).clone(),
    }


def _with_queries(ids: Tensor, token: int, count: int) -> Tensor:
    return torch.cat([torch.full((ids.shape[0], count), token), ids], dim=1)


def _instructblip(s: Sizes, ids: Tensor) -> Arguments:
    return squares(s) | {"input_ids": _with_queries(ids, IMAGE, QUERIES), "qformer_input_ids": ids[:, :6]}


def _instructblipvideo(s: Sizes, ids: Tensor) -> Arguments:
    pixels = s.random(s.images, 4, s.channels, s.side, s.side)
    return {"pixel_values": pixels, "input_ids": _with_queries(ids, VIDEO, 4 * QUERIES), "qformer_input_ids": ids[:, :6]}


def _pi0(s: Sizes, ids: Tensor) -> Arguments:
    return tiles(s) | {
        "input_ids": ids,
        "pixel_attention_mask": torch.ones(s.images, 1, dtype=torch.bool),
        "state": s.random(s.images, 32),
        "noise": s.random(s.images, 8, 32),
        "timestep": torch.linspace(0.9, 0.2, s.images),
    }


def _udop(s: Sizes, ids: Tensor) -> Arguments:
    corners = torch.rand(*ids.shape, 2, generator=s.generator) / 2
    boxes = torch.cat([corners, corners + 0.3], dim=-1)
    return squares(s) | {"input_ids": ids, "bbox": boxes, "decoder_input_ids": ids[:, :7]}


def _evolla(s: Sizes, ids: Tensor) -> Arguments:
    ones = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": ones, "protein_input_ids": ids % 20 + 4, "protein_attention_mask": ones}


DIRECT: dict[str, Inputs] = {
    "blip": _beside_text,
    "evolla": _evolla,
    "git": _beside_text,
    "idefics": _idefics,
    "instructblip": _instructblip,
    "instructblipvideo": _instructblipvideo,
    "kosmos-2": _kosmos2,
    "kosmos-2.5": _kosmos2_5,
    "mistral4": _text_only,
    "mllama": _mllama,
    "pi0": _pi0,
    "pix2struct": _pix2struct,
    "pp_formulanet": _image_to_text,
    "udop": _udop,
    "vision-encoder-decoder": _image_to_text,
}
"""Types whose forward is not text around image tokens."""

DECODED = ("florence2", "t5gemma2", "diffusion_gemma")
"""Types whose forward also takes `decoder_input_ids`."""


def arguments(module: nn.Module, model_type: str, batch: int, length: int, generator: torch.Generator) -> Arguments:
    """Return the keyword arguments of one forward with an image in every row, and with audio where a type has a tower for it."""
    if model_type in DIRECT:
        ids = torch.randint(*TEXT_IDS, (batch, length), generator=generator)
        return DIRECT[model_type](sizes(module, batch, generator), ids)
    found = placeholder_arguments(module, model_type, batch, length, generator)
    if model_type in SOUNDS:
        found = with_audio(module, model_type, found, generator)
    if model_type in DECODED:
        found["decoder_input_ids"] = torch.randint(*TEXT_IDS, (batch, length // 2), generator=generator)
    return found
