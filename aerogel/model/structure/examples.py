"""Example calls: inputs made from signatures and configurations, good enough to watch a network run once."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.model.calls import Call
from aerogel.model.hooks import temporary_hooks
from aerogel.model.structure.image_text import with_images
from aerogel.model.structure.placeholders import placeholder_weights

ROWS, TOKENS = 2, 16
# A caption is projected before cross-attention reads it, so its own width comes first.
_TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "cross_attention_dim", "text_dim", "text_embed_dim", "context_in_dim")
_POOLED_WIDTHS = ("pooled_projection_dim", "text_embed_2_dim", "in_text_dim2", "text_emb_dim")


@dataclass(frozen=True)
class Example:
    """A call of a network, or of one of its parts, that runs."""

    part: str
    """Full name of the part; empty for the whole network."""
    call: Call


def examples_of(module: nn.Module) -> list[Example]:
    """Return calls that reach as much of a network as can be made up: of the whole, then of each model in it that did not run.

    A vision-language model gets a text first, so that what reads text is tried out on a few tokens, and then a text with an image.
    """
    found, ran = [], set[str]()
    for name, part in module.named_modules():
        if (name and not _is_model(part)) or name in ran or not any(p.ndim > 1 for p in part.parameters()):
            continue
        for candidates in (_candidates(part), _with_images(part)):
            call, reached = _working(part, candidates)
            if call is not None:
                found.append(Example(name, call))
                ran |= {f"{name}.{inner}".strip(".") for inner in reached}
    return found


def usable(module: nn.Module, call: Call) -> list[Example]:
    """Return a given call as an example where it runs without the weights; code that changes weights in place does not."""
    call = call.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)  # as what stands for the weights is
    with placeholder_weights(module):
        return [Example("", call)] if _takes(module, call) else []


def run(module: nn.Module, example: Example) -> Any:
    """Run an example; the caller sees to weights and gradients."""
    part = module.get_submodule(example.part)
    return part(*example.call.args, **example.call.kwargs)


def _is_model(part: nn.Module) -> bool:
    """Return True for a part that is a model by itself, such as the vision encoder of a larger one."""
    return hasattr(part, "main_input_name") or hasattr(part, "save_config")


def _working(part: nn.Module, candidates: Iterable[Call]) -> tuple[Call | None, set[str]]:
    """The first candidate that runs, with the names of the modules that ran; None where there is none."""
    ran: set[str] = set()
    handles = [inner.register_forward_pre_hook(lambda *_, name=name: ran.add(name)) for name, inner in part.named_modules()]
    with temporary_hooks(handles), placeholder_weights(part):
        for call in candidates:
            ran.clear()
            if _takes(part, call):
                return call, ran
    return None, ran


def _takes(part: nn.Module, call: Call) -> bool:
    try:
        part(*call.args, **call.kwargs)
    except Exception:  # noqa: BLE001  whatever the code of a model raises on inputs that it does not take
        return False
    return True


def _candidates(part: nn.Module) -> Iterator[Call]:
    taken = set(inspect.signature(part.forward).parameters)
    config = getattr(part, "config", None)
    if "input_ids" in taken:
        yield from _texts(taken, config)
    if taken & {"timestep", "timesteps", "t"}:
        yield from _denoising(part, config)
    else:
        yield from _images(taken, config)
        yield from _sounds(config)


def _with_images(part: nn.Module) -> Iterator[Call]:
    taken, config = set(inspect.signature(part.forward).parameters), getattr(part, "config", None)
    if "input_ids" in taken:
        yield from with_images(part, _images(taken, getattr(config, "vision_config", None) or config, rows=1))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _setting(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of these settings that a configuration has; of a pair its first value."""
    for name in names:
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if value is not None:
            return value[0] if isinstance(value, list | tuple) else value
    return default


