"""The model card: its metadata, and the code that opens the folder."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import yaml

from aerogel.io.record.schema import Record
from aerogel.report.card import LIBRARIES, card

RUN: dict[str, Any] = {
    "model": {"name": "model"},
    "recipe": {"name": "mine", "steps": [{"smoothquant": {}}, {"rtn": {"scheme": "W8A8"}}]},
    "provenance": {"seed": 0, "versions": {"aerogel": "1.0"}, "calibration": {"source": "/home/me/my.txt", "count": 8, "length": 64}},
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("modality", ["text", "image-text", "image"])
def test_every_card_is_complete(library: str, modality: str) -> None:
    text = card(Record.model_validate(RUN), "me/mine", library, modality)
    header = yaml.safe_load(text.split("---\n")[1])
    assert header == {"library_name": library, "tags": ["aerogel", "smoothquant", "rtn"]}
    code = text.split("```python\n")[1].split("```")[0]
    ast.parse(code)
    assert '("me/mine")' in code
    assert "calibrated on my.txt (8 x 64), seed 0" in text, "paths of this machine stay here"
    assert "| original |" not in text, "nothing was measured"


def test_vision_language_models_open_as_such() -> None:
    assert "AutoModelForImageTextToText" in card(Record.model_validate(RUN), "me/mine", "transformers", "image-text")
