"""The latest blocks: what stays is the first tokens and one run up to the end."""

from __future__ import annotations

import torch

from aerogel.methods.prompt_tokens.recent_blocks import RecentBlocks
from tests.methods.prompt_tokens.prompts import LENGTH, Recorder, deep, prompt

MATRIX = {"options": {"min_length": 1, "sink": 1, "local": 3, "block": 2, "layers": [1], "keep": [0.8]}}


def test_what_goes_is_one_run_behind_the_first_tokens() -> None:
    network = deep()
    recorder = Recorder(RecentBlocks(keep=(0.75, 0.5), layers=(1, 3), min_length=64, sink=3, local=8, block=8))
    with recorder.on(network):
        network.run(prompt(2, pads=7))
    places = torch.arange(LENGTH)
    for row, pads in ((0, 0), (1, 7)):
        length = LENGTH - pads
        least = length - (length - 11) // 8 * 8
        for blocks, share in (((1,), 0.75), ((1, 3), 0.5)):
            kept = least + (round(share * length) - least) // 8 * 8
            gone_N = torch.stack([recorder.gone[block][row] for block in blocks]).any(0)
            assert torch.equal(gone_N, (places >= pads + 3) & (places < pads + 3 + length - kept))
