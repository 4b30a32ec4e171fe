"""Dropping tokens equals hiding them by masks, in a forward, in generation and with beams; positions are those of all tokens."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from aerogel.errors import AerogelError
from aerogel.methods.kv_cache.kv_cache_int import KVCacheInt
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import Shortening
from aerogel.runtime.tokens.stage import Selection
from tests.runtime.tokens.dropping import Dropped, grown, grown_places, hidden_by_masks
from tests.tiny import FAMILIES, IMAGE_TOKEN, NEAR, TINY, opened

NAMES = ["llama", "qwen3", "opt", "deepseek_v3", "llava", "internvl", "qwen2_5_vl", "qwen3_vl_moe"]
PLACES = [(0,), (1,), (0, 1)]
CASES = [(name, blocks) for name in NAMES for blocks in PLACES] + [
    pytest.param(name, blocks, marks=[] if blocks == (0, 1) else pytest.mark.slow) for name in NEAR for blocks in PLACES
]
NEW = 5


def dropping(network: Network, blocks: tuple[int, ...], dropped: Dropped) -> Shortening:
    return Shortening(network, decoder_of(network), {block: dropped.rule(block) for block in blocks})


def hooks_on(network: Network) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.module.modules()]


def generated(network: Network, call: Call, **more: Any) -> Any:
    given = {key: value for key, value in call.kwargs.items() if key != "use_cache"}
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    settings |= {"suppress_tokens": [IMAGE_TOKEN]} | more  # an image token in the answer would ask for a feature
    return network.module.generate(**given, **settings)


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_a_forward_equals_one_of_all_tokens_under_masks(name: str, blocks: tuple[int, ...]) -> None:
    """With rows of unlike length in the batch, padding on the left and deeper features of the vision tower."""
    network = opened(name)
    call = TINY[name].calls(2)[1]
    assert not call.kwargs["attention_mask"].all()
    dropped = Dropped()
    with dropping(network, blocks, dropped).on() as shortening:
        ours_BNV = network.run(call).logits
    theirs_BNV = hidden_by_masks(network, call, dropped.gone)
    there_BN = ~ours_BNV.isnan().any(-1)
    assert torch.equal(there_BN, ~torch.stack(list(dropped.gone.values())).any(0))
    read_BN = there_BN & call.kwargs["attention_mask"].bool()
    torch.testing.assert_close(ours_BNV[read_BN], theirs_BNV[read_BN], rtol=0, atol=1e-5)
    length = call.kwargs["input_ids"].shape[1]
    gone_B = [dropped.gone[block].sum(1).min() if block in blocks else torch.tensor(0) for block in (0, 1)]
    assert shortening.lengths == (length - gone_B[0], length - gone_B[0] - gone_B[1])


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_generation_equals_masks(name: str, blocks: tuple[int, ...]) -> None:
    network = opened(name)
    call = TINY[name].calls(2)[1]
    dropped = Dropped()
    with dropping(network, blocks, dropped).on():
        made = generated(network, call, output_logits=True)
    length = call.kwargs["input_ids"].shape[1]
    whole_BNV = hidden_by_masks(network, grown(call, made.sequences), grown_places(dropped.gone, length + NEW))
    torch.testing.assert_close(torch.stack(made.logits, 1), whole_BNV[:, length - 1 : -1], rtol=0, atol=1e-5)
    layers = made.past_key_values.layers
    assert {layer.get_seq_length() for layer in layers} == {length + NEW - 1}
    assert layers[-1].keys.shape[2] < length + NEW - 1


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_beams_equal_masks(name: str) -> None:
    network = opened(name)
    call = TINY[name].calls(2)[1]
    dropped = Dropped()
    with dropping(network, (1,), dropped).on():
        made = generated(network, call, num_beams=3, output_scores=True)
    length = call.kwargs["input_ids"].shape[1]
    gone = {block: gone_BN[::3] for block, gone_BN in dropped.gone.items()}
    whole_BNV = hidden_by_masks(network, grown(call, made.sequences), grown_places(gone, length + NEW))
    chance_BN = whole_BNV[:, length - 1 : -1].log_softmax(-1).gather(2, made.sequences[:, length:, None])[..., 0]
    torch.testing.assert_close(chance_BN.mean(1), made.sequences_scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3_vl_moe"])
def test_a_static_cache_gives_what_a_dynamic_one_gives(name: str) -> None:
    network = opened(name)
    call = TINY[name].calls(2)[1]
    made = []
    for more in ({}, {"cache_implementation": "static"}):
        with dropping(network, (0, 1), Dropped()).on():
            made.append(generated(network, call, output_logits=True, **more))
    assert torch.equal(made[0].sequences, made[1].sequences)
    torch.testing.assert_close(torch.stack(made[0].logits), torch.stack(made[1].logits), rtol=0, atol=1e-5)
    assert made[1].past_key_values.layers[1].cumulative_length < call.kwargs["input_ids"].shape[1] + NEW - 1


@pytest.mark.slow
def test_compiled_decoding_gives_the_same() -> None:
    """Steps of one token with a static cache, compiled as one graph; prompts are read as they are."""
    network, ids_BN = opened("llama"), torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(network.module, backend="eager", dynamic=True)
    logits = []
    for step in (network.module, compiled):
        cache = StaticCache(config=network.config, max_cache_len=20)
        with torch.no_grad(), dropping(network, (1,), Dropped()).on():
            found = [network.module(input_ids=ids_BN, past_key_values=cache).logits[:, -1]]
            for _ in range(4):
                found.append(step(input_ids=found[-1].argmax(-1)[:, None], past_key_values=cache).logits[:, -1])
        logits.append(torch.stack(found))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


def test_positions_are_not_renumbered() -> None:
    """The same kept tokens as a prompt of their own give something else."""
    network = opened("llama")
    ids_BN = torch.arange(3, 15)[None]
    keep_BN = torch.ones_like(ids_BN, dtype=torch.bool)
    keep_BN[0, 3:8] = False
    with Shortening(network, decoder_of(network), {0: lambda _: Selection(keep_BN)}).on():
        kept_V = network.run(Call((), {"input_ids": ids_BN})).logits[0, -1]
    alone_V = network.run(Call((), {"input_ids": ids_BN[keep_BN][None]})).logits[0, -1]
    assert not torch.allclose(kept_V, alone_V, atol=1e-2)


def test_a_second_prompt_behind_the_first_equals_masks() -> None:
    """As with chunks of a prompt, or a second turn: what the first dropped stays dropped, and the second drops of its own."""
    network = opened("llama")
    ids_BN = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
    dropped, gone_BN = Dropped(), torch.zeros(2, 0, dtype=torch.bool)
    cache = DynamicCache(config=network.config)
    parts: list[Tensor] = []
    with dropping(network, (1,), dropped).on():
        for part_BN in ids_BN.split(8, dim=1):
            parts.append(network.run(Call((), {"input_ids": part_BN, "past_key_values": cache})).logits)
            gone_BN = torch.cat([gone_BN, dropped.gone[1]], dim=1)
    call = Call((), {"input_ids": ids_BN, "attention_mask": torch.ones_like(ids_BN), "use_cache": False})
    whole_BNV, ours_BNV = hidden_by_masks(network, call, {1: gone_BN}), torch.cat(parts, dim=1)
    assert gone_BN.sum(1).tolist() == [7, 7]
    torch.testing.assert_close(ours_BNV[~gone_BN], whole_BNV[~gone_BN], rtol=0, atol=1e-5)


def test_a_cache_is_copied_cropped_repeated_and_cut_to_rows() -> None:
    network = opened("llama")
    ids_BN = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    next_B1 = torch.tensor([[5], [6]])
    with dropping(network, (1,), Dropped()).on():
        cache = network.run(Call((), {"input_ids": ids_BN, "use_cache": True})).past_key_values
        first = network.run(Call((), {"input_ids": next_B1, "past_key_values": copy.deepcopy(cache)})).logits
        longer = copy.deepcopy(cache)
        network.run(Call((), {"input_ids": torch.tensor([[7, 8], [8, 9]]), "past_key_values": longer}))
        longer.crop(-2)
        assert torch.equal(network.run(Call((), {"input_ids": next_B1, "past_key_values": longer})).logits, first)
        for change, rows in (("batch_repeat_interleave", 2), ("batch_select_indices", torch.tensor([1]))):
            other = copy.deepcopy(cache)
            getattr(other, change)(rows)
            given = next_B1.repeat_interleave(2, 0) if rows == 2 else next_B1[1:]
            expected = first.repeat_interleave(2, 0) if rows == 2 else first[1:]
            found = network.run(Call((), {"input_ids": given, "past_key_values": other})).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_crop_into_the_prompt_forgets_what_was_held_of_it() -> None:
    network = opened("llama")
    ids_BN = torch.randint(3, 120, (1, 12), generator=torch.Generator().manual_seed(0))
    keep_BN = torch.arange(12)[None] % 2 == 0
    with Shortening(network, decoder_of(network), {1: lambda _: Selection(keep_BN)}).on():
        cache = network.run(Call((), {"input_ids": ids_BN, "use_cache": True})).past_key_values
    cache.crop(-5)
    assert [(layer.get_seq_length(), layer.keys.shape[2]) for layer in cache.layers] == [(7, 7), (7, 4)]


def test_a_crop_leaves_a_row_with_less_than_another() -> None:
    """What the second row held lies behind the crop but for its first position: later tokens do not see it."""
    network = opened("llama")
    ids_BN = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    keep_BN = torch.arange(12) % 2 == 0
    keep_BN = torch.stack([keep_BN, torch.tensor([1, *[0] * 6, *[1] * 5], dtype=torch.bool)])
    next_B1 = torch.tensor([[5], [6]])
    with Shortening(network, decoder_of(network), {1: lambda stage: Selection(keep_BN)}).on():
        cache = network.run(Call((), {"input_ids": ids_BN, "use_cache": True})).past_key_values
        cache.crop(-5)
        ours_BV = network.run(Call((), {"input_ids": next_B1, "past_key_values": cache})).logits[:, -1]
    whole_BN = torch.cat([ids_BN[:, :7], next_B1], dim=1)
    call = Call((), {"input_ids": whole_BN, "attention_mask": torch.ones_like(whole_BN), "use_cache": False})
    theirs_BV = hidden_by_masks(network, call, {1: torch.nn.functional.pad(~keep_BN[:, :7], (0, 1))})[:, -1]
    torch.testing.assert_close(ours_BV, theirs_BV, rtol=0, atol=1e-5)


def test_two_that_drop_are_refused() -> None:
    network = opened("llama")
    with dropping(network, (1,), Dropped()).on(), pytest.raises(AerogelError, match="is on already; leave one of them out"):
        dropping(network, (0,), Dropped()).on().__enter__()


def test_a_quantized_cache_holds_what_is_left() -> None:
    network = opened("llama")
    call = FAMILIES["llama"].calls(1)[0]
    policy = KVCacheInt(bits=8)
    state = policy.calibrate(network, [call])
    made = []
    for order in (0, 1):
        contexts = [policy.on(network, state), dropping(network, (1,), Dropped()).on()]
        with contexts[order], contexts[1 - order]:
            made.append(generated(network, call, output_logits=True))
    with dropping(network, (1,), Dropped()).on():
        plain = generated(network, call, output_logits=True)
    assert torch.equal(torch.stack(made[0].logits), torch.stack(made[1].logits))
    error = (torch.stack(made[0].logits) - torch.stack(plain.logits)).norm() / torch.stack(plain.logits).norm()
    assert 0 < error < 0.05
    assert made[0].past_key_values.layers[1].stored_keys.length == plain.past_key_values.layers[1].keys.shape[2]


def test_the_network_is_what_it_was_also_after_an_error() -> None:
    network = opened("llava")
    call = FAMILIES["llava"].calls(1)[0]
    before, hooks = network.run(call).logits, hooks_on(network)

    def fail(_: Any) -> Selection:
        raise ZeroDivisionError

    with Shortening(network, decoder_of(network), {1: fail}).on(), pytest.raises(ZeroDivisionError):
        network.run(call)
    assert torch.equal(network.run(call).logits, before)
    assert hooks_on(network) == hooks
    assert all("forward" not in vars(module) for module in network.module.modules())


def test_other_caches_and_calls_are_refused() -> None:
    network = opened("llama")
    with dropping(network, (1,), Dropped()).on():
        sliding = Cache([DynamicSlidingWindowLayer(sliding_window=4) for _ in range(2)])
        with pytest.raises(AerogelError, match=r"DynamicSlidingWindowLayer.*leave cache_implementation out"):
            network.run(Call((), {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8]]), "past_key_values": sliding}))
        with pytest.raises(AerogelError, match="outside of the model's own forward"):
            network.module.model(input_ids=torch.tensor([[3, 4, 5]]))
        with pytest.raises(AerogelError, match="without input_ids"):
            network.module(inputs_embeds=torch.zeros(1, 4, 64))


def test_a_second_thread_gets_an_error() -> None:
    network = opened("llama")
    entered, leave, errors = threading.Event(), threading.Event(), []

    def wait(_: Any) -> None:
        entered.set()
        leave.wait(10)

    def second() -> None:
        try:
            network.run(Call((), {"input_ids": torch.tensor([[3, 4]])}))
        except AerogelError as error:
            errors.append(str(error))

    with Shortening(network, decoder_of(network), {0: wait}).on():
        first = threading.Thread(target=lambda: network.run(Call((), {"input_ids": torch.tensor([[3, 4]])})))
        first.start()
        entered.wait(10)
        other = threading.Thread(target=second)
        other.start()
        other.join()
        leave.set()
        first.join()
    assert "one forward at a time" in errors[0]
