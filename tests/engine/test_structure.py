"""The structure of a model as data and as text: what `aerogel show MODEL` prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aerogel.cli import structure
from aerogel.cli.commands import app
from aerogel.engine.structure import structure_of
from tests.tiny import FAMILIES, opened


def test_a_language_model_is_described() -> None:
    found = structure_of(opened("llama"))
    assert found["towers"] == [{"name": "model.layers", "blocks": 2}]
    (kind,) = found["blocks"]
    assert (kind["class"], kind["count"], kind["residual"]) == ("LlamaDecoderLayer", 2, "passes")
    assert {"from": ["self_attn.v_proj"], "to": ["self_attn.o_proj"], "channels": 32} in kind["edges"]
    assert kind["fused"] == [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
    assert found["residual"]["tables"] == ["model.embed_tokens.weight"]
    assert (found["head"], found["experts"], found["not_reached"]) == ("lm_head", [], {})
    assert json.loads(json.dumps(found)) == found


def test_experts_are_written_once() -> None:
    found = structure_of(opened("qwen3_moe"))
    (kind,) = found["blocks"]
    assert ["mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"] in kind["fused"]
    assert [edge["to"] for edge in kind["edges"] if edge["from"] == ["mlp.experts.*.up_proj"]] == [["mlp.experts.*.down_proj"]]
    assert found["not_reached"] == {"Qwen3MoeTopKRouter": 2 * 4 * 64}
    assert "mlp.experts.*.up_proj -> mlp.experts.*.down_proj (64 channels)" in structure.as_text(found)
    assert "  loaded as one: mlp.experts.*.gate_proj, mlp.experts.*.up_proj" in structure.as_text(found).splitlines()


@pytest.mark.parametrize("name", ["dit", "gemma3", "flux", "unet"])
def test_what_does_not_hold_is_named(name: str) -> None:
    text = structure.as_text(structure_of(opened(name)))
    assert "residual stream: cannot be rotated: " in text


def test_the_time_path_of_a_denoiser_is_shown() -> None:
    assert structure_of(opened("llama"))["time_path"] is None
    assert "time path: condition_embedder.time_embedder, then 1 projection" in structure.as_text(structure_of(opened("wan")))
    assert "the pooled text, the guidance scale enters too" in structure.as_text(structure_of(opened("flux")))


def test_the_command_shows_a_folder(tmp_path: Path) -> None:
    FAMILIES["gemma2"].build().save_pretrained(tmp_path)
    shown = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert shown.exit_code == 0
    assert "input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj (64 channels, offset 1)" in shown.stdout
    as_json = CliRunner().invoke(app, ["show", str(tmp_path), "--json"])
    assert json.loads(as_json.stdout)["model"] == "gemma2"
