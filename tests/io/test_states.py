"""Runtime policies on disk: what a folder holds of them without its record is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aerogel.errors import AerogelError
from aerogel.io import states


@pytest.mark.parametrize("file", states.FILES)
def test_tensors_without_a_record_are_refused(file: str, tmp_path: Path) -> None:
    assert list(states.stored(tmp_path)) == []
    (tmp_path / file).parent.mkdir(exist_ok=True)
    save_file({"0.threshold": torch.ones(1)}, tmp_path / file)
    with pytest.raises(AerogelError, match=rf"has runtime policies \({file}\) and no aerogel\.json that says which"):
        list(states.stored(tmp_path))
