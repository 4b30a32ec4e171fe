"""A head that shares its weight with the embeddings: once it is quantized the configuration says that they no longer are one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import aerogel
from tests.tiny import FAMILIES


@pytest.mark.parametrize("live", [True, False])
def test_a_quantized_head_is_untied(live: bool, tmp_path: Path) -> None:
    tiny = FAMILIES["qwen2"]
    tiny.build().save_pretrained(tmp_path / "source")
    source = tiny.build() if live else tmp_path / "source"
    result = aerogel.compress(source, {"steps": [{"rtn": {"scheme": "W4A16_G16", "ignore": []}}]}, output=tmp_path / "out", measures=())
    assert json.loads((tmp_path / "source" / "config.json").read_text())["tie_word_embeddings"] is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    call = tiny.calls(1)[0]
    expected = aerogel.load(tmp_path / "out", lazy=False).run(call).logits
    assert torch.equal(result.network.run(call).logits, expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs(**call.kwargs).logits, expected)


def test_a_head_that_is_not_quantized_stays_tied(tmp_path: Path) -> None:
    FAMILIES["qwen2"].build().save_pretrained(tmp_path / "source")
    aerogel.compress(tmp_path / "source", {"steps": [{"rtn": {"scheme": "W4A16_G16"}}]}, output=tmp_path / "out", measures=())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
