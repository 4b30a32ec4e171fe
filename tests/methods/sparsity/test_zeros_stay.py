"""Every pruning method with every kind of step behind it: what became zero is exactly zero in the folder that is opened again.

A new method needs no line here. What other steps do to zeros is tried with magnitude pruning, in test_magnitude.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aerogel
from aerogel import catalog
from aerogel.layers.linear import QuantLinear
from aerogel.methods.sparsity.policy import PruningMethod
from aerogel.model.block import Block
from tests.tiny import FAMILIES

PRUNING = [name for name in catalog.names("methods") if issubclass(catalog.find("methods", name), PruningMethod)]
BEHIND: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    "rtn": [{"rtn": {"scheme": "W4A16_G32_ASYM"}}],
    "smoothquant, gptq": [{"smoothquant": {}}, {"gptq": {"scheme": "W4A16_G32_ASYM"}}],
    "awq": [{"awq": {"scheme": "W4A16_G32", "search_space": 2}}],
}
CASES = [(name, pattern, behind) for name in PRUNING if name != "magnitude" for pattern in ("unstructured", "2:4") for behind in BEHIND]


@pytest.mark.parametrize(("method", "pattern", "behind"), CASES)
def test_zeros_stay(method: str, pattern: str, behind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, which the weights are rounded to when they are stored."""
    kept = pruned(monkeypatch)
    recipe = {"steps": [{method: {"pattern": pattern}}, *BEHIND[behind]]}
    network = FAMILIES["llama"].build().bfloat16()
    aerogel.compress(network, recipe, samples=FAMILIES["llama"].calls(2), output=tmp_path / "out", measures=())
    opened = aerogel.load(tmp_path / "out", lazy=False).module
    assert len(kept) == 2 * 7
    for name, kept_OI in kept.items():
        layer = opened.get_submodule(name)
        assert isinstance(layer, QuantLinear) == bool(BEHIND[behind])
        weight = layer.dequantized(torch.float32) if isinstance(layer, QuantLinear) else layer.weight
        assert not weight[~kept_OI].any(), name
        assert int((~kept_OI).sum()) == kept_OI.numel() // 2
        assert float((weight[kept_OI] != 0).float().mean()) > 0.6
        if pattern == "2:4":
            assert (weight.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all()


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W4A16_G32_ASYM", "W8A8"])
def test_zeros_of_a_joint_step_stay(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = pruned(monkeypatch)
    recipe = {"steps": [{"sparsegpt": {"scheme": scheme}}]}
    result = aerogel.compress(FAMILIES["llama"].build(), recipe, samples=FAMILIES["llama"].calls(2), output=tmp_path / "out", measures=())
    opened = aerogel.load(tmp_path / "out", lazy=False).module
    assert {entry["scheme"] for entry in result.journal} == {scheme}
    assert len(kept) == 2 * 7
    for name, kept_OI in kept.items():
        layer = opened.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert not layer.dequantized(torch.float32)[~kept_OI].any(), name
        assert int((~kept_OI).sum()) >= kept_OI.numel() // 2


def pruned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Where weights are kept, by full name, filled in when they are pruned."""
    kept: dict[str, Tensor] = {}
    prune = Block.prune

    def watched(block: Block, name: str, kept_OI: Tensor) -> None:
        prune(block, name, kept_OI)
        kept[block.full_name(name)] = kept_OI.clone()

    monkeypatch.setattr(Block, "prune", watched)
    return kept
