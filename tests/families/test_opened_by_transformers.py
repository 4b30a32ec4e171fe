"""What is saved of each family opens in plain transformers and gives the logits that are in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import aerogel
from aerogel import catalog
from aerogel.layers.linear import cache_dequantized
from aerogel.model.structure.moe import routed_experts
from tests.releases import DENSE
from tests.tiny import FAMILIES, output

IMAGE_TEXT = {"internvl", "llava", "qwen2_5_vl"}
# Their checkpoints hold fused experts, and transformers 5.23 has no converter from experts one by one, as codes lie.
FUSED = {"gpt_oss", "qwen3_vl_moe"}
LANGUAGE = sorted(name for name, tiny in FAMILIES.items() if tiny.family not in catalog.names("families") and name not in FUSED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LANGUAGE)
def test_transformers_gives_our_logits(name: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    # transformers 5.23 puts experts together from symmetric codes only: its converter leaves zero points behind.
    scheme = "W4A16_G32" if DENSE or routed_experts(tiny.build()) else "W4A16_G32_ASYM"
    recipe = {"name": "four-bits", "steps": [{"rtn": {"scheme": scheme}}]}
    result = aerogel.compress(tiny.build(), recipe, samples=tiny.calls(1), output=tmp_path / "out", measures=())
    kind = transformers.AutoModelForImageTextToText if name in IMAGE_TEXT else transformers.AutoModelForCausalLM
    theirs, loading = kind.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    with cache_dequantized(result.network.module):  # the float weights, without a kernel's own rounding
        for call in tiny.calls(3):
            expected = output(result.network.module, call)
            torch.testing.assert_close(output(theirs.eval(), call), expected, rtol=0, atol=1e-5)
