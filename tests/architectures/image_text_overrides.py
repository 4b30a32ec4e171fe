"""Overrides."""
from tests.architectures.text_overrides import GEMMA4, INDEXER
from typing import Any
VQ = {"base_channels": 32, "channel_multiplier": (1, 2), "num_res_blocks": 1, "latent_channels": 32, "embed_dim": 32, "num_embeddings": 64}
FLORENCE = {"depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True), "embed_dim": (32, 64), "num_heads": (2, 4), "num_groups": (2, 4), "window_size": 4, "projection_dim": 64}
CLIP_FOR_TIMM = {"model_type": "clip_vision_model", "model_args": {"embed_dim": 64}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 250}|{f"IMGIMG{chr(65+i)}Z": 100+i for i in range(26)}, "vq_config": VQ},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, "sliding_attention": None}, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}},
    "cohere2_vision": {"alignment_intermediate_size": 128},
    "emu3": {"vocabulary_map": {"<image>": 250}, "vq_config": {**VQ, "embed_dim": 4, "latent_channels": 4, "num_attention_heads": 1, "attn_resolutions": (3,)}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [64, 32]}},
    "fast_vlm": {"vision_config": {"model_type": "convnext", "hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}},
    "florence2": {"vision_config": FLORENCE},
    "gemma4": {"text_config": GEMMA4},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "index_topk": 8, "index_kpool": 4}},
    "granite4_vision": {"deepstack_layer_map": [(0, 0), (1, 1)]},
    "inkling2": {},
    "janus": {"vq_config": VQ},
    "molmo2": {"vision_config": {"image_size": [32, 32]}, "adapter_config": {"vision_feature_layer": [2, 1]}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": (32, 32, 64, 64), "depths": (1, 1, 1, 1)}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "perception_lm": {"vision_config": CLIP_FOR_TIMM},
    "qwen4_exp": {"text_config": INDEXER},
}
