"""Flux: blocks with weights of their own for text and image, then blocks that run attention and MLP side by side on both as one."""

from __future__ import annotations

from aerogel.model.family import CachedModule, Family, TimePath

FAMILY = Family(
    name="flux",
    matches=("FluxTransformer2DModel",),
    time=TimePath(
        embedders=("time_text_embed.timestep_embedder",),
        projections=(
            "transformer_blocks.*.norm1.linear",
            "transformer_blocks.*.norm1_context.linear",
            "single_transformer_blocks.*.norm.linear",
            "norm_out.linear",
        ),
        others=(("pooled_projection_dim", "the pooled text"), ("guidance_embeds", "the guidance scale")),
    ),
    cached_modules=(
        CachedModule("transformer_blocks.*.attn", "self-attention", norms=("norm1.norm", "norm1_context.norm")),
        CachedModule("transformer_blocks.*.ff", "feed-forward", norms=("norm2",)),
        CachedModule("transformer_blocks.*.ff_context", "feed-forward", norms=("norm2_context",)),
        # What proj_out gives is all that such a block adds to the stream.
        CachedModule("single_transformer_blocks.*.proj_out", "block", norms=("norm.norm",), parts=("attn", "proj_mlp")),
    ),
    hidden_state_args=("encoder_hidden_states", "hidden_states"),
    modality="image",
)
