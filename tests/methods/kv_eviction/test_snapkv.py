"""SnapKV: the choice of each head against its formula, and what is read behind the prompt against masks for each head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.inference.generate import Generator
from aerogel.methods.kv_eviction.snapkv import Snapkv
from aerogel.model.calls import Call
from aerogel.model.hooks import temporary_hooks
from aerogel.model.network import Network
from aerogel.runtime.tokens.scores import QueryKey, watching
from tests.methods.prompt_tokens.prompts import DEPTH, LENGTH, deep, prompt
from tests.runtime.tokens.dropping import grown

MATRIX = {"options": {"keep": 4, "window": 2, "kernel": 3}}
OPTIONS: dict[str, Any] = {"keep": 40, "window": 4, "kernel": 5}
NEW = 6


def with_cache(call: Call) -> Call:
    return Call((), call.kwargs | {"use_cache": True})


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("pads", [0, 7, LENGTH - 20])
def test_each_head_keeps_what_the_last_tokens_attend_to(pool: Any, pads: int) -> None:
    """Four heads of queries share two of keys; a row with fewer tokens than stay keeps all of its own."""
    network = deep()
    call = with_cache(prompt(2, pads=pads))
    seen: dict[int, QueryKey] = {}
    with watching(network, {2: "model.layers.2.self_attn"}, lambda number, found: seen.update({number: found})):
        dense = network.run(call).past_key_values.layers[2].keys
    policy = Snapkv(pool=pool, **OPTIONS)
    with policy.on(network, policy.calibrate(network, [call])):
        layer = network.run(call).past_key_values.layers[2]
    for row, start in ((0, 0), (1, pads)):
        for head in range(2):
            received_N = torch.zeros(LENGTH)
            for query in (2 * head, 2 * head + 1):
                score_RN = seen[2].query_BHLD[row, query, -4:] @ seen[2].key_BHSD[row, query].T * seen[2].scale
                score_RN[:, :start] = -torch.inf
                score_RN = score_RN.masked_fill(torch.ones(4, LENGTH).triu(LENGTH - 3).bool(), -torch.inf)
                received_N += score_RN.softmax(-1).sum(0) / 2
            received_N[-4:] = 0
            pooled = {}
            for place in range(start, LENGTH - 4):
                near = received_N[max(0, place - 2) : place + 3]
                pooled[place] = float(near.max() if pool == "max" else near.sum() / 5)
            best = sorted(pooled, key=lambda place: -pooled[place])[: 40 - 4]
            expected = sorted([*best, *range(LENGTH - 4, LENGTH)])
            kept = [place for place in layer.place_BS[row, 2 * head].tolist() if place >= start]
            assert kept == expected
            assert torch.equal(layer.keys[row, head], dense[row, head, layer.place_BS[row, 2 * head]])


def behind_masks(network: Network, call: Call, layers: list[Any]) -> Tensor:
    """Logits of a forward of all tokens in which those behind the prompt see, head by head, what is held."""

    def hook(number: int) -> Any:
        def hide(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            length = call.kwargs["input_ids"].shape[1]
            real_BN = call.kwargs["attention_mask"].bool()
            sees = (torch.ones(length, length).tril().bool() & real_BN[:, None]).unsqueeze(1).repeat(1, 4, 1, 1)
            there = torch.zeros(len(sees), 4, length, dtype=torch.bool).scatter(2, layers[number].place_BS, True)
            there[..., LENGTH:] = True
            sees[:, :, LENGTH:] &= there[:, :, None]
            return args, kwargs | {"attention_mask": sees | torch.eye(length).bool()}

        return hide

    blocks = network.module.model.layers  # type: ignore[union-attr]
    with temporary_hooks([blocks[number].register_forward_pre_hook(hook(number), with_kwargs=True) for number in range(DEPTH)]):  # type: ignore[index,union-attr]
        return network.run(call).logits


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("pads", [0, 7, LENGTH - 20])
def test_generation_equals_masks_for_each_head(pads: int, beams: int) -> None:
    network = deep()
    call = prompt(2, pads=pads)
    policy = Snapkv(**OPTIONS)
    given = {name: call.kwargs[name] for name in ("input_ids", "attention_mask")}
    with policy.on(network, policy.calibrate(network, [call])):
        made: Any = network.module.generate(  # type: ignore[operator]
            **given, max_new_tokens=NEW, do_sample=False, num_beams=beams, return_dict_in_generate=True, output_scores=True
        )
    layers = made.past_key_values.layers
    assert {(layer.keys.shape[2], layer.get_seq_length()) for layer in layers} == {(40 + NEW - 1, LENGTH + NEW - 1)}
    if beams > 1:  # the cache has the rows of all beams; a row of a prompt is the same in all of them up to its end
        for layer in layers:
            layer.place_BS = layer.place_BS[::beams]
    logits_BNV = behind_masks(network, grown(call, made.sequences), layers)[:, LENGTH - 1 : -1]
    if beams == 1:
        torch.testing.assert_close(torch.stack(made.scores, 1), logits_BNV, rtol=0, atol=1e-5)
    else:
        chance_BN = logits_BNV.log_softmax(-1).gather(2, made.sequences[:, LENGTH:, None])[..., 0]
        torch.testing.assert_close(chance_BN.mean(1), made.sequences_scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_fast_decoder_goes_on_with_what_is_held(rows: int) -> None:
    network = deep("Qwen3")
    ids_BN = prompt(rows).kwargs["input_ids"]
    policy = Snapkv(**OPTIONS)
    with policy.on(network, policy.calibrate(network, [prompt(rows)])):
        made = Generator(network, rows, LENGTH + NEW).generate(ids_BN, NEW)
        theirs: Any = network.module.generate(ids_BN, attention_mask=torch.ones_like(ids_BN), max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    assert (made.path, made.reason) == ("fast_decoder", None)
    assert torch.equal(made.tokens, theirs[:, LENGTH:])


def test_the_prompt_itself_and_short_prompts_are_as_they_were() -> None:
    network = deep()
    policy = Snapkv(**OPTIONS)
    long, short = with_cache(prompt(2, pads=7)), with_cache(prompt(2, 40))
    dense = [network.run(call) for call in (long, short)]
    with policy.on(network, policy.calibrate(network, [long])):
        ours = [network.run(call) for call in (long, short)]
    assert all(torch.equal(one.logits, other.logits) for one, other in zip(ours, dense, strict=True))
    assert torch.equal(ours[1].past_key_values.layers[0].keys, dense[1].past_key_values.layers[0].keys)


def test_a_second_turn_is_kept_and_a_crop_forgets_it() -> None:
    network = deep()
    policy = Snapkv(**OPTIONS)
    with policy.on(network, policy.calibrate(network, [prompt()])):
        cache = network.run(with_cache(prompt())).past_key_values
        again = {"past_key_values": cache, "input_ids": torch.tensor([[5, 6, 7]])}
        first = network.run(Call((), again)).logits
        assert cache.layers[0].keys.shape[2] == 43
        cache.crop(-3)
        assert torch.equal(network.run(Call((), again | {"past_key_values": cache})).logits, first)
        cache.crop(-10)  # into the prompt, of which heads hold unlike numbers up to there
        assert cache.get_seq_length() == LENGTH - 7
        assert (cache.layers[0].place_BS[cache.layers[0].real_BS] < LENGTH - 7).all()


def test_calibration_reads_the_second_half_behind_the_first() -> None:
    network = deep()
    found = Snapkv(keep=16, window=4).calibrate(network, [prompt(2), prompt(2, pads=7)])
    assert found.tokens == 2 * (LENGTH // 2 - 1)
    assert found.kl is not None
    assert found.kl > 0
    assert Snapkv(keep=48, window=4).calibrate(network, [prompt(2)]).kl == 0
    assert Snapkv(keep=16, window=4).calibrate(network, [prompt(2, pads=7)]).kl is None, "padded rows are not read in two forwards"


def test_options_that_do_not_fit_are_refused() -> None:
    network = deep()
    assert list(Snapkv(keep=8, kernel=4).problems(network, None)) == [  # type: ignore[arg-type]
        "keep is 8, expected at least window, which is 32",
        "kernel is 4, expected an odd number",
    ]
    (why,) = Snapkv().unsuitable(network, [prompt()])
    assert why.startswith("the longest row of the calibration data has 96 tokens, and all of its first half is read")
