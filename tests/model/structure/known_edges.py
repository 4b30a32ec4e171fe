"""Edges written by hand, family by family, as papers and code of quantization name them: what discovery is held against."""

from __future__ import annotations

from typing import Any, NamedTuple


class Known(NamedTuple):
    """An edge by names in a block; `*` stands for the same part in source and sinks, or for every part where only sinks have it."""

    source: str
    sinks: tuple[str, ...]
    heads: bool = False
    """A value head feeds several query heads."""
    tail: bool = False
    """The channels are the last rows of a fused layer."""
    when: tuple[tuple[str, Any], ...] = ()
    """Settings without which there is no such edge."""


KNOWN: dict[str, tuple[Known, ...]] = {
    "cogvideox": (Known("attn1.to_v", ("attn1.to_out.0",), heads=True),),
    "deepseek_v3": (
        Known("input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
        Known("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
        Known("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
        Known(
            "post_attention_layernorm",
            (
                "mlp.gate",
                "mlp.experts.*.gate_proj",
                "mlp.experts.*.up_proj",
                "mlp.shared_experts.gate_proj",
                "mlp.shared_experts.up_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
            ),
        ),
        Known("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
        Known("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
        Known("mlp.up_proj", ("mlp.down_proj",)),
    ),
    "dit": (Known("attn1.to_v", ("attn1.to_out.0",), heads=True),),
    "gemma2": (
        Known("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Known("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Known("mlp.up_proj", ("mlp.down_proj",)),
    ),
    "gemma3": (
        Known("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Known("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Known("mlp.up_proj", ("mlp.down_proj",)),
    ),
    "gpt_oss": (
        Known("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Known("post_attention_layernorm", ("mlp.router", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
    ),
    "internvl": (
        Known("layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
        Known("attention.v_proj", ("attention.projection_layer",), heads=True),
        Known("layernorm_after", ("mlp.fc1",)),
        Known("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Known(
            "post_attention_layernorm",
            ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.gate_proj", "mlp.up_proj"),
        ),
        Known("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
        Known("mlp.up_proj", ("mlp.down_proj",)),
    ),
    "llama": (
        Known("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Known("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Known("mlp.up_proj", ("mlp.down_proj",)),
    ),
    "llava": (
        Known("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.out_proj",), heads=True),
        Known("layer_norm2", ("mlp.fc1",)),
        Known("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Known("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Known("mlp.up_proj", ("mlp.down_proj",)),
    ),
    "mixtral": (
        Known("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Known("post_attention_layernorm", ("mlp.gate", "mlp.experts.*.w1", "mlp.experts.*.w3")),
        Known("mlp.experts.*.w3", ("mlp.experts.*.w2",)),
    ),
    "opt": (
        Known(
            "self_attn_layer_norm",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            when=(("do_layer_norm_before", True),),
        ),
        Known("self_attn.v_proj", ("self_attn.out_proj",), heads=True),
        Known("final_layer_norm", ("fc1",), when=(("do_layer_norm_before", True),)),
        Known("fc1", ("fc2",), when=(("activation_function", "relu"),)),
    ),
    "phi3": (
        Known("input_layernorm", ("self_attn.qkv_proj",)),
        Known("self_attn.qkv_proj", ("self_attn.o_proj",), heads=True, tail=True),
        Known("post_attention_layernorm", ("mlp.gate_up_proj",)),
        Known("mlp.gate_up_proj", ("mlp.down_proj",), tail=True),
    ),
    "pixart": (
        Known("attn1.to_v", ("attn1.to_out.0",), heads=True),
        Known("attn2.to_v", ("attn2.to_out.0",), heads=True),
    ),
    "qwen2_5_vl": (
        Known("norm1", ("attn.qkv",)),
        Known("attn.qkv", ("attn.proj",), heads=True, tail=True),
        Known("norm2", ("mlp.gate_proj", "mlp.up_proj")),
        Known("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Known("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Known("mlp.up_proj", ("mlp.down_proj",)),
    ),
    "qwen3": (
        Known("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Known("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Known("mlp.up_proj", ("mlp.down_proj",)),
    ),
    "qwen3_moe": (
        Known("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Known(
            "post_attention_layernorm",
            ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.gate_proj", "mlp.up_proj"),
        ),
        Known("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
        Known("mlp.up_proj", ("mlp.down_proj",)),
    ),
    "qwen3_vl_moe": (
        Known("norm1", ("attn.qkv",)),
        Known("attn.qkv", ("attn.proj",), heads=True, tail=True),
        Known("norm2", ("mlp.linear_fc1",)),
        Known("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Known("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Known(
            "post_attention_layernorm",
            ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.gate_proj", "mlp.up_proj"),
        ),
        Known("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
        Known("mlp.up_proj", ("mlp.down_proj",)),
    ),
    "sd3": (Known("attn2.to_v", ("attn2.to_out.0",), heads=True),),
    "unet": (
        Known("transformer_blocks.*.attn1.to_v", ("transformer_blocks.*.attn1.to_out.0",), heads=True),
        Known("transformer_blocks.*.attn2.to_v", ("transformer_blocks.*.attn2.to_out.0",), heads=True),
        Known("transformer_blocks.*.norm3", ("transformer_blocks.*.ff.net.0.proj",)),
        Known("to_v", ("to_out.0",), heads=True),
    ),
    "wan": (
        Known("attn1.to_v", ("attn1.to_out.0",), heads=True),
        Known("norm2", ("attn2.to_q",), when=(("cross_attn_norm", True),)),
        Known("attn2.to_v", ("attn2.to_out.0",), heads=True, when=(("added_kv_proj_dim", None),)),
    ),
}
