"""Saving: plain transformers opens what we write and answers what our model answers; bad days leave nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor, nn

from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.io.save import DiskError, new_folder, preflight, resident, write
from aerogel.layers.linear import cache_dequantized
from tests.releases import DENSE, LIBRARY
from tests.saved import network, round_to_nearest, save, tokenizer
from tests.tiny import FAMILIES, output

SCHEMES = [
    "W2A16_G32",
    "W3A16_G32",
    "W4A16_G32_ASYM",
    "W4A16_CHANNEL",
    "W8A16_G64",
    "W8A8",
    "W8A8_STATIC",
    "W4A8_G32",
    "FP8_DYNAMIC",
    "FP8_STATIC",
]
PACKED = "W4A16_G32" if DENSE else "W4A16_G32_ASYM"


def opened(folder: Path) -> nn.Module:
    module: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return module.eval()


def largest_difference(left: nn.Module, right: nn.Module) -> float:
    """Between the logits of two models in float arithmetic, relative to the largest logit."""
    calls = FAMILIES["llama"].calls(2)
    with cache_dequantized(left), cache_dequantized(right):
        pairs = [(output(left, call).float(), output(right, call).float()) for call in calls]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_plain_transformers_gives_the_logits_of_our_model(scheme: str | None, tmp_path: Path) -> None:
    given = network(scheme)
    save(given, tmp_path / "out")
    if scheme == ("W4A16_G32_ASYM" if DENSE else "W3A16_G32"):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            opened(tmp_path / "out")
        return
    assert largest_difference(given.module, opened(tmp_path / "out")) < 1e-6  # measured: 0.0


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16", "W4A16_G32"])
def test_in_bfloat16_too(scheme: str, tmp_path: Path) -> None:
    # Weight-only: the library rounds the scales of quantized inputs to bfloat16, which ours keeps in float32.
    given = network(scheme, dtype=torch.bfloat16)
    save(given, tmp_path / "out")
    theirs = opened(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    assert largest_difference(given.module, theirs) < 1e-6  # measured: 0.0


def test_mixed_schemes_formats_and_layers_left_in_float_open_too(tmp_path: Path) -> None:
    def mixed(name: str) -> str | None:
        if name == "lm_head" or name.endswith("0.mlp.gate_proj"):
            return None
        return "W8A8" if name.endswith("down_proj") else "FP8_DYNAMIC" if ".0." in name else PACKED

    given = network(mixed)
    save(given, tmp_path / "out")
    assert largest_difference(given.module, opened(tmp_path / "out")) < 1e-6  # measured: 0.0


def test_activation_order_opens_too(tmp_path: Path) -> None:
    given = network("W4A16_G32", act_order=True)
    save(given, tmp_path / "out")
    if Version("0.19") <= LIBRARY:
        with pytest.raises(ValueError, match="actorder='group' has been removed"):
            opened(tmp_path / "out")
        return
    assert largest_difference(given.module, opened(tmp_path / "out")) < 1e-6  # measured: 0.0


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W8A8", "FP8_DYNAMIC"])
def test_our_kernels_give_its_logits_within_their_rounding(scheme: str, tmp_path: Path) -> None:
    given = network(scheme)
    save(given, tmp_path / "out")
    theirs = opened(tmp_path / "out")
    for call in FAMILIES["llama"].calls(2):
        expected = output(theirs, call)
        assert (output(given.module, call) - expected).norm() < 0.02 * expected.norm()  # measured: 0.010 (int4), 0.006 (int8)


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    given = network(kind="qwen2")
    names = [name for name, _ in resident(given.module)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    save(given, tmp_path / "out")
    again = opened(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert largest_difference(given.module, again) < 1e-6


def test_a_sharded_stream_in_any_order_opens_too(tmp_path: Path) -> None:
    given = network()
    stream = list(resident(given.module))[::-1]
    checksums = save(given, tmp_path / "out", tensors=iter(stream), max_shard_size=20_000)
    assert len(checksums) > 2
    assert largest_difference(given.module, opened(tmp_path / "out")) < 1e-6


def origin(folder: Path, **settings: Any) -> Path:
    """A folder as a hub has it: weights, configuration with settings of its own, tokenizer files, a card, hidden files."""
    FAMILIES["llama"].build().bfloat16().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"custom": 1, "rope_theta": 10000.0} | settings))
    for name, text in {
        "tokenizer.json": "{}",
        "chat_template.jinja": "hi",
        "LICENSE": "free",
        "aerogel.json": "old",
        ".hidden": "",
    }.items():
        (folder / name).write_text(text)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def test_files_beside_the_weights_come_along_and_weights_keep_their_dtype(tmp_path: Path) -> None:
    source = origin(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    given = network(origin=source, stored_dtype=torch.bfloat16)
    save(given, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "model.safetensors"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["custom"], config["rope_theta"], config["dtype"]) == (1, 10000.0, "bfloat16")
    assert opened(tmp_path / "out").get_submodule("lm_head").weight.dtype == torch.bfloat16
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_scales_are_never_rounded_on_the_way_to_the_disk(tmp_path: Path) -> None:
    given = network(origin=origin(tmp_path / "source"), stored_dtype=torch.bfloat16)  # its scales are float32
    save(given, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    scales = {name: tensor for name, tensor in given.module.state_dict().items() if name.endswith("weight_scale")}
    assert len(scales) == 14
    assert all(tensors[name].equal(scale) for name, scale in scales.items())


def test_settings_that_changed_in_memory_reach_the_disk(tmp_path: Path) -> None:
    given = network(origin=origin(tmp_path / "source"))
    assert given.config is not None
    given.config.rms_norm_eps = 0.125
    save(given, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["rms_norm_eps"] == 0.125


def test_an_old_quantization_config_does_not_stay_on_a_float_model(tmp_path: Path) -> None:
    given = network(
        None, origin=origin(tmp_path / "source", quantization_config={"quant_method": "compressed-tensors", "config_groups": {}})
    )
    save(given, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def pipeline() -> diffusers.DiTPipeline:
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, sample_size=8)
    return diffusers.DiTPipeline(FAMILIES["dit"].build(), vae, diffusers.DDIMScheduler())


def test_a_denoiser_is_saved_into_its_part_of_the_pipeline_from_memory_and_from_a_folder(tmp_path: Path) -> None:
    live = open_model(pipeline())
    round_to_nearest(live.module, "W4A16_G32")
    checksums = save(live, tmp_path / "a")
    assert list(checksums) == ["transformer/diffusion_pytorch_model.safetensors"]
    pipeline().save_pretrained(tmp_path / "source")
    opened_again = open_model(tmp_path / "source")
    round_to_nearest(opened_again.module, "W4A16_G32")
    save(opened_again, tmp_path / "b")
    call = FAMILIES["dit"].calls(1)[0]
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert {path.name for path in folder.iterdir()} == {"model_index.json", "transformer", "vae", "scheduler"}
        config = json.loads((folder / "transformer/config.json").read_text())
        assert config["_class_name"] == "DiTTransformer2DModel"
        assert config["quantization_config"]["format"] == "pack-quantized"
        assert load_file(folder / "vae/diffusion_pytorch_model.safetensors").keys() == pipeline().vae.state_dict().keys()
        again = open_model(folder, lazy=False)
        with cache_dequantized(again.module), cache_dequantized(live.module):
            torch.testing.assert_close(output(again.module, call), output(live.module, call))


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    given = network()

    def breaks() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(3)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(AerogelError, match=r"could not be saved \(No space left on device\); nothing was left"):
        save(given, tmp_path / "out", tensors=breaks())

    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(given, tmp_path / "out", tensors=interrupted())
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep/out") as folder:
        write(network(), folder)
        assert not (tmp_path / "deep/out").exists()
    assert (tmp_path / "deep/out/model.safetensors").is_file()
    with pytest.raises(AerogelError, match="not empty"), new_folder(tmp_path / "deep/out") as folder:
        write(network(), folder)


def test_tensors_that_are_not_in_memory_are_named(tmp_path: Path) -> None:
    given = network()
    given.module.to("meta")
    with pytest.raises(AerogelError, match=r"model\.embed_tokens\.weight: its values are not in memory"):
        save(given, tmp_path / "out")


def test_preflight_finds_what_is_in_the_way_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "empty").mkdir()
    preflight(tmp_path / "empty", 1)
    preflight(tmp_path / "new/deeper", 1)
    with pytest.raises(AerogelError, match="not empty"):
        preflight(tmp_path / "full")
    with pytest.raises(AerogelError, match="is not a folder"):
        preflight(tmp_path / "full/file")
    with pytest.raises(AerogelError, match="the folder the model comes from"):
        preflight(tmp_path / "full/inside", origin=tmp_path / "full")
    with pytest.raises(AerogelError, match=r"GB free, about .* needed"):
        preflight(tmp_path / "new", 10**18)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(AerogelError, match=r"1\.0 GB free"):
        preflight(tmp_path / "new", 10**9)

    def read_only(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(AerogelError, match="cannot write here"):
        preflight(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_full_for_the_tokenizer_is_named_as_for_the_weights(tmp_path: Path) -> None:
    """The tokenizers library raises a plain Exception with the text of the operating system's error."""

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            tokenizer().backend_tokenizer.save("/dev/full")

    with pytest.raises(DiskError, match=rf"^{tmp_path}/out: could not be saved \(No space left on device\); nothing was left there"):
        save(network(processor=Full()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_errors_of_a_tokenizer_are_its_own(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("no model (os error 28) here")

    with pytest.raises(Exception, match="no model"):
        save(network(processor=Broken()), tmp_path / "out")