def _texts(taken: set[str], config: Any) -> Iterator[Call]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = _setting(text, ("vocab_size", "n_words"), 32)
    generator = torch.Generator().manual_seed(0)
    # Ids from the middle of the vocabulary: special tokens stand at its ends.
    ids = torch.randint(vocabulary // 4, max(vocabulary // 2, vocabulary // 4 + 1), (ROWS, TOKENS), generator=generator)
    kwargs: dict[str, Any] = {"input_ids": ids}
    if "decoder_input_ids" in taken and _setting(config, ("is_encoder_decoder",), False):
        kwargs["decoder_input_ids"] = ids.flip(0)
    width = _setting(text, ("cross_attention_hidden_size", "d_model", "hidden_size"), None)
    if "encoder_hidden_states" in taken and width is not None:
        # Where there is cross-attention; a model without refuses it, or leaves it.
        yield Call((), {**kwargs, "use_cache": False, "encoder_hidden_states": _random(ROWS, TOKENS, width)})
    if {"use_cache", "kwargs"} & taken:
        yield Call((), {**kwargs, "use_cache": False})
    yield Call((), kwargs)
    yield Call((), {**kwargs, "attention_mask": torch.ones_like(ids)})


def _images(taken: set[str], config: Any, rows: int = ROWS) -> Iterator[Call]:
    """Images as the vision encoders of transformers take them: whole, in patches of a grid, in crops with a mask."""
    size, patch = _setting(config, ("image_size",), 32), _setting(config, ("patch_size", "spatial_patch_size"), 8)
    channels, frames = _setting(config, ("num_channels", "in_channels", "in_chans"), 3), _setting(config, ("temporal_patch_size",), 1)
    size = size if size <= 4 * patch or "grid_thw" not in taken else 4 * patch
    pixels, patches = _random(rows, channels, size, size), _random(rows, 16, channels * patch * patch)
    grid, packed = torch.tensor([[1, 4, 8]] * rows), _random(32 * rows, channels * patch * patch * frames)
    tiles, one_grid = _random(16 * rows, channels, patch, patch), torch.tensor([[1, 4, 4]] * rows)
    ones, positions = torch.ones(rows, 16, dtype=torch.long), torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(rows, -1, -1)
    yield Call((), {"pixel_values": pixels})
    yield Call((), {"pixel_values": pixels[:1], "image_sizes": torch.tensor([[size, size]])})
    for mask in ("attention_mask", "pixel_attention_mask"):
        yield Call((), {"pixel_values": patches, mask: ones, "spatial_shapes": torch.tensor([[4, 4]] * rows)})
    yield Call((packed, grid))
    for name in ("image_grid_thw", "grid_thw", "grid_thws"):
        yield Call((), {"pixel_values": packed, name: grid})
        yield Call((), {"pixel_values": tiles, name: one_grid})
    yield Call((tiles, one_grid))
    yield Call((), {"pixel_values": patches, "pixel_position_ids": positions})
    yield Call((), {"pixel_values": packed, "grid_thw": grid, "merge_sizes": torch.tensor([2] * rows)})
    yield Call((), {"pixel_values": pixels, "patch_attention_mask": torch.ones(rows, size // patch, size // patch, dtype=torch.bool)})
    tile = {"aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.tensor([[[1]]])}
    yield Call((), {"pixel_values": pixels[None, None, :1], **tile})


def _sounds(config: Any) -> Iterator[Call]:
    bins = _setting(config, ("num_mel_bins", "input_dim", "input_size", "feature_size"), 80)
    length = 2 * _setting(config, ("max_source_positions",), 64)
    for shape in ((ROWS, bins, length), (ROWS, length, bins)):
        features = _random(*shape)
        yield Call((), {"input_features": features})
        yield Call((), {"input_features": features, "attention_mask": torch.ones(ROWS, length, dtype=torch.long)})
    yield Call((), {"input_values": _random(ROWS, 4000)})


def _denoising(part: nn.Module, config: Any) -> Iterator[Call]:
    """Latents as images, clips and rows of tokens, with everything else that the signature asks for."""
    parameters = inspect.signature(part.forward).parameters
    first = next(iter(parameters))
    channels, size = _setting(config, ("in_channels", "in_visual_dim"), 4), min(_setting(config, ("sample_size",), 16), 32)
    shapes = [
        (ROWS, channels, size, size),
        (ROWS, 16, channels),
        (1, channels, 5, 16, 16),
        (1, 4, channels, 16, 16),
        (1, 2, 8, 8, channels),
    ]
    if "3D" in type(part).__name__ or hasattr(config, "num_frames"):
        shapes = shapes[2:] + shapes[:2]
    for shape in shapes:
        # With an image, Wan takes what stands before the last 512 tokens for those of the image.
        for tokens in (512,) if getattr(config, "image_dim", None) else (7, 512):
            others = {name: _conditioning(name, config, shape, tokens) for name in list(parameters)[1:]}
            for steps in (torch.tensor([500.0, 40.0])[: shape[0]], torch.tensor([0.9, 0.1])[: shape[0]]):
                given = {name: steps if value is STEPS else value for name, value in others.items() if value is not None}
                yield Call((), {first: _random(*shape), **given})


STEPS = object()
"""Mark of the argument that takes the time steps."""


def _conditioning(name: str, config: Any, shape: tuple[int, ...], tokens: int) -> Any:
    """An argument of a denoiser by its name; None for one that it does without."""
    rows, positions = shape[0], shape[1] if len(shape) == 3 else 16
    width, pooled = _setting(config, _TEXT_WIDTHS, 32), _setting(config, _POOLED_WIDTHS, 32)
    if name in ("timestep", "timesteps", "t"):
        return STEPS
    if name in ("img_ids", "txt_ids"):
        places = torch.zeros(positions if name == "img_ids" else tokens, len(getattr(config, "axes_dims_rope", (0, 0, 0))))
        return places + torch.arange(len(places))[:, None]
    if name in ("original_size", "target_size", "crop_coords"):
        return torch.full((rows, 2), 64.0)
    makers: dict[str, Any] = {
        "encoder_hidden_states": lambda: _random(rows, tokens, width),
        "encoder_attention_mask": lambda: torch.ones(rows, tokens, dtype=torch.bool),
        "encoder_hidden_states_image": lambda: _random(rows, 5, config.image_dim) if getattr(config, "image_dim", None) else None,
        "pooled_projections": lambda: _random(rows, pooled),
        "pooled_embeds": lambda: _random(rows, pooled),
        "guidance": lambda: torch.full((rows,), 3.5) if getattr(config, "guidance_embeds", None) else None,
        "class_labels": lambda: torch.zeros(rows, dtype=torch.long) if _has_classes(config) else None,
        "ofs": lambda: torch.full((1,), 2.0) if getattr(config, "ofs_embed_dim", None) else None,
        "added_cond_kwargs": lambda: _sizes_and_text(config, rows),
    }
    return makers[name]() if name in makers else None


def _has_classes(config: Any) -> bool:
    return any(getattr(config, key, None) is not None for key in ("num_class_embeds", "num_embeds_ada_norm", "class_embed_type"))


def _sizes_and_text(config: Any, rows: int) -> dict[str, Tensor] | None:
    """The pooled text and six sizes that Stable Diffusion XL adds to the time step."""
    if getattr(config, "addition_embed_type", None) != "text_time":
        return None
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {"text_embeds": _random(rows, width), "time_ids": torch.full((rows, 6), 64.0)}
