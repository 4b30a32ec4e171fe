"""Static fp8 scales of the key-value cache: what is measured, written, read and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import aerogel
from aerogel.engine import policies
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.methods.kv_cache.kv_cache_fp8 import KVCacheFP8
from aerogel.model.calls import Call
from aerogel.model.kv_cache import with_cache
from aerogel.model.network import Network
from tests.tiny import FAMILIES

MATRIX = {"bound": 0.15}
"""Three bits of mantissa in keys and values."""

RECIPE = {"steps": [{"kv_cache_fp8": {}}]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kv") / "llama"
    FAMILIES["llama"].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in 4 bits and a cache in 8."""
    out = tmp_path_factory.mktemp("kv") / "out"
    recipe = {"steps": [{"rtn": {"scheme": "W4A16_G16"}}, *RECIPE["steps"]]}
    aerogel.compress(source, recipe, samples=FAMILIES["llama"].calls(1), output=out, measures=())
    return out


def cached(network: Network, call: Call) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of all layers, as the model's own cache has them."""
    return [(layer.keys, layer.values) for layer in network.run(with_cache(call)).past_key_values.layers]


@pytest.mark.parametrize("granularity", ["tensor", "attn_head"])
def test_scales_are_the_largest_numbers_over_all_calls(granularity: Any) -> None:
    tiny = FAMILIES["llama"]
    network, calls = open_model(tiny.build()), tiny.calls(3)
    state = KVCacheFP8(granularity=granularity).calibrate(network, calls)
    assert state.attentions == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    for layer, name in enumerate(state.attentions):
        for part, which in (("k_scale", 0), ("v_scale", 1)):
            largest = torch.stack([cached(network, call)[layer][which].abs().amax((0, 2, 3)) for call in calls]).amax(0)  # of each head
            expected = largest[:, None, None] if granularity == "attn_head" else largest.amax()[None]
            torch.testing.assert_close(state.scales[f"{name}.{part}"], expected / 448, rtol=0, atol=0)


def test_a_forward_reads_what_is_rounded() -> None:
    """The reference: keys and values of a cache that the model's own cache takes over after rounding, layer by layer, token by token."""
    tiny = FAMILIES["llama"]
    network, calls = open_model(tiny.build()), tiny.calls(1)
    state = KVCacheFP8().calibrate(network, calls)

    def rounded(name: str, x: Tensor) -> Tensor:
        return (x / state.scales[name]).to(torch.float8_e4m3fn).float() * state.scales[name]

    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, index: int, *args: Any, **kwargs: Any) -> Any:
            name = f"model.layers.{index}.self_attn"
            return super().update(rounded(f"{name}.k_scale", keys), rounded(f"{name}.v_scale", values), index, *args, **kwargs)

    call = calls[0]
    expected = network.run(Call((), {**call.kwargs, "use_cache": True, "past_key_values": Rounding()})).logits
    with KVCacheFP8().on(network, state):
        whole = network.run(with_cache(call)).logits
        found = network.run(Call((), {"input_ids": call.kwargs["input_ids"][:, :3], "use_cache": True}))
    torch.testing.assert_close(whole, expected)
    assert isinstance(found.past_key_values.layers[0].bytes, int)


def test_weights_and_cache_are_written_together(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    scales = {name: tensor for name, tensor in load_file(saved / "model.safetensors").items() if name.endswith((".k_scale", ".v_scale"))}
    assert sorted(scales) == [f"model.layers.{layer}.self_attn.{part}_scale" for layer in (0, 1) for part in "kv"]
    assert all(scale.shape == (1,) and scale.dtype == torch.float32 for scale in scales.values())


def test_a_cache_alone_is_a_quantization_config_too(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    aerogel.compress(source, RECIPE, samples=FAMILIES["llama"].calls(1), output=out, measures=())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["config_groups"] == {}
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    network = aerogel.load(out, lazy=False)
    assert network.run(with_cache(FAMILIES["llama"].calls(1)[0])).past_key_values.layers[0].bytes > 0


def test_somebody_elses_scales_are_put_on(saved: Path, tmp_path: Path) -> None:
    """Without this package's own files the same policy comes of kv_cache_scheme and the scales beside the weights."""
    call = with_cache(FAMILIES["llama"].calls(1)[0])
    expected = aerogel.load(saved, lazy=False).run(call).logits
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    tensors = load_file(saved / "model.safetensors")
    for old, new in ((".self_attn.k_scale", ".self_attn.k_proj.output_scale"), (".self_attn.v_scale", ".self_attn.v_proj.output_scale")):
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    (theirs / "config.json").write_text((saved / "config.json").read_text())
    assert torch.equal(aerogel.load(theirs, lazy=False).run(call).logits, expected)
    del tensors["model.layers.1.self_attn.v_proj.output_scale"]
    save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AerogelError, match=r"needs model\.layers\.1\.self_attn\.v_scale, which the checkpoint lacks"):
        aerogel.load(theirs, lazy=False)


def test_another_scheme_is_told(saved: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    (theirs / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="keys and values are not quantized here"):
        aerogel.load(theirs, lazy=False)


def test_transformers_opens_it(saved: Path) -> None:
    """Its own reader of compressed-tensors takes the scales and rounds alike."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert torch.equal(
        theirs.model.layers[0].self_attn.k_scale.float(), load_file(saved / "model.safetensors")["model.layers.0.self_attn.k_scale"]
    )
    call = FAMILIES["llama"].calls(1)[0]
    ours = aerogel.load(saved, lazy=False)
    with torch.no_grad():
        expected = theirs(**with_cache(call).kwargs).logits
    torch.testing.assert_close(ours.run(with_cache(call)).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_goes_on_comes_off() -> None:
    tiny = FAMILIES["llama"]
    network, call = open_model(tiny.build()), tiny.calls(1)[0]
    state = KVCacheFP8().calibrate(network, [call])
    before = network.run(with_cache(call)).logits
    with KVCacheFP8().on(network, state):
        filled = network.run(with_cache(call)).past_key_values
        with pytest.raises(AerogelError, match="is quantized by another policy"), KVCacheFP8().on(network, state):
            pass
    assert torch.equal(network.run(with_cache(call)).logits, before)
    assert not any(module._forward_pre_hooks for module in network.module.modules())
    # A cache that was filled meanwhile goes on as it is.
    length = filled.get_seq_length()
    network.run(Call((), {"input_ids": torch.ones(2, 1, dtype=torch.int64), "past_key_values": filled, "use_cache": True}))
    assert filled.get_seq_length() == length + 1


def test_policies_of_a_folder_are_read_once(saved: Path) -> None:
    assert [one.step.name for one in policies.load(saved)] == ["kv_cache_fp8"]
