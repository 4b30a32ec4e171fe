"""Models that no list names: with code of their own, modules of the user's own, encoder-decoders, experts in a list."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import aerogel
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear, cache_dequantized
from aerogel.model.calls import Call
from tests.tiny import FAMILIES, output

RECIPE = {"steps": [{"awq": {"scheme": "W4A16_G32"}}]}
CODE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class AbacusConfig(LlamaConfig):
    model_type = "abacus"


class AbacusForCausalLM(LlamaForCausalLM):
    config_class = AbacusConfig
"""


def with_code(folder: Path) -> Path:
    """A folder whose model type exists in a file of its own only."""
    FAMILIES["llama"].build().save_pretrained(folder)
    (folder / "abacus.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "abacus.AbacusConfig", "AutoModelForCausalLM": "abacus.AbacusForCausalLM"}
    (folder / "config.json").write_text(
        json.dumps(settings | {"model_type": "abacus", "architectures": ["AbacusForCausalLM"], "auto_map": own})
    )
    return folder


def test_code_of_a_folder_runs_only_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = with_code(tmp_path / "source")
    with pytest.raises(AerogelError, match="--trust-remote-code"):
        open_model(source)
    call = FAMILIES["llama"].calls(1)[0]
    network = open_model(source, trust_remote_code=True)
    assert type(network.module).__name__ == "AbacusForCausalLM"
    result = aerogel.compress(network, RECIPE, samples=[call], output=tmp_path / "out", measures=())
    assert len(result.record.journal) == 14
    opened = aerogel.load(tmp_path / "out", lazy=False, trust_remote_code=True)
    with cache_dequantized(opened.module):
        answer = output(opened.module, call)
    whole = output(FAMILIES["llama"].build(), call)
    assert 0.01 < float((answer - whole).norm() / whole.norm()) < 0.5


class Layer(nn.Module):
    """A gated MLP with a norm, added to what passes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


class Own(nn.Module):
    """A model of the user's own, which takes what only the user knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stack, self.out = nn.Linear(6, 32), nn.ModuleList(Layer(32) for _ in range(3)), nn.Linear(32, 4)

    def forward(self, points: Tensor, scale: float) -> Tensor:
        x = self.stem(points * scale)
        for layer in self.stack:
            x = layer(x)
        return self.out(x)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_module_of_the_users_own_is_compressed_with_the_users_calls(method: str) -> None:
    torch.manual_seed(0)
    module = Own().eval().requires_grad_(False)
    calls = [Call((torch.randn(8, 20, 6), 0.5)) for _ in range(2)]
    before = module(*calls[0].args)
    result = aerogel.compress(module, {"steps": [{method: {"scheme": "W8A16_G32", "ignore": ["stem"]}}]}, samples=calls, measures=())
    assert [tower.name for tower in result.network.towers] == ["stack"]
    assert sum(isinstance(part, QuantLinear) for part in module.modules()) == 10
    assert 0 < float((module(*calls[0].args) - before).norm() / before.norm()) < 0.02


def test_edges_and_stream_of_a_module_of_the_users_own() -> None:
    network = open_model(Own().eval())
    network.discover([Call((torch.randn(2, 20, 6), 0.5))])
    found = {edge.sources: edge.sinks for edge in network.edges["stack.0"].edges}
    assert found == {("norm",): ("gate", "up"), ("up",): ("down",)}
    assert not isinstance(network.residual, str)
    assert network.residual.writers == ("stem", "stack.0.down", "stack.1.down", "stack.2.down")


def test_experts_in_a_list_have_a_gate_that_stays() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(32, 4), nn.ModuleList(Layer(32) for _ in range(4))
            self.shared_gate = nn.Linear(32, 1)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).softmax(-1)
            mixed = sum(weights[..., number, None] * expert(x) for number, expert in enumerate(self.experts))
            return x + mixed * self.shared_gate(x).sigmoid()  # type: ignore[no-any-return]

    class Mixture(Own):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.ModuleList(Experts() for _ in range(2))

    network = open_model(Mixture().eval())
    network.discover([Call((torch.randn(2, 20, 6), 0.5))])
    assert [tower.name for tower in network.towers] == ["stack"]
    assert network.gates == {f"stack.{layer}.{name}" for layer in (0, 1) for name in ("gate", "shared_gate")}


def test_an_encoder_decoder_is_compressed_and_opens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=64, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    module = transformers.BartForConditionalGeneration(config).eval().requires_grad_(False)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    call = Call((), {"input_ids": ids, "decoder_input_ids": ids.flip(1), "use_cache": False})
    result = aerogel.compress(module, RECIPE, samples=[call], output=tmp_path / "out", measures=())
    assert [tower.name for tower in result.network.towers] == ["model.encoder.layers", "model.decoder.layers"]
    opened = aerogel.load(tmp_path / "out", lazy=False)
    with cache_dequantized(opened.module), cache_dequantized(module):
        torch.testing.assert_close(output(opened.module, call), output(module, call))


class Curved(nn.Module):
    """An MLP without a norm: no scale passes its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Curved() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_needs_edges_is_refused_where_there_are_none() -> None:
    module, calls = Row(), [Call((torch.randn(2, 4, 64),))]
    needs = r"awq needs a norm or a linear layer .* this Row model has none \(up: .*\); leave this step out"
    assert re.search(needs, " ".join(aerogel.plan(module, RECIPE, samples=calls).problems))
    with pytest.raises(AerogelError, match=needs):
        aerogel.compress(module, RECIPE, samples=calls, measures=())
