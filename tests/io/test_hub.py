"""Models of the hub, from a hub that this process serves: what is fetched, with which token, and what is said where it fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import aerogel
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.io import hub
from aerogel.io.source import locate
from aerogel.layers.linear import QuantLinear
from tests.folders import model_folder
from tests.hub import COMMIT, Hub, running


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several shards, with files beside it that nobody needs."""
    folder = model_folder(tmp_path_factory.mktemp("stored") / "model", max_shard_size="100KB")
    for useless in ("consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "onnx/model.onnx", "original/params.json"):
        (folder / useless).parent.mkdir(exist_ok=True)
        (folder / useless).write_bytes(b"many bytes")
    (folder / "LICENSE").write_text("Do what you like.")
    (folder / "modeling_own.py").write_text("raise RuntimeError('this ran')")
    return folder


@pytest.fixture
def served(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running(monkeypatch, tmp_path / "cache") as found:
        found.models["owner/model"] = stored
        yield found


def refused(name: str, revision: str | None = None) -> str:
    with pytest.raises(AerogelError) as caught:
        locate(name, revision=revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_what_is_needed_is_fetched(served: Hub, stored: Path) -> None:
    network = open_model("owner/model", lazy=False)
    fetched = {file.removeprefix("owner/model/") for file in served.fetched}
    shards = {path.name for path in stored.glob("model-*.safetensors")}
    assert len(shards) > 1
    settings = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"}
    assert fetched == {*shards, *settings, "LICENSE"}
    assert network.source is not None
    assert network.source.revision == COMMIT
    assert network.source.known_as == "owner/model"


def test_python_files_are_fetched_when_asked_for_by_name(served: Hub) -> None:
    locate("owner/model", trust_remote_code=True)
    assert "owner/model/modeling_own.py" in served.fetched


def test_the_token_of_the_environment_is_used(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    served.gated.add("owner/model")
    assert "owner/model is gated: accept its terms at" in refused("owner/model")
    assert served.tokens == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    locate("owner/model")
    assert "Bearer hf_mine" in served.tokens


def test_a_revision_is_a_branch_or_a_commit(served: Hub) -> None:
    assert locate("owner/model", revision=COMMIT).revision == COMMIT
    assert "owner/model has no revision 'nightly'" in refused("owner/model", "nightly")


def test_a_revision_of_a_folder_is_refused(stored: Path) -> None:
    assert "is not from there; leave --revision out" in refused(str(stored), "main")


def test_a_model_that_the_hub_does_not_have(served: Hub) -> None:
    assert "owner/modl: no such folder here, and the hub has no such model that may be read" in refused("owner/modl")


def test_a_name_that_cannot_be_on_the_hub(served: Hub) -> None:
    assert "expected owner/name" in refused("owner/a--b")


def test_a_cached_model_opens_without_a_connection(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    here = locate("owner/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert locate("owner/model") == here
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("owner/model") == here
    assert locate("owner/model", revision=COMMIT) == here


def test_without_a_connection_the_cache_is_named(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = refused("owner/model")
    assert "it is not in the hub's cache, and the hub cannot be reached" in said
    assert "check the connection, or give the model's folder" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE to download it" in refused("owner/model")


def test_a_model_without_safetensors_is_not_downloaded(served: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    served.models["owner/pickled"] = folder
    assert "owner/pickled has its weights only as pytorch_model.bin, and only safetensors are opened" in refused("owner/pickled")
    assert served.fetched == []


def test_of_a_pipeline_each_part_is_fetched_once() -> None:
    parts = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model-00001-of-00002.safetensors"]
    parts += ["model_index.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt"]
    parts += ["aerogel.json", "aerogel/policies.safetensors"]  # of a pipeline that was compressed and pushed
    useless = [
        "sd_xl_base.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/model.onnx",
        "vae/diffusion_pytorch_model.bin",
    ]
    useless += ["assets/cat.png", "text_encoder/model.fp16-00001-of-00002.safetensors", "unet/pipeline.py", "a/b/config.json"]
    assert hub.needed([*parts, *useless], "owner/pipeline", trust_remote_code=False, shards=lambda index: []) == sorted(parts)


def test_progress_bars_are_shown_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    for before in (disable_progress_bars, enable_progress_bars):
        before()
        outside = are_progress_bars_disabled()
        for shown in (True, False):
            with hub.progress_bars(shown):
                assert are_progress_bars_disabled() is not shown
            assert are_progress_bars_disabled() is outside
    assert constants.HF_HUB_DISABLE_PROGRESS_BARS is None, "else nothing is shown or hidden by a program"


def test_a_model_is_opened_again_as_it_was(stored: Path, tmp_path: Path) -> None:
    source = locate(stored, dtype=torch.float16, trust_remote_code=True)
    copy = Path(shutil.copytree(stored, tmp_path / "copy"))
    network = open_model(source.at(copy), lazy=False)
    assert next(network.module.parameters()).dtype == torch.float16
    assert network.origin == copy
    assert network.source == source.at(copy)


def test_python_files_are_not_run_unasked(stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "copy"))
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"model_type": "llama"', '"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.C"}')
    )
    with pytest.raises(
        AerogelError, match=r"has a model class of its own \(modeling_own.py\); read that file, and add --trust-remote-code"
    ):
        open_model(folder)


def test_a_compressed_model_comes_back_from_the_hub(served: Hub, stored: Path, tmp_path: Path) -> None:
    aerogel.compress(stored, "rtn-w8a8", output=tmp_path / "out", measures=())
    served.models["owner/compressed"] = tmp_path / "out"
    network = aerogel.load("owner/compressed", lazy=False)
    assert any(isinstance(module, QuantLinear) for module in network.module.modules())
    assert "owner/compressed/aerogel.json" in served.fetched, "which has the checksums that were compared"
