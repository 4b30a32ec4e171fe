"""DiT, the class-conditional image denoiser of diffusers; its norms take their scale from the time step, so they absorb none."""

from __future__ import annotations

from aerogel.model.family import CachedModule, Family, TimePath

FAMILY = Family(
    name="dit",
    matches=("DiTTransformer2DModel",),
    time=TimePath(
        embedders=("transformer_blocks.*.norm1.emb.timestep_embedder",),
        projections=("transformer_blocks.*.norm1.linear", "proj_out_1"),
        others=(("num_embeds_ada_norm", "the class label"),),
    ),
    cached_modules=(
        CachedModule("transformer_blocks.*.attn1", "self-attention", norms=("norm1.norm",)),
        CachedModule("transformer_blocks.*.ff", "feed-forward", norms=("norm3",)),
    ),
    hidden_state_args=("hidden_states",),
    modality="image",
)
