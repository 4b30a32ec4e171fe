"""The cache of early blocks under `kv_policy: final`: what the last stage leaves, at true positions, against masks over all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.inference.generate import Generator
from aerogel.methods.prompt_tokens.prompt_pruning import PromptPruning
from aerogel.model.calls import Call
from aerogel.model.hooks import temporary_hooks
from aerogel.model.network import Network
from tests.methods.prompt_tokens.prompts import DEPTH, LENGTH, Recorder, deep, prompt
from tests.runtime.tokens.dropping import grown, grown_places

SMALL: dict[str, Any] = {"min_length": 64, "sink": 3, "local": 8, "q_window": 4, "block": 8, "sub_block": 4}
POLICY = PromptPruning(keep=(0.6, 0.4, 0.3), layers=(2, 3, 4), kv_policy="final", **SMALL)
NEW = 6


def masked(network: Network, call: Call, gone: dict[int, Tensor]) -> Tensor:
    """Logits of all tokens: those of the prompt see what their block computed, later ones what the last block did."""
    gone_BN = torch.stack(list(gone.values())).any(0)
    length = call.kwargs["input_ids"].shape[1]

    def hook(number: int) -> Any:
        def hide(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            sees = torch.ones(length, length).tril().bool()[None] & call.kwargs["attention_mask"][:, None, :].bool()
            for block, dropped_BN in gone.items():
                sees = sees & ~dropped_BN[:, None, :] if block <= number else sees
            sees[:, LENGTH:] &= ~gone_BN[:, None, :]
            return args, kwargs | {"attention_mask": (sees | torch.eye(length).bool())[:, None]}

        return hide

    blocks = network.module.model.layers  # type: ignore[union-attr]
    with temporary_hooks([blocks[number].register_forward_pre_hook(hook(number), with_kwargs=True) for number in range(DEPTH)]):  # type: ignore[index,union-attr]
        return network.run(call).logits


@pytest.mark.parametrize("pads", [0, 7])
def test_later_tokens_see_what_the_last_block_computed(pads: int) -> None:
    network = deep()
    call = prompt(2 if pads else 1, pads=pads)
    recorder = Recorder(POLICY)
    with recorder.on(network):
        network.run(call)
    given = {name: call.kwargs[name] for name in ("input_ids", "attention_mask")}
    with POLICY.on(network, POLICY.calibrate(network, [call])):
        made: Any = network.module.generate(  # type: ignore[operator]
            **given, max_new_tokens=NEW, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
    gone = grown_places(recorder.gone, LENGTH + NEW)
    whole_BNV = masked(network, grown(call, made.sequences), gone)
    torch.testing.assert_close(torch.stack(made.logits, 1), whole_BNV[:, LENGTH - 1 : -1], rtol=0, atol=1e-5)
    left_BN = ~torch.stack(list(recorder.gone.values())).any(0)
    layers = made.past_key_values.layers
    assert {layer.keys.shape[2] for layer in layers} == {int(left_BN.sum(1).max()) + NEW - 1}
    assert {layer.get_seq_length() for layer in layers} == {LENGTH + NEW - 1}
    for layer in layers:
        for row in range(len(left_BN)):
            real_S = slice(None) if layer.real_BS is None else layer.real_BS[row]
            assert layer.place_BS[row, real_S].tolist() == [*left_BN[row].nonzero()[:, 0].tolist(), *range(LENGTH, LENGTH + NEW - 1)]


def test_the_fast_decoder_goes_on_with_it() -> None:
    network, ids_BN = deep("Qwen3"), prompt().kwargs["input_ids"]
    with POLICY.on(network, POLICY.calibrate(network, [prompt()])):
        made = Generator(network, 1, LENGTH + NEW).generate(ids_BN, NEW)
        theirs: Any = network.module.generate(ids_BN, attention_mask=torch.ones_like(ids_BN), max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    assert (made.path, made.reason) == ("fast_decoder", None)
    assert torch.equal(made.tokens, theirs[:, LENGTH:])


def test_the_prompt_itself_is_the_same_and_short_ones_keep_their_cache() -> None:
    network = deep()
    call = Call((), prompt().kwargs | {"use_cache": True})
    logits = []
    for kv_policy in ("per_group", "final"):
        policy = PromptPruning(keep=(0.5,), layers=(3,), kv_policy=kv_policy, **SMALL)  # type: ignore[arg-type]
        with policy.on(network, policy.calibrate(network, [call])):
            logits.append(network.run(call).logits.nan_to_num())
            short = network.run(Call((), prompt(length=40).kwargs | {"use_cache": True}))
    assert torch.equal(*logits)
    assert {layer.keys.shape[2] for layer in short.past_key_values.layers} == {40}
