"""Overrides of single types: what the small sizes get wrong, and layers that the defaults of a type do not show."""

from __future__ import annotations

from typing import Any

SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# The last two layers take the keys and values of the first two.
SHARED_KEYS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
PER_LAYER = {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 32}
GEMMA4 = SHARED_KEYS | PER_LAYER
DOTS = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32, "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
BLT = {"hidden_size_global": 64}
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4,
    "ple_layer_ids": [1], "ngram_vocab_size_base": 128, "heads_per_ngram": 4, "split_ngram_parts": 1, "hc_lowrank": 32,
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "axk2": {"gated_norm_rank": 32},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 512,
        "patcher_config": BLT, "encoder_config": BLT, "decoder_config": BLT, "global_config": BLT,
    },
    "cohere2_moe": {"first_k_dense_replace": 1},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, "sliding_attention": None},
        **SLIDING,
    },
    "cpmant": {"dim_ff": 96},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v4": {"o_groups": 2},
    "dots3_note": {"text_config": DOTS, "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64}, "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64}},
    "dots3_note_text": DOTS,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "laurel_rank": 32, "layer_types": ["sliding_attention", "full_attention"] * 3, "activation_sparsity_pattern": [0.5] + [0.0] * 5, "intermediate_size": 96, **PER_LAYER},
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 3, "num_hidden_layers": 3, "mamba_dt_rank": 32},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "kimi_linear": {"linear_head_dim": 32, "linear_num_heads": 4},
    "laguna": SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "falcon_mamba": {"time_step_rank": 32},
    "mamba": {"time_step_rank": 32},
    "mamba2": {"num_heads": 8, "hidden_size": 64, "head_dim": 16},
    "mellum": {"mlp_layer_types": ["dense", "sparse", "sparse"], **SLIDING},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse", "sparse"], "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 2},
    "moshi": {"ffn_dim": 128},
    "recurrent_gemma": {"intermediate_size": 128},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "phi4_multimodal": {"audio_config": {"ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64, "nemo_conv_channels": 32}},
    "reformer": {"axial_pos_shape": (4, 8), "axial_pos_embds_dim": (16, 48), "attn_layers": ["local", "lsh", "local"], "attention_head_size": 16, "feed_forward_size": 96, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 2},
    "roc_bert": {"shape_vocab_size": 256, "pronunciation_vocab_size": 256, "shape_embed_dim": 32, "pronunciation_embed_dim": 32},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1, "num_key_value_heads": 4, "attention_head_dim": 32, "attention_hidden_size": 128, "mamba_dt_rank": 32},
    "zaya": {"num_experts_per_tok": 1},
}
