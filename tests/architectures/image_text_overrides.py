"""Overrides of single image-text types: what the small sizes get wrong, and layers that the defaults of a type do not show."""

from __future__ import annotations

from typing import Any

from tests.architectures.text_overrides import GEMMA4, INDEXER, OVERRIDES as TEXT

CODES = {f"IMGIMG{chr(ord('A') + code // 10)}{chr(ord('A') + code % 10)}Z": 100 + code for code in range(64)}
VQ = {"base_channels": 32, "channel_multiplier": (1, 1, 2, 2), "num_res_blocks": 1, "latent_channels": 32, "embed_dim": 32, "num_embeddings": 64}
FLORENCE = {"depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True), "embed_dim": (32, 64), "num_heads": (2, 4), "num_groups": (2, 4), "window_size": 4, "projection_dim": 64}
# The real vision tower is a model of timm; without timm a ViT of transformers stands in its place.
CLIP_FOR_TIMM = {"model_type": "clip_vision_model", "model_args": {"embed_dim": 64}}
CONVNEXT_FOR_TIMM = {"model_type": "convnext", "hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "hidden_size": 64}
TWO_TILES = {"image_grid_pinpoints": [[32, 64], [64, 32]]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "chameleon": {"vocabulary_map": {"<image>": 250, **CODES}, "vq_config": VQ},
    "cohere_compass": {"text_config": TEXT["cohere_compass_text"]},
    "cohere2_vision": {"alignment_intermediate_size": 128},
    "dots3_note": TEXT["dots3_note"],
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_key_value_heads": 4}, "vision_config": {"sam_config": {"downsample_channels": [64, 64]}}},
    "emu3": {"vocabulary_map": {"<image>": 250, "<|extra_200|>": 248, **{f"<|visual token {code:06d}|>": 100 + code for code in range(64)}}, "vq_config": {**VQ, "embed_dim": 4, "latent_channels": 4, "num_attention_heads": 1, "attn_resolutions": (3,)}},
    "evolla": {"aligner_num_add_layers": 1, "resampler_depth": 2, "resampler_dim_head": 16, "resampler_heads": 4, "resampler_num_latents": 8, "protein_encoder_config": {"is_decoder": False}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}, "moe_intermediate_size": [64, 32]}},
    "fast_vlm": {"vision_config": CONVNEXT_FOR_TIMM},
    "florence2": {"vision_config": FLORENCE},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {"text_config": GEMMA4},
    "gemma3n": {"vision_config": CONVNEXT_FOR_TIMM},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "index_topk": 8, "index_kpool": 4, "linear_head_dim": 16, "linear_num_heads": 4}},
    "granite4_vision": {"deepstack_layer_map": [(0, 0), (1, 1)], "downsample_rate": "1/2", "spatial_target_layers": [0], **TWO_TILES},
    "instructblip": {"num_query_tokens": 8},
    "instructblipvideo": {"num_query_tokens": 8},
    "janus": {"vq_config": VQ},
    "kosmos-2": {"latent_query_num": 8},
    "kosmos-2.5": {"latent_query_num": 8},
    "llama4": {"vision_config": {"intermediate_size": 256}},
    "llava_next": TWO_TILES,
    "llava_next_video": TWO_TILES,
    "llava_onevision": TWO_TILES,
    "minicpm_ocr": {"insert_layer_id": 1},
    "minicpmv4_6": {"insert_layer_id": 1},
    "minicpmv4_7": {"insert_layer_id": 1},
    "mllama": {"vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192, "num_global_layers": 1}, "text_config": {"cross_attention_layers": [1]}},
    "molmo2": {"image_patch_id": 250, "vision_config": {"image_size": [32, 32]}, "adapter_config": {"vision_feature_layer": [2, 1]}},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256, "audio_config": {"num_hidden_layers": 4, "hidden_sizes": (32, 32, 64, 64), "depths": (1, 1, 1, 1)}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}},
    "perception_lm": {"vision_config": CLIP_FOR_TIMM},
    "qwen4_exp": {"text_config": INDEXER},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [64, 64]}}},
    "vision-encoder-decoder": {"decoder": {"add_cross_attention": True}},
    "vipllava": {"vision_feature_layer": (-1, -2)},
}
