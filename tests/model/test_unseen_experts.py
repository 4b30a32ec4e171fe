"""Static input ranges of experts that no token reached are those of the experts beside them."""

from __future__ import annotations

import pytest
import torch

import aerogel
from aerogel.layers.linear import QuantLinear
from aerogel.model.calls import Call
from tests.tiny import FAMILIES


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "W8A8_AFFINE"])
@pytest.mark.filterwarnings("ignore:.*no token reached it")
def test_they_cover_what_the_others_read(method: str, scheme: str) -> None:
    """One token goes to two of four experts."""
    call = Call((), {"input_ids": torch.tensor([[5]]), "use_cache": False})
    result = aerogel.compress(FAMILIES["qwen3_moe"].build(), {"steps": [{method: {"scheme": scheme}}]}, samples=[call], measures=())
    unseen = {note["name"] for note in result.journal if "no token" in str(note.get("fallback")) and ".experts." in note["name"]}
    assert len(unseen) == 2 * 2 * 3
    layers = {name: part for name, part in result.network.module.named_modules() if isinstance(part, QuantLinear)}
    for name in unseen:
        start, _, rest = name.partition(".experts.")
        projection = rest.partition(".")[2]
        others = [f"{start}.experts.{number}.{projection}" for number in range(4)]
        seen = [layers[other] for other in others if other not in unseen]
        widest = max(float(layer.input_scale) for layer in seen)
        assert float(layers[name].input_scale) >= widest * 0.999
        low, high = ends(layers[name])
        assert low <= min(ends(layer)[0] for layer in seen) + 0.51 * float(layers[name].input_scale)
        assert high >= max(ends(layer)[1] for layer in seen) - 0.51 * float(layers[name].input_scale)
        assert float(layers[name].input_scale) < 4 * widest


def ends(layer: QuantLinear) -> tuple[float, float]:
    zero = 0 if "input_zero_point" not in dict(layer.named_buffers()) else int(layer.input_zero_point)
    scale = float(layer.input_scale)
    return (-128 - zero) * scale, (127 - zero) * scale
