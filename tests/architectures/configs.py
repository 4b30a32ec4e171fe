"""Small configurations of transformers: every size that a config class has is set to one small value."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from tests.architectures.overrides import OVERRIDES

HIDDEN, INNER, HEADS, HEAD, LAYERS, VOCABULARY = 64, 96, 4, 16, 3, 256
TEXT_IDS = (5, 200)
"""Ids that stand for text in every tiny model; special tokens are outside."""
IMAGE, VIDEO, AUDIO, VISION_START, VISION_END = 250, 251, 252, 253, 254

_SIZES: dict[int, str] = {
    HIDDEN: """hidden_size d_model n_embd dim emb_dim embed_dim embedding_size hidden_dim word_embed_proj_dim encoder_hidden_size
        vision_hidden_size projection_dim attention_hidden_size out_hidden_size lm_hidden_size output_hidden_size output_dim
        text_hidden_size projector_hidden_size projection_hidden_size backbone_hidden_size decoder_hidden_size output_proj_dims
        adapter_in_dim adapter_out_dim adapter_input_size projector_input_dim projector_output_dim mm_embed_dim audio_embed_dim
        moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size share_expert_dim input_embedding_size output_embedding_size
        vision_output_dim patch_embed_hidden_size image_token_embed_dim downsample_hidden_size
        max_seq_len seq_len max_num_patches codebook_size""",
    INNER: """intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim mlp_dim d_inner dff d_ff dim_ff
        dense_intermediate_size intermediate_size_mlp prefix_dense_intermediate_size""",
    LAYERS: """num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers""",
    2: """encoder_layers num_encoder_layers depth num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok moe_topk moe_k
        top_k_experts num_experts_per_token linear_num_key_heads mamba_expand eos_token_id index_n_heads""",
    HEADS: """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_d_conv""",
    HEAD: """head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state mamba_d_head
        mamba_head_dim state_size ssm_state_size global_head_dim attention_head_dim num_position_embeddings image_seq_length
        num_image_tokens attention_chunk_size window_size num_mel_bins""",
    8: """mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size rotary_dim patch_size index_topk sliding_window sliding_window_size
        attention_window_size""",
    32: """max_source_positions q_lora_rank kv_lora_rank o_lora_rank index_head_dim image_size rel_extent num_centroids""",
    128: """max_position_embeddings n_positions""",
    1: """n_group topk_group n_groups mamba_n_groups n_shared_experts first_k_dense_replace bos_token_id decoder_start_token_id""",
    0: "pad_token_id",
    VOCABULARY: "vocab_size src_vocab_size tgt_vocab_size audio_vocab_size unpadded_vocab_size",
    IMAGE: "image_token_id image_token_index im_patch_id",
    VIDEO: "video_token_id video_token_index",
    AUDIO: "audio_token_id audio_token_index",
    VISION_START: "vision_start_token_id boi_token_id boi_token_index image_start_token_id",
    VISION_END: "vision_end_token_id eoi_token_id eoi_token_index image_end_token_id",
}  # fmt: skip
SMALL: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()} | {
    "is_decoder": True, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1], "global_attn_indexes": [1],
}  # fmt: skip

KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "indexer_types")
"""Fields with one entry for each layer that select what kind of layer it is."""

KINDS_GIVEN = {*KINDS, "num_hidden_layers"}
"""Fields whose overrides leave the kinds of layers to the overrides."""

Overrides = dict[str, Any]


def small_config(config_class: type[PreTrainedConfig], overrides: Overrides | None = None) -> PreTrainedConfig:
    """Build a configuration with small sizes and one layer of each kind at least.

    `overrides` replaces single values, on top of those of the type; the value for a nested configuration is a dict of its own overrides.
    Raises whatever the class raises for values that it refuses.
    """
    overrides = OVERRIDES.get(config_class.model_type, {}) | (overrides or {})
    fields = _fields(config_class)
    default = _default(config_class) or config_class.__new__(config_class)
    values = {name: copy.copy(size) for name, size in SMALL.items() if name in fields and _alike(size, vars(default).get(name))}
    values |= _sections(config_class)
    if "kv_lora_rank" in fields:
        values["num_key_value_heads"] = HEADS  # in latent attention every head has keys of its own
    nested = _nested(config_class, overrides)
    kinds = {} if KINDS_GIVEN & overrides.keys() else _kinds(config_class)
    values |= kinds | {name: value for name, value in overrides.items() if name not in nested and name != "model_type"}
    if kinds and "num_hidden_layers" in fields:
        values["num_hidden_layers"] = len(next(iter(kinds.values())))
    for name, sub_class in nested.items():
        values[name] = small_config(sub_class, overrides.get(name))
    return config_class(**values)


def _alike(size: object, default: object) -> bool:
    """Return if a small value may replace a default: one number does not replace a list with one for each layer or stage."""
    return isinstance(size, list) or not isinstance(default, list | tuple)


def _sections(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return rotary parameters whose sections for time, height and width fill a small head, for classes that have sections."""
    if "mrope_section" not in (getattr(config_class, "ignore_keys_at_rope_validation", None) or ()):
        return {}
    known = getattr(_default(config_class), "rope_parameters", None) or {}
    rope = {"rope_type": "default", "rope_theta": 10000.0} | {k: v for k, v in known.items() if not isinstance(v, dict)}
    half = int(HEAD * rope.get("partial_rotary_factor", 1.0)) // 2
    rope["mrope_section"] = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    return {"rope_parameters": rope}


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    names = set(inspect.signature(config_class.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        names |= {field.name for field in dataclasses.fields(config_class)}
    return names


def _default(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        return config_class()
    except Exception:  # noqa: BLE001 - some have no default; the small values then stand alone
        return None


def _nested(config_class: type[PreTrainedConfig], overrides: Overrides) -> dict[str, type[PreTrainedConfig]]:
    """Return the classes of nested configurations; where any class is allowed, that of the overrides or of the default."""
    default, found = _default(config_class), {}
    for name, sub_class in (config_class.sub_configs or {}).items():
        value = getattr(default, name, None)
        kind = type(value) if isinstance(value, PreTrainedConfig) else sub_class
        if "model_type" in (overrides.get(name) or {}):
            kind = CONFIG_MAPPING[overrides[name]["model_type"]]
        if kind is not AutoConfig:
            found[name] = kind
    return found


def _kinds(config_class: type[PreTrainedConfig]) -> dict[str, list[Any]]:
    """Return lists of the kinds of layers, shortened so that each combination of the full size is there once."""
    default = _default(config_class)
    count = getattr(default, "num_hidden_layers", None)
    settable = _fields(config_class)
    lists = {name: getattr(default, name, None) for name in KINDS if name in settable}
    lists = {name: value for name, value in lists.items() if isinstance(value, list) and len(value) == count}
    rows = list(dict.fromkeys(zip(*lists.values(), strict=True)))
    if len(rows) < 2:
        return {}
    rows += rows[-1:] * (LAYERS - len(rows))
    return {name: [row[place] for row in rows] for place, name in enumerate(lists)}
