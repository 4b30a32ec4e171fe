"""AttentionQuant of attention: found in every network, rounded as a literal formula says, taken off again, kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import aerogel
from aerogel.engine import policies
from aerogel.errors import AerogelError
from aerogel.methods.quantization.attention_quant import AttentionQuant
from aerogel.model.network import Network
from aerogel.runtime.attention import attending, attentions
from tests.tiny import FAMILIES, output


@pytest.mark.parametrize(
    ("family", "count"),
    [("unet", None), ("dit", 2), ("pixart", 4), ("llama", None), ("wan", None), ("sd3", 3), ("flux", 3), ("cogvideox", 2)],
)
def test_attentions_are_found_and_answered_in_each(family: str, count: int | None) -> None:
    tiny = FAMILIES[family]
    network, (call,) = aerogel.load(tiny.build()), tiny.calls(1)
    names = attentions(network, call)
    assert names
    assert count is None or len(names) == count
    reached: list[str] = []
    plain = output(network.module, call)

    def attend(name: str):
        def answer(*args, **kwargs):
            reached.append(name)
            return scaled_dot_product_attention(*args, **kwargs)

        return answer

    with attending(network, names, attend):
        assert torch.equal(output(network.module, call), plain)
    assert reached == list(names)
    assert all("forward" not in vars(module) for module in network.module.modules())


def literal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grids: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    def affine(x: torch.Tensor, operand: str) -> torch.Tensor:
        scale, zero = float(grids[f"{name}.{operand}"]), int(grids[f"{name}.{operand}_zero_point"])
        return ((x / scale + zero).clamp(-128, 127).round() - zero) * scale

    step = float(grids[f"{name}.probabilities"])
    p = (affine(q, "query") @ affine(k, "key").mT / q.shape[-1] ** 0.5).softmax(-1)
    return (p / step).round().clamp(0, 255) * step @ affine(v, "value")


def test_operands_are_rounded_as_the_formula_says() -> None:
    tiny = FAMILIES["dit"]
    network, calls = aerogel.load(tiny.build()), tiny.calls(2)
    policy = AttentionQuant()
    state = policy.calibrate(network, calls)
    (first, *_) = state.attentions
    caught: list[tuple[torch.Tensor, ...]] = []

    def attend(name: str):
        def answer(q, k, v, **_):
            caught.append((q, k, v))
            return scaled_dot_product_attention(q, k, v)

        return answer

    with attending(network, [first], attend):
        plain = output(network.module, calls[0])
    own = policy.attend(state.grids, state.grids, first)(*caught[0])
    torch.testing.assert_close(own, literal(*caught[0], state.grids, first), rtol=1e-4, atol=1e-5)
    with policy.on(network, state):
        changed = output(network.module, calls[0])
    relative = float((changed - plain).square().mean() / plain.square().mean())
    assert 0 < relative < 1e-3
    assert torch.equal(output(network.module, calls[0]), plain)


def test_fewer_bits_are_worse_and_widths_are_separate() -> None:
    tiny = FAMILIES["dit"]
    network, calls = aerogel.load(tiny.build()), tiny.calls(2)
    plain = output(network.module, calls[0])

    def error(policy: AttentionQuant) -> float:
        with policy.on(network, policy.calibrate(network, calls)):
            return float((output(network.module, calls[0]) - plain).square().mean())

    assert error(AttentionQuant(bits=4)) > error(AttentionQuant(bits=8)) > error(AttentionQuant(bits=8, probability_bits=16)) > 0
    assert error(AttentionQuant(probability_bits=3)) > error(AttentionQuant())


def test_a_folder_keeps_them(tmp_path: Path) -> None:
    tiny = FAMILIES["pixart"]
    calls = tiny.calls(2)
    recipe = {"steps": [{"rtn": {"scheme": "W8A16_CHANNEL"}}, {"attention_quant": {"ignore": ["*attn2"]}}]}
    result = aerogel.compress(tiny.build(), recipe, samples=calls, measures=(), output=tmp_path / "out")
    (measured,) = result.policies
    assert measured.state.attentions
    assert not any("attn2" in name for name in measured.state.attentions)
    reopened = aerogel.load(tmp_path / "out")
    with policies.on(result.network, result.policies):
        torch.testing.assert_close(output(reopened.module, calls[0]), output(result.network.module, calls[0]), rtol=0, atol=0)


def test_what_cannot_be_done_is_refused() -> None:
    tiny = FAMILIES["dit"]
    network: Network = aerogel.load(tiny.build())
    with pytest.raises(AerogelError, match="ignored"):
        AttentionQuant(ignore=("*",)).calibrate(network, tiny.calls(1))
    with pytest.raises(AerogelError, match="option 'bits': expected a number from 2 to 8"):
        AttentionQuant(bits=9)
