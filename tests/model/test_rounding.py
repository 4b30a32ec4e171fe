"""The relative output error is that of all outputs, however the products are cut into panels and whatever the weight's dtype."""

from __future__ import annotations

import pytest
import torch

from aerogel.model import rounding
from aerogel.model.rounding import output_error, relative_error


@pytest.mark.parametrize("panel", [7, 16, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relative_error_is_that_of_the_outputs(panel: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_PANEL", panel)
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(200, 40, generator=generator) @ torch.randn(40, 40, generator=generator) + 1
    weight_OI, error_OI = torch.randn(6, 40, generator=generator).to(dtype), 0.1 * torch.randn(6, 40, generator=generator)
    loss = (x_TI @ error_OI.T).square().sum()
    expected = float(loss / (x_TI @ weight_OI.float().T).square().sum())
    moment_II = x_TI.T @ x_TI / len(x_TI)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert output_error(error_OI, weight_OI, moment_II) == pytest.approx(expected, rel=tolerance)
    assert relative_error(float(loss) / len(x_TI), weight_OI, moment_II) == pytest.approx(expected, rel=tolerance)


def test_without_inputs_the_weight_counts_and_nothing_of_nothing_is_no_error() -> None:
    weight_OI = torch.tensor([[3.0, 4.0]])
    assert output_error(torch.tensor([[0.0, 1.0]]), weight_OI, None) == pytest.approx(1 / 25)
    assert output_error(torch.ones(1, 2), torch.zeros(1, 2), torch.eye(2)) == 0.0
