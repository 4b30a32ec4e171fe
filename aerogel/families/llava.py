"""LLaVA: a CLIP vision encoder and a Llama-like language model."""

from __future__ import annotations

from aerogel.model.family import Edge, Family, Tower

FAMILY = Family(
    name="llava",
    matches=("llava",),
    towers=(
        Tower("model.vision_tower", "model.vision_tower.encoder.layers.*"),
        Tower("model.language_model", "model.language_model.layers.*"),
    ),
    edges=(
        Edge("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Edge("self_attn.v_proj", ("self_attn.out_proj",), heads=True),
        Edge("layer_norm2", ("mlp.fc1",)),
        Edge("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Edge("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Edge("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Edge("mlp.up_proj", ("mlp.down_proj",)),
    ),
    modality="image-text",
    renames=(
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.", "vision_tower."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ),
)
