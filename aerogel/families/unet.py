"""The UNets of diffusers, with and without text: Stable Diffusion 1 to XL, latent and pixel models."""

from __future__ import annotations

from aerogel.model.family import CachedModule, Family, Skips, TimePath

FAMILY = Family(
    name="unet",
    matches=("UNet2DModel", "UNet2DConditionModel"),
    time=TimePath(
        embedders=("time_embedding",),
        projections=(
            "down_blocks.*.resnets.*.time_emb_proj",
            "mid_block.resnets.*.time_emb_proj",
            "up_blocks.*.resnets.*.time_emb_proj",
            "down_blocks.*.downsamplers.*.time_emb_proj",
            "up_blocks.*.upsamplers.*.time_emb_proj",
        ),
        others=(
            ("class_embed_type", "the class label"),
            ("num_class_embeds", "the class label"),
            ("addition_embed_type", "the pooled text and the sizes"),
            ("time_cond_proj_dim", "the guidance scale"),
        ),
    ),
    skips=Skips(
        given=("down_blocks.*.resnets.*", "down_blocks.*.downsamplers.*", "mid_block.resnets.0"),
        read=("up_blocks.*.resnets.*",),
    ),
    pattern_sets=(
        ("ends", ("conv_in", "conv_out")),
        (
            # What the code of TFMQ-DM (arXiv:2311.16503) leaves unquantized, weights and inputs: by name, never by position.
            "released_tfmq",
            (
                *("conv_in", "conv_out", "time_embedding.linear_1", "*.conv_shortcut", "*.downsamplers.*.conv"),
                r"re:(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\.to_",  # one-dimensional convolutions there
            ),
        ),
        ("released_tfmq_inputs", ("time_embedding.linear_2", "down_blocks.0.resnets.0.conv1")),
    ),
    cached_modules=tuple(
        unit
        for place in ("down_blocks.*", "mid_block", "up_blocks.*")
        for unit in (
            CachedModule(f"{place}.attentions.*.transformer_blocks.*.attn1", "self-attention", norms=("norm1",)),
            CachedModule(f"{place}.attentions.*.transformer_blocks.*.attn2", "cross-attention", norms=("norm2",)),
            CachedModule(f"{place}.attentions.*.transformer_blocks.*.ff", "feed-forward", norms=("norm3",)),
        )
    ),
    modality="image",
)
