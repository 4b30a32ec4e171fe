"""PixArt, the text-to-image transformer of diffusers; one modulation of the time step is shared by all blocks."""

from __future__ import annotations

from aerogel.model.family import Edge, Family, TimePath, Tower, Unit

FAMILY = Family(
    name="pixart",
    matches=("PixArtTransformer2DModel",),
    towers=(Tower("", "transformer_blocks.*"),),
    edges=(
        Edge("attn1.to_v", ("attn1.to_out.0",), heads=True),
        Edge("attn2.to_v", ("attn2.to_out.0",), heads=True),
    ),
    time=TimePath(
        embedders=("adaln_single.emb.timestep_embedder",),
        projections=("adaln_single.linear",),
        others=(("use_additional_conditions", "the sizes of the image"),),
    ),
    units=(
        Unit("transformer_blocks.*.attn1", "self-attention", norms=("norm1",)),
        Unit("transformer_blocks.*.attn2", "cross-attention"),
        Unit("transformer_blocks.*.ff", "feed-forward", norms=("norm2",)),
    ),
    hidden_state_args=("hidden_states",),
    modality="image",
)
