"""Wan, the text-to-video and image-to-video denoiser of diffusers."""

from __future__ import annotations

from aerogel.model.family import CachedModule, Edge, Family

FAMILY = Family(
    name="wan",
    matches=("WanTransformer3DModel",),
    edges=(
        Edge("attn1.to_v", ("attn1.to_out.0",), heads=True),
        Edge("norm2", ("attn2.to_q",), when=(("cross_attn_norm", True),)),
        # Image-to-video adds a second value projection to what to_out reads.
        Edge("attn2.to_v", ("attn2.to_out.0",), heads=True, when=(("added_kv_proj_dim", None),)),
    ),
    cached_modules=(
        CachedModule("blocks.*.attn1", "self-attention", norms=("norm1",)),
        CachedModule("blocks.*.attn2", "cross-attention", norms=("norm2",)),
        CachedModule("blocks.*.ffn", "feed-forward", norms=("norm3",)),
    ),
    hidden_state_args=("hidden_states",),
    modality="video",
)
