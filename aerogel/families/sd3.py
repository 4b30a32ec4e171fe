"""Stable Diffusion 3 and 3.5: text and image attend to each other in every block, each with weights of its own."""

from __future__ import annotations

from aerogel.model.family import CachedModule, Family, TimePath

FAMILY = Family(
    name="sd3",
    matches=("SD3Transformer2DModel",),
    time=TimePath(
        embedders=("time_text_embed.timestep_embedder",),
        projections=("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear", "norm_out.linear"),
        others=(("pooled_projection_dim", "the pooled text"),),
    ),
    cached_modules=(
        CachedModule("transformer_blocks.*.attn", "self-attention", norms=("norm1.norm", "norm1_context.norm")),
        CachedModule("transformer_blocks.*.attn2", "self-attention", norms=("norm1.norm",)),
        CachedModule("transformer_blocks.*.ff", "feed-forward", norms=("norm2",)),
        CachedModule("transformer_blocks.*.ff_context", "feed-forward", norms=("norm2_context",)),
    ),
    hidden_state_args=("encoder_hidden_states", "hidden_states"),
    modality="image",
)
