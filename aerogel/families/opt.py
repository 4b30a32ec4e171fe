"""OPT: LayerNorm, biases, learned positions, ReLU."""

from __future__ import annotations

from aerogel.model.family import Edge, Family, Residual

FAMILY = Family(
    name="opt",
    matches=("opt",),
    edges=(
        # Where norms come after the sum (OPT-350m), the residual stream reads them too.
        Edge(
            "self_attn_layer_norm",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            when=(("do_layer_norm_before", True),),
        ),
        Edge("self_attn.v_proj", ("self_attn.out_proj",), heads=True),
        Edge("final_layer_norm", ("fc1",), when=(("do_layer_norm_before", True),)),
        # ReLU lets a positive scale through; Galactica's GELU does not.
        Edge("fc1", ("fc2",), when=(("activation_function", "relu"),)),
    ),
    residual=Residual(
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        ("self_attn.out_proj", "fc2"),
        "model.decoder.final_layer_norm",
        "lm_head",
        when=(("do_layer_norm_before", True),),
    ),
)
