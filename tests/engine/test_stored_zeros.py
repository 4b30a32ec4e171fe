"""The zeros that the record tells of are those of the saved weights, whatever rounding has added to those that a step made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import aerogel
from aerogel.cli.terminal import print_coverage
from aerogel.io.record import files
from aerogel.layers.linear import QuantLinear
from aerogel.numerics.sparsity import zero_share
from aerogel.report import page
from tests.folders import model_folder
from tests.tiny import FAMILIES

UP = "model.layers.0.mlp.up_proj"
HALF: dict[str, Any] = {"magnitude": {"sparsity": 0.5}}


@pytest.mark.parametrize(("scheme", "lazy"), [(None, True), (None, False), ("W2A16_G32", True), ("W4A16_G32_ASYM", False), ("W8A8", False)])
def test_the_record_has_the_zeros_of_the_saved_weights(scheme: str | None, lazy: bool, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model") if lazy else FAMILIES["llama"].build()
    behind = [] if scheme is None else [{"rtn": {"scheme": scheme}}]
    result = aerogel.compress(model, {"steps": [HALF, *behind]}, output=tmp_path / "out", measures=())
    zeros = json.loads((tmp_path / "out/aerogel.json").read_text())["coverage"]["zeros"]
    assert result.facts["coverage"]["zeros"] == zeros
    layers = {name: part for name, part in aerogel.load(tmp_path / "out", lazy=False).module.named_modules() if name in zeros}
    assert len(layers) == len(zeros) == 2 * 7
    for name, layer in layers.items():
        weight = layer.dequantized(torch.float32) if isinstance(layer, QuantLinear) else layer.weight
        assert zeros[name] == zero_share(weight)  # type: ignore[arg-type]
        assert zeros[name] >= 0.5
    assert (max(zeros.values()) > 0.5) == (scheme == "W2A16_G32")  # small weights are rounded to zero


def test_weights_that_become_zero_in_the_stored_dtype_count(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.get_submodule(UP).weight[:64] *= 1e-12
        recipe = {"steps": [{"magnitude": {"sparsity": 0.25, "compared": "row"}}]}
        network = aerogel.load(model)
        network.stored_dtype = torch.float16
        aerogel.compress(network, recipe, output=tmp_path / "out", measures=())
    found = files.read(tmp_path / "out").coverage
    assert found is not None
    assert found.zeros[UP] == zero_share(load_file(tmp_path / "out/model.safetensors")[f"{UP}.weight"]) == 0.625


def test_reports_tell_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = aerogel.compress(FAMILIES["llama"].build(), {"steps": [HALF]}, output=tmp_path / "out", measures=())
    said = "14 layers are pruned: 50.0 % of their weights are zero as they are stored"
    print_coverage(result.facts["coverage"])
    assert said in capsys.readouterr().out.replace("\u00a0", " ").replace("\u202f", " ")
    assert said in page.render(tmp_path / "out").replace("\u00a0", " ").replace("\u202f", " ")
    plain = aerogel.compress(FAMILIES["llama"].build(), {"steps": [{"rtn": {"scheme": "W8A8"}}]}, measures=())
    print_coverage(plain.facts["coverage"])
    assert "pruned" not in capsys.readouterr().out
