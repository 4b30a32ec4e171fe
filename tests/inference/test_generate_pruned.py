"""The fast decoder behind a pruned prompt: its tokens are those of transformers, its blocks have caches of unlike length."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.inference.generate import Generator
from aerogel.methods.kv_cache.kv_cache_int import KVCacheInt
from aerogel.methods.prompt_tokens.prompt_pruning import PromptPruning
from aerogel.model.network import Network
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import Shortening
from aerogel.runtime.tokens.stage import Selection, Stage
from tests.methods.prompt_tokens.prompts import LENGTH, deep, prompt

NEW = 8
POLICY = PromptPruning(keep=(0.6, 0.4, 0.3), layers=(2, 3, 4), min_length=64, sink=3, local=8, q_window=4, block=8, sub_block=4)


def theirs(network: Network, ids_BN: Tensor) -> Tensor:
    made: Any = network.module.generate(  # type: ignore[operator]
        ids_BN, attention_mask=torch.ones_like(ids_BN), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    return made[:, ids_BN.shape[1] :]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("quantized", [False, True])
def test_tokens_are_those_of_transformers(kind: str, rows: int, quantized: bool) -> None:
    network = deep(kind)
    ids_BN = prompt(rows).kwargs["input_ids"]
    generator = Generator(network, rows, LENGTH + NEW)
    dense = generator.generate(ids_BN, NEW)
    cache = KVCacheInt(bits=8)
    with (
        cache.on(network, cache.calibrate(network, [prompt(rows)])) if quantized else nullcontext(),
        POLICY.on(network, POLICY.calibrate(network, [prompt(rows)])),
    ):
        wanted_BN = theirs(network, ids_BN)
        pruned = Generator(network, rows, LENGTH + NEW)
        for _ in range(2):  # the second time with packed weights and a used cache
            made = pruned.generate(ids_BN, NEW)
            assert (made.path, made.reason) == ("fast_decoder", None)
            assert torch.equal(made.tokens, wanted_BN)
    assert not torch.equal(made.tokens, dense.tokens)
    assert torch.equal(generator.generate(ids_BN, NEW).tokens, dense.tokens), "the same decoder with full caches"


@pytest.mark.parametrize("rows", [1, 2])
def test_a_rule_that_watches_a_block_leaves_the_fast_decoder_on(rows: int) -> None:
    """Unless rows keep unlike numbers of positions, which its attention has no mask for."""
    network = deep()
    ids_BN = prompt(rows).kwargs["input_ids"]

    def choose(stage: Stage) -> Selection:
        assert stage.watched[1].attention(torch.zeros(rows, 1, dtype=torch.int64)).shape[0] == rows
        keep_BK = torch.ones_like(stage.kind_BK, dtype=torch.bool)
        keep_BK[:, 10:40] = False
        keep_BK[1:, 10:20] = True
        return Selection(keep_BK)

    with Shortening(network, decoder_of(network), {2: choose}, (1,), drops_text=True).on():
        made = Generator(network, rows, LENGTH + NEW).generate(ids_BN, NEW)
        assert torch.equal(made.tokens, theirs(network, ids_BN))
    if rows == 1:
        assert (made.path, made.reason) == ("fast_decoder", None)
    else:
        assert (made.path, made.reason) == ("transformers", "the cache holds unlike numbers of positions of its rows")
