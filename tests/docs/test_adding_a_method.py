"""The method on the page about adding one works as it stands, and is better than plain rounding where it says so."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from aerogel.layers.linear import QuantLinear
from aerogel.methods.base import WeightMethod
from aerogel.model.calls import Call
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.model.walk import Walk
from tests.tiny import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[WeightMethod]:
    """The class in the page's Python block."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "clipped.py").write_text(code)
    spec = importlib.util.spec_from_file_location("clipped", tmp_path / "clipped.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "clipped", module)
    spec.loader.exec_module(module)
    return module.Clipped


def test_it_compresses_a_network(method: type[WeightMethod]) -> None:
    tiny = FAMILIES["llama"]
    errors = {}
    for factors in ((1.0,), (1.0, 0.95, 0.9, 0.85, 0.8)):
        network = Network(tiny.build(), Family("llama", ("llama",)))
        errors[factors] = []
        for block in Walk(network, tiny.calls(2)):
            method(scheme="W3A16_G32", factors=factors).compress(block)  # type: ignore[call-arg]
            errors[factors] += [note["error"] for note in block.notes]
        quantized = [module for module in network.module.modules() if isinstance(module, QuantLinear)]
        assert len(quantized) == 14
        assert not any(isinstance(module, nn.Linear) for module in network.module.model.layers.modules())
        assert torch.isfinite(network.run(Call((), tiny.calls(1)[0].kwargs)).logits).all()
    plain, clipped = errors.values()
    assert sum(clipped) < 0.97 * sum(plain)
