"""Splitting at the seam: found where channels are concatenated, the same function, ranges apart, and back from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import aerogel
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear
from aerogel.layers.split import Split
from aerogel.model.network import Network
from aerogel.model.seams import seams
from tests.methods.diffusion.test_fsc import calls
from tests.tiny import FAMILIES, output

STEPS = [
    {"split_shortcut": {}},
    {"brecq": {"scheme": "W4A16_CHANNEL_ASYM", "steps": 10, "batch": 4}},
    {"activation_ranges": {"steps": 0, "start": "minmax"}},
]


def compressed(steps: list[dict[str, object]] = STEPS, **options: object) -> Network:
    return aerogel.compress(FAMILIES["unet"].build(), {"steps": steps}, samples=calls(), measures=(), **options).network  # type: ignore[arg-type]


def test_seams_are_the_shortcuts_of_the_way_up() -> None:
    network = aerogel.load(FAMILIES["unet"].build())
    found = seams(network, calls()[0])
    shortcuts = [name for name, _ in network.module.named_modules() if name.startswith("up_blocks") and name.endswith("conv_shortcut")]
    assert sorted(found) == sorted(shortcuts)
    for name, widths in found.items():
        assert len(widths) == 2
        assert sum(widths) == network.module.get_submodule(name).in_channels


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 4, 3, padding=1, stride=2), nn.Linear(6, 4, bias=False)])
def test_the_sum_of_parts_is_the_layer(layer: nn.Conv2d | nn.Linear) -> None:
    x = torch.randn(2, 6, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(2, 5, 6)
    made = Split(layer, [2, 4])
    torch.testing.assert_close(made(x), layer(x))
    assert list(made.state_dict()) == ["0.weight", *(["0.bias"] if layer.bias is not None else []), "1.weight"]


def test_each_part_has_ranges_of_its_own() -> None:
    network = compressed()
    parts = [part for part in network.module.modules() if isinstance(part, Split)]
    assert parts
    for part in parts:
        first, second = part.children()
        assert isinstance(first, QuantLinear)
        assert isinstance(second, QuantLinear)
        scales = [layer.input_grid() for layer in (first, second)]
        assert scales[0] is not None
        assert scales[1] is not None
        assert scales[0].scale != scales[1].scale
        assert not torch.equal(first.grid().scale, second.grid().scale)


@pytest.mark.slow
def test_a_folder_opens_split(tmp_path: Path) -> None:
    network = compressed(output=tmp_path / "live")
    FAMILIES["unet"].build().save_pretrained(tmp_path / "source")
    aerogel.compress(tmp_path / "source", {"steps": STEPS}, samples=calls(), measures=(), output=tmp_path / "lazy")
    for folder in ("live", "lazy"):
        reopened = aerogel.load(tmp_path / folder, lazy=False)
        for call in calls():
            assert torch.equal(output(reopened.module, call), output(network.module, call)), folder


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(AerogelError, match="no float layer of this dit model reads concatenated channels"):
        aerogel.compress(FAMILIES["dit"].build(), {"steps": [{"split_shortcut": {}}]}, samples=FAMILIES["dit"].calls(1), measures=())
    with pytest.raises(AerogelError, match="groups"):
        Split(nn.Conv2d(4, 4, 1, groups=2), [2, 2])
    with pytest.raises(AerogelError, match="cannot be split at"):
        Split.rebuild(nn.Linear(4, 4), {"widths": [1, 1]}, None)
