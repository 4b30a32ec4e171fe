"""Prompt pruning: what stays is what its formula says, its budgets hold, and what it computes is that of masks over the whole prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from aerogel.errors import AerogelError
from aerogel.evaluate.decode_perplexity import DecodePerplexity
from aerogel.evaluate.kl_divergence import KlDivergence
from aerogel.evaluate.perplexity import Perplexity
from aerogel.methods.prompt_tokens.prompt_pruning import PromptPruning
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import Shortening
from tests.methods.prompt_tokens.prompts import DEPTH, LENGTH, Recorder, deep, prompt
from tests.runtime.tokens.dropping import grown, grown_places, hidden_by_masks
from tests.tiny import FAMILIES, opened
from tests.words import WORDS, tokenizer

MATRIX = {"options": {"min_length": 1, "sink": 1, "local": 3, "q_window": 2, "block": 2, "sub_block": 1, "layers": [1], "keep": [0.8]}}

SMALL: dict[str, Any] = {"min_length": 64, "sink": 3, "local": 8, "q_window": 4, "block": 8, "sub_block": 4}
STAGES = (2, 3, 4)
NEW = 6


def test_stages_and_budgets_of_a_decoder_of_30_blocks() -> None:
    assert sorted(PromptPruning().rules(30)) == [10, 15, 20]


def paid(network: Network, call: Call, number: int) -> Tensor:
    """The attention of the last four tokens in a block (H, 4, N), from its projections."""
    block = network.module.model.layers[number]  # type: ignore[union-attr,index]
    taken: dict[str, Any] = {}
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: taken.update(x=args[0], **kwargs), with_kwargs=True)
    network.run(call)
    handle.remove()
    attention, x_NC = block.self_attn, block.input_layernorm(taken["x"])
    query, key = (layer(x_NC).view(1, LENGTH, -1, attention.head_dim).transpose(1, 2) for layer in (attention.q_proj, attention.k_proj))
    query, key = apply_rotary_pos_emb(query, key, *taken["position_embeddings"])
    heads = []
    for head in range(query.shape[1]):
        score_NN = query[0, head] @ key[0, head // attention.num_key_value_groups].T * attention.head_dim**-0.5
        heads.append(score_NN.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(-1)[-4:])
    return torch.stack(heads)


@pytest.mark.parametrize("attention", ["max", "mean"])
@pytest.mark.parametrize(("reduce", "kernel"), [("max", 1), ("mean", 1), ("max", 5)])
def test_what_the_end_attends_to_most_stays(attention: Any, reduce: Any, kernel: int) -> None:
    """The formula written out: the largest attention in the blocks before, or the mean in the one that follows, unit by unit."""
    network = deep()
    call = prompt()
    if attention == "max":
        received = torch.stack([paid(network, call, number) for number in (0, 1)]).amax((0, 1, 2))
    else:
        received = paid(network, call, 2).mean((0, 1))
    reach = kernel // 2
    received = torch.stack([received[max(0, place - reach) : place + reach + 1].max() for place in range(LENGTH)])
    blocks = (LENGTH - 3 - 8) // 8
    scores = []
    for number in range(blocks):
        units = [received[3 + 8 * number + start :][:4].mean() for start in (0, 4)]
        scores.append(max(units) if reduce == "max" else sum(units) / 2)
    fit = (LENGTH // 2 - (LENGTH - 8 * blocks)) // 8
    best = sorted(range(blocks), key=lambda number: -float(scores[number]))[:fit]
    expected = {3 + 8 * number + place for number in set(range(blocks)) - set(best) for place in range(8)}
    recorder = Recorder(PromptPruning(keep=(0.5,), layers=(2,), attention=attention, reduce=reduce, kernel=kernel, **SMALL))
    with recorder.on(network):
        network.run(call)
    assert set(recorder.gone[2][0].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("keep", [(0.5, 0.4, 0.3), (60, 40, 25), (1.0, 0.6, 50), (1, 1, 1)])
@pytest.mark.parametrize("pads", [0, 7])
def test_budgets_hold_and_kept_sets_are_nested(keep: Any, pads: int) -> None:
    network = deep()
    call = prompt(2, pads=pads)
    recorder = Recorder(PromptPruning(keep=keep, layers=STAGES, **SMALL))
    with recorder.on(network) as shortening:
        network.run(call)
    gone_BN = torch.zeros(2, LENGTH, dtype=torch.bool)
    for block, budget in zip(STAGES, keep, strict=True):
        assert not (gone_BN & recorder.gone[block]).any(), "what is gone is not dropped again: kept sets are nested"
        gone_BN = gone_BN | recorder.gone[block]
        for row, start in ((0, 0), (1, pads)):
            length = LENGTH - start
            assert not gone_BN[row, : start + 3].any(), "padding and the first tokens stay"
            assert not gone_BN[row, -8:].any(), "the last tokens stay"
            least = length - (length - 11) // 8 * 8
            allowed = max(least, min(length, budget if isinstance(budget, int) else round(budget * length)))
            assert allowed - 8 < length - int(gone_BN[row].sum()) <= allowed
    gone_DB = torch.stack([recorder.gone[block].sum(1) if block in STAGES else torch.zeros(2) for block in range(DEPTH)]).cumsum(0)
    assert shortening.lengths == tuple((LENGTH - gone_DB).amax(1).tolist())


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("pads", [0, 7])
def test_a_forward_equals_masks_over_the_whole_prompt(kind: str, pads: int) -> None:
    network = deep(kind)
    call = prompt(2, pads=pads)
    recorder = Recorder(PromptPruning(keep=(0.6, 0.4, 0.3), layers=STAGES, **SMALL))
    with recorder.on(network):
        ours_BNV = network.run(call).logits
    gone_BN = torch.stack(list(recorder.gone.values())).any(0)
    assert torch.equal(ours_BNV.isnan().any(-1), gone_BN)
    read_BN = ~gone_BN & call.kwargs["attention_mask"].bool()
    theirs_BNV = hidden_by_masks(network, call, recorder.gone)
    torch.testing.assert_close(ours_BNV[read_BN], theirs_BNV[read_BN], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pads", [0, 7])
def test_generation_equals_masks_and_caches_have_the_planned_lengths(pads: int) -> None:
    network = deep()
    call = prompt(2 if pads else 1, pads=pads)
    recorder = Recorder(PromptPruning(keep=(0.6, 0.4, 0.3), layers=STAGES, **SMALL))
    with recorder.on(network) as shortening:
        given = {name: call.kwargs[name] for name in ("input_ids", "attention_mask")}
        made = network.module.generate(  # type: ignore[operator]
            **given, max_new_tokens=NEW, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
    whole_BNV = hidden_by_masks(network, grown(call, made.sequences), grown_places(recorder.gone, LENGTH + NEW))
    torch.testing.assert_close(torch.stack(made.logits, 1), whole_BNV[:, LENGTH - 1 : -1], rtol=0, atol=1e-5)
    layers = made.past_key_values.layers
    assert [layer.keys.shape[2] for layer in layers] == [length + NEW - 1 for length in shortening.lengths]
    assert {layer.get_seq_length() for layer in layers} == {LENGTH + NEW - 1}
    assert len(set(shortening.lengths)) == 4


@pytest.mark.parametrize("options", [{"keep": (1.0, 1.0, 1.0)}, {"keep": (0.5, 0.4, 0.3), "min_length": LENGTH + 1}])
def test_full_budgets_and_short_prompts_are_dense_bit_for_bit(options: dict[str, Any]) -> None:
    network = deep()
    call = Call((), prompt(2, pads=7).kwargs | {"use_cache": True})
    dense = network.run(call)
    with Recorder(PromptPruning(layers=STAGES, **SMALL | options)).on(network):
        ours = network.run(call)
    assert torch.equal(ours.logits, dense.logits)
    for layer, other in zip(ours.past_key_values.layers, dense.past_key_values.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
        assert type(layer) is type(other)


def test_a_short_row_beside_a_long_one_keeps_everything() -> None:
    network = deep()
    call = prompt(2, pads=LENGTH - 40)
    recorder = Recorder(PromptPruning(keep=(0.5,), layers=(2,), **SMALL))
    with recorder.on(network):
        network.run(call)
    assert recorder.gone[2].any(1).tolist() == [True, False]


def test_positions_are_not_renumbered() -> None:
    network = deep()
    call = prompt()
    recorder = Recorder(PromptPruning(keep=(0.5,), layers=(0,), attention="mean", **SMALL))
    with recorder.on(network):
        ours_V = network.run(call).logits[0, -1]
    alone = call.kwargs["input_ids"][~recorder.gone[0]][None]
    assert not torch.allclose(ours_V, network.run(Call((), {"input_ids": alone})).logits[0, -1], atol=1e-2)


def test_chunks_of_a_prompt_are_pruned_one_by_one_and_equal_masks() -> None:
    """Scores of a chunk are those among its own tokens: what came before is no part of its queries and keys."""
    network = deep()
    ids_BN = prompt(2, length=160).kwargs["input_ids"]
    recorder = Recorder(PromptPruning(keep=(0.5, 0.4), layers=(1, 3), **SMALL))
    cache = DynamicCache(config=network.config)
    parts, gone = [], {1: torch.zeros(2, 0, dtype=torch.bool), 3: torch.zeros(2, 0, dtype=torch.bool)}
    with recorder.on(network):
        for part_BN in ids_BN.split(80, dim=1):
            parts.append(network.run(Call((), {"input_ids": part_BN, "past_key_values": cache})).logits)
            gone = {block: torch.cat([before, recorder.gone[block]], dim=1) for block, before in gone.items()}
    gone_BN = gone[1] | gone[3]
    assert gone_BN[:, :80].any()
    assert gone_BN[:, 80:].any()
    call = Call((), {"input_ids": ids_BN, "attention_mask": torch.ones_like(ids_BN), "use_cache": False})
    theirs_BNV = hidden_by_masks(network, call, gone)
    torch.testing.assert_close(torch.cat(parts, 1)[~gone_BN], theirs_BNV[~gone_BN], rtol=0, atol=1e-5)


def test_a_probe_behind_a_cache_masks_what_comes_later() -> None:
    """No query of a second chunk attends to a key after it."""
    network = opened("llama")
    ids_BN = prompt(1, length=24).kwargs["input_ids"]
    seen: list[Any] = []
    with Shortening(network, decoder_of(network), {1: lambda stage: seen.append(stage.probe())}).on():
        cache = network.run(Call((), {"input_ids": ids_BN[:, :12], "use_cache": True})).past_key_values
        network.run(Call((), {"input_ids": ids_BN[:, 12:], "past_key_values": cache}))
    attention_RS = seen[1].attention(torch.arange(12)[None])[0].mean(0)
    assert attention_RS.shape == (12, 12)
    assert not attention_RS.triu(1).any()


def test_calibration_judges_the_last_tokens() -> None:
    network = deep()
    policy = PromptPruning(keep=(0.6, 0.4, 0.3), layers=STAGES, **SMALL)
    state = policy.calibrate(network, [prompt(2, pads=7)])
    assert state.answer_tokens == 2 * 7, "of the last 8 tokens of a row the very last predicts nothing known"
    assert 0 < state.kl < 10
    assert 0.5 < state.kept < 1
    assert state.blocks == DEPTH


def test_later_stages_act_on_what_is_shorter_than_the_least_length() -> None:
    """The prompt is long enough, whatever earlier stages have left of it."""
    network = deep()
    policy = PromptPruning(keep=(0.6, 0.4, 0.3), layers=STAGES, **SMALL)
    with policy.acting(network, policy.fitted(network, [])) as shortening:
        network.run(prompt())
    assert shortening.lengths == (96, 96, 56, 32, 24, 24)


def test_short_calibration_data_is_refused() -> None:
    network = opened("llama")
    (why,) = PromptPruning().unsuitable(network, FAMILIES["llama"].calls(1))
    assert why.startswith("the longest prompt of the calibration data has 12 tokens, and prompts are pruned from 4096 on; give longer ones")


def test_options_that_do_not_fit_are_refused() -> None:
    policy = PromptPruning(keep=(0.5,), block=10, sub_block=4, local=8, q_window=9)
    assert list(policy.problems(deep(), None)) == [  # type: ignore[arg-type]
        "block is 10, expected a multiple of sub_block, which is 4",
        "q_window is 9, expected at most local, which is 8: dropped tokens ask for nothing",
        "keep has 1 budgets for 3 stages; give one for each",
    ]
    assert list(PromptPruning(kernel=4).problems(deep(), None)) == ["kernel is 4, expected an odd number"]  # type: ignore[arg-type]


def test_a_stage_before_the_first_block_has_seen_no_attention() -> None:
    (said,) = PromptPruning(keep=(0.5,), layers=(0,), **SMALL).problems(deep(), None)  # type: ignore[arg-type]
    assert said == "no block has paid attention before block 0; give attention: mean, or a later stage"


@pytest.mark.parametrize(("measure", "name"), [(Perplexity(), "perplexity"), (KlDivergence(), "kl_divergence")])
def test_measures_of_every_token_refuse_the_model_while_the_policy_is_on(measure: Any, name: str) -> None:
    network: Network = deep()
    policy = PromptPruning(keep=(0.6, 0.4, 0.3), layers=STAGES, **SMALL)
    assert type(measure).is_usual(network)
    with policy.on(network, policy.calibrate(network, [prompt()])):
        assert not type(measure).is_usual(network)
        with pytest.raises(AerogelError, match=rf"^{name}: a policy that drops tokens of prompts is on.*decode_perplexity$"):
            measure.measure(network, network)
    assert type(measure).is_usual(network)


def test_perplexity_by_decoding_reads_behind_pruned_prompts(tmp_path: Path) -> None:
    """Prompts of 80 tokens are pruned, those of fewer than min_length are not."""
    network = deep()
    network.processor = tokenizer()
    book = tmp_path / "book.txt"
    book.write_text(
        " ".join(WORDS[int(number)] for number in torch.randint(len(WORDS), (150,), generator=torch.Generator().manual_seed(7)))
    )
    measure = DecodePerplexity(source=str(book), length=96, stride=16)
    dense = measure.measure(network)
    found = {}
    for length in (64, 97):
        policy = PromptPruning(keep=(0.6, 0.4, 0.3), layers=STAGES, **SMALL | {"min_length": length})
        with policy.on(network, policy.calibrate(network, [prompt(length=length)])):
            found[length] = measure.measure(network)
    assert found[97] == dense
    assert 1 < found[64]["perplexity"] < float("inf")
    assert found[64]["perplexity"] != dense["perplexity"]
    assert found[64]["cache_bytes_per_token"] < 0.8 * dense["cache_bytes_per_token"]


@pytest.mark.parametrize("attention", ["max", "mean"])
def test_products_with_weights_are_those_of_what_is_left(attention: Any) -> None:
    """Counted: each block's for its own length; for a mean queries, keys and values of each stage once more, as it looks ahead."""
    network = deep()
    call = prompt()
    with (
        Recorder(PromptPruning(keep=(0.6, 0.4, 0.3), layers=STAGES, attention=attention, **SMALL)).on(network) as shortening,
        FlopCounterMode(display=False) as counter,
    ):
        network.run(call)
    counted = sum(
        flops for operation, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(operation) and "bmm" not in str(operation)
    )
    block = network.module.model.layers[0]  # type: ignore[union-attr,index]
    whole = sum(part.weight.numel() for part in block.modules() if isinstance(part, nn.Linear))
    scored = sum(part.weight.numel() for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj))
    before = [shortening.lengths[stage - 1] for stage in STAGES] if attention == "mean" else []
    head = LENGTH * network.module.lm_head.weight.numel()  # type: ignore[union-attr,operator]
    assert counted == 2 * (sum(shortening.lengths) * whole + sum(before) * scored + head)
