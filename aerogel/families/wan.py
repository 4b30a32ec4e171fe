"""Wan, the text-to-video and image-to-video denoiser of diffusers."""

from __future__ import annotations

from aerogel.model.family import CachedModule, Family

FAMILY = Family(
    name="wan",
    matches=("WanTransformer3DModel",),
    cached_modules=(
        CachedModule("blocks.*.attn1", "self-attention", norms=("norm1",)),
        CachedModule("blocks.*.attn2", "cross-attention", norms=("norm2",)),
        CachedModule("blocks.*.ffn", "feed-forward", norms=("norm3",)),
    ),
    hidden_state_args=("hidden_states",),
    modality="video",
)
