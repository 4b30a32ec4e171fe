"""PixArt, the text-to-image transformer of diffusers; one modulation of the time step is shared by all blocks."""

from __future__ import annotations

from aerogel.model.family import CachedModule, Family, TimePath

FAMILY = Family(
    name="pixart",
    matches=("PixArtTransformer2DModel",),
    time=TimePath(
        embedders=("adaln_single.emb.timestep_embedder",),
        projections=("adaln_single.linear",),
        others=(("use_additional_conditions", "the sizes of the image"),),
    ),
    cached_modules=(
        CachedModule("transformer_blocks.*.attn1", "self-attention", norms=("norm1",)),
        CachedModule("transformer_blocks.*.attn2", "cross-attention"),
        CachedModule("transformer_blocks.*.ff", "feed-forward", norms=("norm2",)),
    ),
    hidden_state_args=("hidden_states",),
    modality="image",
)
