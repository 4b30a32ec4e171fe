"""CogVideoX, the text-to-video and image-to-video denoiser of diffusers; text and video share all weights but their modulation."""

from __future__ import annotations

from aerogel.model.family import CachedModule, Family, TimePath

FAMILY = Family(
    name="cogvideox",
    matches=("CogVideoXTransformer3DModel",),
    time=TimePath(
        embedders=("time_embedding",),
        projections=("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm2.linear", "norm_out.linear"),
        others=(("ofs_embed_dim", "the offset (ofs)"),),
    ),
    cached_modules=(
        CachedModule("transformer_blocks.*.attn1", "self-attention", norms=("norm1.norm",)),
        CachedModule("transformer_blocks.*.ff", "feed-forward", norms=("norm2.norm",)),
    ),
    hidden_state_args=("hidden_states", "encoder_hidden_states"),
    modality="video",
)
