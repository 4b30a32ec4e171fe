"""FastV against its formula, written out from the layer's own projections."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from aerogel.methods.tokens.fastv import Fastv
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import Shortening
from tests.tiny import FAMILIES, IMAGE_TOKEN, opened

MATRIX = {"options": {"layer": 1}}


@pytest.mark.parametrize("keep", [0.5, 3, 1])
def test_what_the_last_token_attends_to_most_stays(keep: float) -> None:
    network = opened("llava")
    call = FAMILIES["llava"].calls(1)[0]
    decoder, method = decoder_of(network), Fastv(keep=keep, layer=1)
    block = decoder.parts(network)[0]
    taken = {}
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: taken.update(x=args[0], **kwargs), with_kwargs=True)
    network.run(call)
    handle.remove()
    attention, rows = block.self_attn, len(taken["x"])
    x_BNC = block.input_layernorm(taken["x"])
    query, key = (
        layer(x_BNC).view(rows, x_BNC.shape[1], -1, attention.head_dim).transpose(1, 2) for layer in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *taken["position_embeddings"])
    score_BN = torch.zeros(rows, x_BNC.shape[1])
    for head in range(query.shape[1]):
        key_BND = key[:, head // attention.num_key_value_groups]
        scale = attention.head_dim**-0.5
        score_BN += (query[:, head, -1:] @ key_BND.transpose(1, 2) * scale).softmax(-1)[:, 0] / query.shape[1]
    expected = []
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        image = (ids_N == IMAGE_TOKEN).nonzero()[:, 0].tolist()
        count = keep if isinstance(keep, int) else round(keep * len(image))
        expected.append(sorted(sorted(image, key=lambda place: -score_BN[row, place])[:count]))
    chosen = []

    def choose(stage: object) -> object:
        selection = method.choose(stage)
        chosen.append(selection.keep_BK)
        return selection

    with Shortening(network, decoder, {1: choose}, (0,)).on():
        network.run(call)
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        assert (chosen[0][row] & (ids_N == IMAGE_TOKEN)).nonzero()[:, 0].tolist() == expected[row]
        assert chosen[0][row][ids_N != IMAGE_TOKEN].all()


def test_a_block_beyond_the_decoder_is_refused() -> None:
    network = opened("llava")
    assert list(Fastv(layer=2).problems(network, None)) == ["it acts before block 2, and the decoder has blocks 0 to 1"]  # type: ignore[arg-type]


def test_text_alone_has_nothing_to_drop() -> None:
    network = opened("llava")
    call = FAMILIES["llama"].calls(1)[0]
    assert list(Fastv(layer=1).unsuitable(network, [call])) == [
        "the calibration data has no token of an image; give chats with images by --data"
    ]
