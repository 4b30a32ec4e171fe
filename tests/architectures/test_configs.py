"""Small configurations keep every kind of layer, and take the overrides of their type."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.architectures import audio_text, image_text, seq2seq, text
from tests.architectures.configs import HEAD, HIDDEN, KINDS, VOCABULARY, small_config
from tests.architectures.overrides import OVERRIDES

EVERY = sorted(
    {*text.TYPES, *seq2seq.TYPES, *image_text.TYPES, *audio_text.TYPES} - {"gemma4_assistant"}
)  # its defaults are refused by itself


def parts(config: PreTrainedConfig, name: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    yield name, config
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            yield from parts(value, f"{name}.{key}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_layer_of_the_full_size_is_there() -> None:
    checked = 0
    for model_type in EVERY:
        small = dict(parts(small_config(CONFIG_MAPPING[model_type])))
        for name, full in parts(CONFIG_MAPPING[model_type]()):
            for field in KINDS:
                kinds, kept = vars(full).get(field), vars(small.get(name, full)).get(field)
                if isinstance(kinds, list) and isinstance(kept, list):
                    assert set(kinds) <= set(kept), (model_type, name, field)
                    checked += 1
    assert checked > 100


def test_sizes_are_small() -> None:
    config = small_config(CONFIG_MAPPING["qwen3_next"])
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (HIDDEN, HEAD, VOCABULARY)
    assert config.layer_types == ["linear_attention", "full_attention", "full_attention"]


def test_overrides_hold_for_a_nested_configuration() -> None:
    config = small_config(CONFIG_MAPPING["gemma4"], {"text_config": {"num_attention_heads": 8}})
    assert config.text_config.num_kv_shared_layers == OVERRIDES["gemma4_text"]["num_kv_shared_layers"] == 2
    assert config.text_config.num_attention_heads == 8


def test_sections_of_rotary_positions_fill_the_head() -> None:
    config = small_config(CONFIG_MAPPING["glm4v_moe"])
    rope = config.text_config.rope_parameters
    assert sum(rope["mrope_section"]) == HEAD * rope["partial_rotary_factor"] / 2
