"""ShadowKV against its formula, chunk by chunk, and against dense attention where nothing is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.inference.generate import Generator
from aerogel.methods.kv_cache.kv_cache_int import KVCacheInt
from aerogel.methods.kv_eviction.shadowkv import Shadowkv
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.kv_cache.shadow import ShadowLayer, ShadowOptions
from tests.methods.prompt_tokens.prompts import LENGTH, deep, prompt

MATRIX = {"options": {"budget": 2, "chunk": 2, "rank": 2, "outlier_chunks": 1, "local_chunks": 1}}
SMALL: dict[str, Any] = {"chunk": 4, "outlier_chunks": 3, "local_chunks": 2}
NEW = 5


def turned(x_D: Tensor, angle: Tensor) -> Tensor:
    half = len(x_D) // 2
    other = torch.cat((-x_D[half:], x_D[:half]))
    return x_D * angle.cos() + other * angle.sin()


@pytest.mark.parametrize("asking", [1, 3])
def test_what_is_attended_to_is_written_out(asking: int) -> None:
    """Two heads of keys for four of queries; 22 tokens are four chunks, two last ones and a rest."""
    torch.manual_seed(0)
    key, value, query = torch.randn(1, 2, 22 + asking, 8), torch.randn(1, 2, 22 + asking, 8), torch.randn(1, 4, asking, 8)
    angle_ND = (torch.arange(22 + asking)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])).repeat(1, 2)
    layer = ShadowLayer(ShadowOptions(budget=5, chunk=4, rank=3, outlier_chunks=1, local_chunks=1))
    for part in (slice(0, 22), slice(22, None)):
        layer.expect((angle_ND[None, part].cos(), angle_ND[None, part].sin()))
        layer.update(key[:, :, part], value[:, :, part])
    ours = layer.attend(query.unflatten(1, (2, 2)).flatten(2, 3), 0.5).unflatten(2, (2, asking))[0]
    plain = torch.stack([torch.stack([turned(key[0, head, n], -angle_ND[n]) for n in range(22)]) for head in range(2)])
    left, size, right = torch.linalg.svd(torch.cat(list(plain), dim=1), full_matrices=False)
    low = (left[:, :3] * size[:3]) @ right[:3]
    for head in range(2):
        means = [key[0, head, 4 * c : 4 * c + 4].mean(0) for c in range(4)]
        unlike = [min(float(torch.cosine_similarity(key[0, head, 4 * c + t], means[c], dim=0)) for t in range(4)) for c in range(4)]
        outlier = min(range(4), key=unlike.__getitem__)
        others = [c for c in range(4) if c != outlier]
        logits = torch.stack([torch.stack([q @ means[c] * 0.5 for c in others]) for q in query[0, 2 * head : 2 * head + 2].flatten(0, 1)])
        scores = logits.softmax(-1).unflatten(0, (2, asking)).sum(1).amax(0)
        best = others[int(scores.argmax())]
        exact = [*range(4 * outlier, 4 * outlier + 4), *range(16, 22 + asking)]
        rebuilt = [turned(low[4 * best + t, 8 * head : 8 * head + 8], angle_ND[4 * best + t]) for t in range(4)]
        keys = torch.stack([*rebuilt, *(key[0, head, n] for n in exact)])
        values = torch.stack([value[0, head, n] for n in [*range(4 * best, 4 * best + 4), *exact]])
        for number in range(asking):
            seen = len(keys) - (asking - 1 - number)
            for group in range(2):
                chances = (keys[:seen] @ query[0, 2 * head + group, number] * 0.5).softmax(0)
                torch.testing.assert_close(ours[head, group, number], chances @ values[:seen], rtol=0, atol=1e-5)


def behind(network: Network, policy: Shadowkv | None, ids_BN: Tensor) -> Tensor:
    """Logits of tokens that read a prompt from the cache, in one forward and then one by one."""

    def read() -> Tensor:
        cache = network.run(Call((), {"input_ids": ids_BN[:, :80], "use_cache": True})).past_key_values
        parts = [network.run(Call((), {"input_ids": ids, "past_key_values": cache})).logits for ids in ids_BN[:, 80:92].split(12, dim=1)]
        parts += [network.run(Call((), {"input_ids": ids, "past_key_values": cache})).logits for ids in ids_BN[:, :2].split(1, dim=1)]
        return torch.cat(parts, dim=1)

    if policy is None:
        return read()
    with policy.on(network, policy.calibrate(network, [prompt(length=24)])):
        return read()


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_with_full_rank_and_all_chunks_it_is_dense_and_the_error_falls_with_the_rank(kind: str) -> None:
    network, ids_BN = deep(kind), prompt(2).kwargs["input_ids"]
    dense_BTV = behind(network, None, ids_BN)
    full = 2 * network.module.model.layers[0].self_attn.head_dim  # type: ignore[union-attr,index,operator]
    found = [behind(network, Shadowkv(budget=79, rank=rank, **SMALL), ids_BN) for rank in (2, 16, full)]
    errors = [float((one_BTV - dense_BTV).norm() / dense_BTV.norm()) for one_BTV in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[-1]
    torch.testing.assert_close(found[-1], dense_BTV, rtol=0, atol=1e-4)


def test_prompts_up_to_the_budget_stay_as_they_are() -> None:
    network, ids_BN = deep(), prompt(2).kwargs["input_ids"]
    torch.testing.assert_close(
        behind(network, Shadowkv(budget=80, rank=1, **SMALL), ids_BN), behind(network, None, ids_BN), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_the_fast_decoder_writes_what_transformers_writes(rows: int) -> None:
    network, ids_BN = deep("Qwen3"), prompt(rows).kwargs["input_ids"]
    policy = Shadowkv(budget=16, rank=8, **SMALL)
    with policy.on(network, policy.calibrate(network, [prompt(rows)])):
        made = Generator(network, rows, LENGTH + NEW).generate(ids_BN, NEW)
        written: Any = network.module.generate(  # type: ignore[operator]
            ids_BN, attention_mask=torch.ones_like(ids_BN), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
        )
        beams: Any = network.module.generate(ids_BN, attention_mask=torch.ones_like(ids_BN), max_new_tokens=2, num_beams=2, do_sample=False)  # type: ignore[operator]
    assert (made.path, made.reason) == ("fast_decoder", None)
    assert torch.equal(made.tokens, written.sequences[:, LENGTH:])
    assert beams.shape == (rows, LENGTH + 2)
    layer = written.past_key_values.layers[0]
    assert layer.get_seq_length() == LENGTH + NEW - 1
    assert layer.exact_keys.length == 3 * 4 + 2 * 4 + NEW - 1
    whole = 2 * rows * 2 * (LENGTH + NEW - 1) * network.module.model.layers[0].self_attn.head_dim * 4  # type: ignore[union-attr,index,operator]
    assert layer.bytes < 0.9 * whole


@pytest.mark.parametrize("pads", [7, LENGTH - 30])
def test_a_padded_row_is_read_as_it_is_alone(pads: int) -> None:
    """With all chunks and full rank; and a row of padding for the most part keeps to its own tokens."""
    network, call = deep(), prompt(2, pads=pads)
    given = {name: call.kwargs[name] for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    dense: Any = network.module.generate(**given, **options)  # type: ignore[operator]
    policy = Shadowkv(budget=LENGTH - 1, rank=64, **SMALL)
    with policy.on(network, policy.calibrate(network, [prompt()])):
        ours: Any = network.module.generate(**given, **options)  # type: ignore[operator]
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(dense.logits), rtol=0, atol=1e-4)
    policy = Shadowkv(budget=8, rank=64, **SMALL)
    with policy.on(network, policy.calibrate(network, [prompt()])):
        few: Any = network.module.generate(**given, **options)  # type: ignore[operator]
    assert torch.stack(few.logits).isfinite().all()
    if pads == 7:
        assert not torch.allclose(torch.stack(few.logits), torch.stack(dense.logits), atol=1e-2)


def test_a_crop_forgets_what_came_behind_the_prompt() -> None:
    network, policy = deep(), Shadowkv(budget=16, rank=8, **SMALL)
    with policy.on(network, policy.calibrate(network, [prompt()])):
        cache = network.run(Call((), prompt().kwargs | {"use_cache": True})).past_key_values
        again = {"past_key_values": cache, "input_ids": torch.tensor([[5, 6, 7]])}
        first = network.run(Call((), again)).logits
        cache.crop(-3)
        assert torch.equal(network.run(Call((), again)).logits, first)
        with pytest.raises(AerogelError, match="cannot be forgotten; read the prompt again"):
            cache.crop(-4)
    with pytest.raises(AerogelError, match="put the policy on to read it"):
        network.run(Call((), again))


def test_what_does_not_fit_is_refused() -> None:
    network, policy = deep(), Shadowkv(budget=16, rank=8, **SMALL)
    state = policy.calibrate(network, [prompt()])
    bits = KVCacheInt(bits=8)
    with (
        bits.on(network, bits.calibrate(network, [Call((), prompt().kwargs | {"use_cache": True})])),
        pytest.raises(AerogelError, match="is quantized by another policy; leave one of them out"),
        policy.on(network, state),
    ):
        pass
    assert list(Shadowkv(budget=4).problems(network, None)) == ["budget is 4, expected at least chunk, which is 8"]  # type: ignore[arg-type]


def test_keys_that_are_turned_otherwise_are_refused() -> None:
    """The angles of a model that turns a part of the channels only."""
    network = deep("StableLm", partial_rotary_factor=0.5)
    assert "not turned in halves" in " ".join(Shadowkv().problems(network, None))  # type: ignore[arg-type]
    with pytest.raises(AerogelError, match="not turned in halves of all their channels"):
        Shadowkv().calibrate(network, [prompt()])
