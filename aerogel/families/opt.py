"""OPT: LayerNorm, biases, learned positions, ReLU."""

from __future__ import annotations

from aerogel.model.family import Family, Residual

FAMILY = Family(
    name="opt",
    matches=("opt",),
    residual=Residual(
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        ("self_attn.out_proj", "fc2"),
        "model.decoder.final_layer_norm",
        "lm_head",
        when=(("do_layer_norm_before", True),),
    ),
)
