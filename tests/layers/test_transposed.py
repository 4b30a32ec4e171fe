"""Conv1D of transformers, whose weight is (inputs, outputs): a linear layer here, and what it was on disk and in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import aerogel
from aerogel.layers.linear import QuantLinear
from aerogel.layers.transposed import QuantTransposedLinear, TransposedLinear, as_conv1d, as_linears
from tests.architectures.through import registered

IDS_BT = torch.arange(24).view(2, 12)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, bos_token_id=0, eos_token_id=1, dtype="float32")
    return transformers.GPT2LMHeadModel(config).eval()


def logits(module: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(IDS_BT).logits
    return found


def saved(folder: Path) -> Path:
    gpt2().save_pretrained(folder)
    return folder


def test_a_linear_layer_gives_what_conv1d_gave_and_goes_back() -> None:
    model = gpt2()
    before, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    as_linears(model)
    layer = model.transformer.h[0].mlp.c_fc
    assert (type(layer), layer.in_features, layer.out_features) == (TransposedLinear, 64, 256)
    assert torch.equal(layer.weight, weights["transformer.h.0.mlp.c_fc.weight"].T)
    torch.testing.assert_close(logits(model), before)
    as_conv1d(model)
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("lazy", [True, False])
def test_a_folder_is_read_the_right_way_round(lazy: bool, tmp_path: Path) -> None:
    network = aerogel.load(saved(tmp_path / "in"), lazy=lazy)
    if lazy:
        assert network.checkpoint is not None
        network.checkpoint.materialise(network.module)
    torch.testing.assert_close(logits(network.module), logits(gpt2()))


@pytest.mark.parametrize("from_folder", [True, False])
def test_what_is_quantized_opens_here_and_in_transformers(from_folder: bool, tmp_path: Path) -> None:
    """Square layers left in float would be read the wrong way round without anybody noticing."""
    model = saved(tmp_path / "in") if from_folder else gpt2()
    recipe = {"steps": [{"rtn": {"scheme": "W4A16_G32", "ignore": ["*attn.c_proj", "lm_head"]}}]}
    aerogel.compress(model, recipe, output=tmp_path / "out", measures=())
    network = aerogel.load(tmp_path / "out", lazy=False)
    kinds = {name.removeprefix("transformer.h.0."): type(part) for name, part in network.module.named_modules() if ".h.0." in name}
    assert kinds["attn.c_attn"] is kinds["mlp.c_proj"] is QuantTransposedLinear
    assert kinds["attn.c_proj"] is TransposedLinear
    change = (logits(network.module) - logits(gpt2())).norm() / logits(gpt2()).norm()
    assert 0 < change < 0.2
    with registered():
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(opened.transformer.h[0].attn.c_proj) is Conv1D
    assert isinstance(opened.transformer.h[0].attn.c_attn, QuantLinear)
    assert torch.equal(logits(opened), logits(network.module))


def test_other_readers_refuse_what_they_would_read_wrongly(tmp_path: Path) -> None:
    aerogel.compress(gpt2(), {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}, output=tmp_path / "out", measures=())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.quantization_config["quant_method"] == "aerogel"


def test_what_stays_in_float_is_a_checkpoint_of_transformers(tmp_path: Path) -> None:
    aerogel.compress(saved(tmp_path / "in"), {"steps": [{"magnitude": {"sparsity": 0.5}}]}, output=tmp_path / "out", measures=())
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    network = aerogel.load(tmp_path / "out", lazy=False)
    torch.testing.assert_close(logits(opened), logits(network.module))
    weight = opened.transformer.h[0].attn.c_proj.weight
    assert 0.4 < (weight == 0).float().mean() < 0.6


def test_all_of_it_is_reached_and_has_edges() -> None:
    network = aerogel.load(gpt2())
    (edges,) = {id(found): found for found in network.edges.values()}.values()
    found = {(edge.sources, edge.sinks) for edge in edges.edges}
    assert found >= {(("ln_1",), ("attn.c_attn",)), (("ln_2",), ("mlp.c_fc",)), (("attn.c_attn",), ("attn.c_proj",))}
    assert not isinstance(network.residual, str)
