"""Types of the tokens of a forward: text, vision, special or padding.

B rows, S positions of a forward, L positions of the attention mask (the cache's among them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.model.network import Network

TEXT, VISION, SPECIAL, PADDING = range(4)
KINDS = ("text", "vision", "special", "padding")
MODALITIES = KINDS[:2]
_VIDEO_IDS = ("video_token_id", "video_token_index")
_VISION_IDS = ("image_token_id", "image_token_index", *_VIDEO_IDS)
_there: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of images and video, and ids of special tokens."""

    vision: tuple[int, ...]
    special: tuple[int, ...]
    video: tuple[int, ...] = ()
    """Those of `vision` that stand for a video, where the model has ids of their own for them."""

    @classmethod
    def of(cls, network: Network) -> Vocabulary:
        """As the configuration and the tokenizer, where there is one, say."""
        config = network.config
        configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
        vision, video = (
            {number for one in configs for key in names for number in _numbers(getattr(one, key, None))}
            for names in (_VISION_IDS, _VIDEO_IDS)
        )
        special = {number for one in configs for key in _SPECIAL_IDS for number in _numbers(getattr(one, key, None))}
        tokenizer = getattr(network.processor, "tokenizer", network.processor)
        special |= set(getattr(tokenizer, "all_special_ids", ()))
        special |= {number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        return cls(tuple(sorted(vision)), tuple(sorted(special - vision)), tuple(sorted(video)))

    def put_on(self, device: torch.device) -> None:
        """Copy what is looked up to a device, so that no forward has to: a compiled one would be traced twice."""
        for numbers in (self.special, self.vision):
            _on(numbers, device)

    def kinds(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return kind_BS of a forward's inputs; raises AerogelError when they have no token ids, which tell text from images."""
        ids_BS = inputs.get("input_ids")
        if ids_BS is None:
            raise AerogelError("a forward without input_ids: text cannot be told from images; pass input_ids instead of inputs_embeds")
        kind_BS = torch.full_like(ids_BS, TEXT)
        for numbers, kind in ((self.special, SPECIAL), (self.vision, VISION)):
            if numbers:
                kind_BS.masked_fill_(torch.isin(ids_BS, _on(numbers, ids_BS.device)), kind)
        read_BS = _read(inputs.get("attention_mask"), ids_BS.shape[1], inputs.get("past_key_values"))
        return kind_BS if read_BS is None else kind_BS.masked_fill_(~read_BS, PADDING)

    def of_video(self, ids_BS: Tensor) -> Tensor:
        """Return a mask of the tokens that stand for a video."""
        return torch.isin(ids_BS, _on(self.video, ids_BS.device)) if self.video else torch.zeros_like(ids_BS, dtype=torch.bool)


def require_vision(network: Network) -> None:
    """Raise AerogelError where no token stands for an image or a video."""
    if not Vocabulary.of(network).vision:
        raise AerogelError(f"this {network.family.name} model has no token that stands for an image; leave this step out")


def _read(mask: Any, positions: int, cache: Any) -> Tensor | None:
    """True where a position of the forward is no padding (B, S); None where the mask does not say.

    The mask is (B, L), or, as `generate` makes it for static caches, (B, 1, S, L), where the last position sees what is no padding.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return mask[:, -positions:] != 0
    if mask.ndim != 4 or positions == 1:
        return None
    before = 0 if cache is None else cache.get_seq_length()
    seen_BS = mask[:, 0, -1].index_select(1, torch.arange(positions, device=mask.device) + before)
    return seen_BS if seen_BS.dtype == torch.bool else seen_BS >= 0


def _on(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers on a device; copied once, since a copy for each forward would make the host wait."""
    if (numbers, device) not in _there:  # functools.cache is nothing that a compiler traces
        _there[numbers, device] = torch.tensor(numbers, device=device)
    return _there[numbers, device]


def _numbers(value: Any) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)
