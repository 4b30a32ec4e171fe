"""The structure in a file is what was discovered; a resumed run and `aerogel show` of an output read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import aerogel
from aerogel.cli.commands import app
from aerogel.engine import structure_file
from aerogel.engine.preflight import partial_of
from aerogel.engine.structure import structure_of
from aerogel.errors import AerogelError
from aerogel.model import network as networks
from aerogel.model.network import Network
from tests.tiny import FAMILIES, opened

AWQ = {"steps": [{"awq": {"scheme": "W4A16_G32"}}]}


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "gpt_oss", "llava", "dit", "flux", "unet"])
def test_what_is_read_is_what_was_written(name: str, tmp_path: Path) -> None:
    network, other = opened(name), opened(name)
    found = structure_of(network)
    structure_file.keep(network, tmp_path)
    assert structure_file.recall(other, tmp_path)
    assert structure_of(other) == found
    assert other.residual == network.residual or vars_of(other.residual) == vars_of(network.residual)
    for block, edges in network.edges.items():
        for one, same in zip(edges.edges, other.edges[block].edges, strict=True):
            assert vars_of(one) == vars_of(same)


def vars_of(value: Any) -> Any:
    """A dataclass with lists in the place of tensors and of other dataclasses."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple):
        return [vars_of(one) for one in value]
    return {key: vars_of(one) for key, one in vars(value).items()} if hasattr(value, "__dataclass_fields__") else value


def test_why_a_compressed_block_has_no_edges_is_said(tmp_path: Path) -> None:
    aerogel.compress(folder(tmp_path / "in"), {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}, measures=(), output=tmp_path / "out")
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "out")]).stdout
    assert "\n  no edges: layers in it were replaced already" in shown
    assert "2 blocks like model.layers.0\n  loaded as one: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj\n" in shown


def test_a_file_that_holds_fused_sets_is_read(tmp_path: Path) -> None:
    """They were a part of the edges once."""
    network, other = opened("llama"), opened("llama")
    found = structure_of(network)
    structure_file.keep(network, tmp_path)
    content = json.loads((tmp_path / structure_file.FILE).read_text())
    for kind in content["edges"]:
        kind["found"]["fused"] = [["self_attn.q_proj", "self_attn.k_proj"]]
    (tmp_path / structure_file.FILE).write_text(json.dumps(content))
    assert structure_file.recall(other, tmp_path)
    assert structure_of(other) == found


@given(st.lists(st.integers(-2, 40), max_size=60))
def test_indices_come_back(values: list[int]) -> None:
    index = torch.tensor(values, dtype=torch.long)
    plain = json.loads(json.dumps(structure_file._plain(index)))
    assert torch.equal(structure_file._value(plain), index)


def test_a_network_that_differs_in_a_setting_looks_for_itself(tmp_path: Path) -> None:
    network = opened("llama")
    _ = network.edges
    structure_file.keep(network, tmp_path)
    other = opened("llama")
    other.module.config.rms_norm_eps = 0.5  # type: ignore[union-attr]
    assert not structure_file.recall(other, tmp_path)
    assert not structure_file.recall(opened("mistral"), tmp_path)


def folder(path: Path) -> Path:
    FAMILIES["llama"].build().save_pretrained(path)
    return path


def test_a_resumed_run_does_not_look_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, calls = folder(tmp_path / "in"), FAMILIES["llama"].calls(2)
    options: dict[str, Any] = {"samples": calls, "measures": (), "output": tmp_path / "out"}

    class Killed(BaseException):
        pass

    def tell(event: Any) -> None:
        if event.stage == "compress" and event.done == 1:
            raise Killed

    with pytest.raises(Killed):
        aerogel.compress(source, AWQ, **options, tell=tell)
    assert (partial_of(tmp_path / "out") / structure_file.FILE).is_file()
    looked: list[Network] = []
    monkeypatch.setattr(networks, "edges_by_block", lambda *_: looked.append(_))
    aerogel.compress(source, AWQ, **options, resume=True)
    assert not looked
    aerogel.compress(source, {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}, measures=(), output=tmp_path / "plain")
    assert not (tmp_path / "plain" / structure_file.FILE).exists(), "a recipe that needs no edges looks for none"


def test_an_output_shows_what_it_was_compressed_by(tmp_path: Path) -> None:
    aerogel.compress(folder(tmp_path / "in"), AWQ, samples=FAMILIES["llama"].calls(2), measures=(), output=tmp_path / "out")
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert "as found before it was compressed" in shown.stdout
    assert "input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj (64 channels)" in shown.stdout


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1', "7", "[" * 100_000, '{"schema": 1, "towers": [1]}'])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / structure_file.FILE).write_text(content)
    with pytest.raises(AerogelError, match=r"aerogel\.structure\.json (holds|is)"):
        structure_file.recall(opened("llama"), tmp_path)


def test_a_file_of_another_release_is_left(tmp_path: Path) -> None:
    network = opened("llama")
    _ = network.edges
    structure_file.keep(network, tmp_path)
    path = tmp_path / structure_file.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99, "edges": "otherwise"}))
    assert not structure_file.recall(opened("llama"), tmp_path)


def test_a_file_of_the_users_is_neither_read_nor_left_behind(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    (source / "structure.json").write_text("mine")
    aerogel.compress(source, AWQ, samples=FAMILIES["llama"].calls(2), measures=(), output=tmp_path / "out")
    assert (tmp_path / "out" / "structure.json").read_text() == "mine"
