"""Attention in vision towers against the towers' own projections: with class tokens, with windows, with a pooling head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.hooks import temporary_hooks
from aerogel.model.network import Network
from aerogel.runtime.attention import with_probabilities
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.images import image_path_of
from aerogel.runtime.tokens.vision_tower import TowerPass, VisionTower, _resized, window_order
from tests.methods.video_tokens.clip_calls import clip_call
from tests.tiny import FAMILIES, fill, opened
from tests.tiny_text import SHAPE


def watched(network: Network, call: Call) -> list[TowerPass]:
    passes: list[TowerPass] = []
    path = image_path_of(network, call)
    with VisionTower.of(network, decoder_of(network), path.attention, path.class_token).watching(network, passes.append):
        network.run(call)
    return passes


@pytest.mark.parametrize("grid", [[[1, 4, 8]], [[2, 12, 8], [1, 4, 4]], [[3, 10, 14]]])
@pytest.mark.parametrize("window", [2, 4])
def test_tokens_of_windows_are_in_the_order_of_transformers(grid: list[list[int]], window: int) -> None:
    grid_N3 = torch.tensor(grid)
    assert torch.equal(window_order(grid_N3, 2, window), get_vision_window_index(grid_N3, 2, window * 2 * 4, 4)[0])


def test_a_token_receives_what_its_patches_do_in_windows_undone() -> None:
    network, call = opened("qwen2_5_vl"), clip_call()
    attention = network.module.model.visual.blocks[1].attn
    taken: dict[str, Any] = {}
    hooks = [
        attention.register_forward_pre_hook(lambda _, args, kwargs: taken.update(kwargs), with_kwargs=True),
        attention.qkv.register_forward_hook(lambda _, args, output: taken.update(qkv=output)),
    ]
    with temporary_hooks(hooks):
        (seen,) = watched(network, call)
    grid_N3 = call.kwargs["video_grid_thw"]
    query_LHD, key_LHD, _ = taken["qkv"].view(len(taken["qkv"]), 3, 2, -1).unbind(1)
    query_LHD, key_LHD = apply_rotary_pos_emb_vision(query_LHD, key_LHD, *taken["position_embeddings"])
    received = []
    for query, key in zip(query_LHD.split(32), key_LHD.split(32), strict=True):  # a frame attends to itself alone
        heads = [(query[:, head] @ key[:, head].T * query.shape[-1] ** -0.5).softmax(1).mean(0) for head in range(2)]
        received.append(torch.stack(heads).mean(0))
    permuted_V = torch.cat(received).view(-1, 4).mean(1)
    index_V, _ = get_vision_window_index(grid_N3, 2, 16, 4)
    assert index_V.tolist() != sorted(index_V.tolist())
    expected_V = permuted_V[index_V.argsort()]
    torch.testing.assert_close(seen.received_by_tokens(80), expected_V)
    assert seen.head_of_tokens(80) is None
    with pytest.raises(AerogelError, match="read 320 patches for 81 image tokens of 2 x 2 patches"):
        seen.received_by_tokens(81)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_class_tokens_ask_alone_and_merged_patches_count_by_their_mean(name: str) -> None:
    network, call = opened(name), FAMILIES[name].calls(1)[0]
    tower = network.module.model.vision_tower.encoder
    attention = tower.layers[1].self_attn if name == "llava" else tower.layer[1].attention
    probabilities: list[Tensor] = []
    with with_probabilities(attention, lambda _, args, kwargs, output: probabilities.append(output[1])):
        network.run(call)
    received_IL = probabilities[0].mean(1)[:, 0, 1:]
    if name == "internvl":  # 4 x 4 patches become 2 x 2 tokens
        received_IL = torch.stack(
            [
                received_IL.view(2, 4, 4)[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
                for row in (0, 1)
                for column in (0, 1)
            ],
            dim=1,
        )
    (seen,) = watched(network, call)
    torch.testing.assert_close(seen.received_by_tokens(8), received_IL.flatten())


def siglip() -> Network:
    """LLaVA around a SigLIP tower, which has a pooling head; the language model does not read that."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SHAPE), image_token_index=120, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.LlavaForConditionalGeneration(config).eval()
    fill(module, torch.Generator().manual_seed(0))
    return open_model(module.requires_grad_(False))


def test_a_pooling_head_attends_and_gives_a_vector() -> None:
    network, call = siglip(), FAMILIES["llava"].calls(1)[0]
    head = network.module.model.vision_tower.head
    taken: dict[str, Tensor] = {}
    with temporary_hooks([head.register_forward_hook(lambda _, args, output: taken.update(x=args[0], out=output))]):
        (seen,) = watched(network, call)
    projected = torch.nn.functional.linear
    weight_Q, weight_K, _ = head.attention.in_proj_weight.chunk(3)
    bias_Q, bias_K, _ = head.attention.in_proj_bias.chunk(3)
    query_HD = projected(head.probe[0, 0], weight_Q, bias_Q).view(2, 16)
    key_ILHD = projected(taken["x"], weight_K, bias_K).view(2, 4, 2, 16)
    expected_IL = (torch.einsum("hd,ilhd->ihl", query_HD, key_ILHD) / 4).softmax(-1).mean(1)
    torch.testing.assert_close(seen.head_of_tokens(8), expected_IL.flatten())
    assert torch.equal(seen.vector_IC, taken["out"])
    assert not torch.allclose(seen.received_by_tokens(8), expected_IL.flatten(), atol=1e-3)


def test_scores_of_patches_are_pooled_to_a_smaller_square() -> None:
    score_IL = torch.arange(162.0).view(2, 81)
    assert torch.equal(_resized(score_IL, 162), score_IL.flatten())
    assert _resized(score_IL, 18)[0] == score_IL[0].view(9, 9)[:3, :3].mean()
    assert _resized(score_IL, 32).shape == (32,)  # 9 is no multiple of 4
    with pytest.raises(AerogelError, match="2 images of 81 patches became 10 image tokens"):
        _resized(score_IL, 10)


def test_a_model_of_text_has_no_tower() -> None:
    network = opened("llama")
    with pytest.raises(AerogelError, match="this llama model has 0; choose a rule that needs none"):
        VisionTower.of(network, decoder_of(network))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_images_and_clips_in_one_forward_take_the_same_path(name: str) -> None:
    """The tower runs once over each kind, and has no class token for either."""
    network, times = opened(name), name == "qwen3_vl_moe"
    paths = [
        image_path_of(network, call) for call in (FAMILIES[name].calls(1)[0], clip_call(image=True, times=times), clip_call(times=times))
    ]
    assert paths[0] == paths[1] == paths[2]
    assert not paths[0].class_token
