"""Generation against transformers' own: the same tokens, by the fast decoder where the network has its shape and without it elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.inference.generate import Generator
from aerogel.inference.lm_head import Head
from aerogel.kernels import linear as kernels
from aerogel.layers.linear import QuantLinear, stored_grid
from aerogel.model.network import Network
from aerogel.numerics.quantize import quantize, weight_grid
from aerogel.numerics.scheme import Scheme
from tests.tiny import opened

NEW = 12


def prompt(rows: int = 1, length: int = 9) -> Tensor:
    return torch.randint(3, 112, (rows, length), generator=torch.Generator().manual_seed(5))


def theirs(network: Network, tokens_BT: Tensor, count: int = NEW, stop: int | None = None) -> Tensor:
    made = network.module.generate(
        tokens_BT, attention_mask=torch.ones_like(tokens_BT), max_new_tokens=count, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    return made[:, tokens_BT.shape[1] :]


def quantized(network: Network, preset: str) -> Network:
    scheme = Scheme.parse(preset)
    for name, linear in list(network.module.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            grid = stored_grid(weight_grid(linear.weight, scheme.weights), linear.weight.dtype)
            made = QuantLinear.from_codes(linear, scheme, quantize(linear.weight, grid, scheme.weights), grid)
            parent, _, child = name.rpartition(".")
            setattr(network.module.get_submodule(parent), child, made)
    return network


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("rows", [1, 3])
def test_fast_tokens_are_those_of_transformers(family: str, rows: int) -> None:
    network = opened(family)
    generator = Generator(network, rows, 32)
    wanted = theirs(network, prompt(rows))
    for _ in range(2):  # the second time with packed weights and a used cache
        made = generator.generate(prompt(rows), NEW)
        assert (made.path, made.reason) == ("fast_decoder", None)
        assert torch.equal(made.tokens, wanted)
    assert len(made.step_seconds) == NEW - 1


@pytest.mark.parametrize("preset", ["W4A16_G32", "W4A16_G32_ASYM", "W3A16_CHANNEL", "W8A16_G32", "W8A8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_quantized_networks_make_the_same_tokens_too(family: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first kernel that is able, so that packing is tested, whichever is fastest on tiny shapes."""
    monkeypatch.setattr(kernels, "choose", lambda x_TI, weight, cache: kernels.candidates(weight, x_TI.device, x_TI.dtype)[0])
    network = quantized(opened(family), preset)
    made = Generator(network, 1, 32).generate(prompt(), NEW)
    assert (made.path, made.reason) == ("fast_decoder", None)
    assert torch.equal(made.tokens, theirs(network, prompt()))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mistral", "window of 8"),
        ("smollm3", "does more than its parts say"),
        ("gemma2", "other parts"),
        ("mixtral", "other parts"),
        ("opt", "has no embed_tokens"),
    ],
)
def test_other_shapes_take_their_own_forward_and_say_why(family: str, reason: str) -> None:
    network = opened(family)
    made = Generator(network, 2, 32).generate(prompt(2), NEW)
    assert made.path == "transformers"
    assert reason in str(made.reason)
    assert torch.equal(made.tokens, theirs(network, prompt(2)))


def test_what_hangs_on_a_forward_is_called() -> None:
    network = opened("llama")
    hook = network.module.model.layers[1].register_forward_hook(lambda module, args, out: out * 1.01)
    made = Generator(network, 1, 32).generate(prompt(), NEW)
    assert made.path == "transformers"
    assert "hangs on its forward" in str(made.reason)
    hook.remove()
    assert Generator(network, 1, 32).generate(prompt(), NEW).path == "fast_decoder"


def test_a_window_longer_than_the_text_does_no_harm() -> None:
    network = opened("mistral")
    made = Generator(network, 1, 8).generate(prompt(length=4), 4)
    assert made.path == "fast_decoder"
    assert torch.equal(made.tokens, theirs(network, prompt(length=4), 4))


@pytest.mark.parametrize("fast", [True, False])
def test_it_stops_when_every_row_has_met_a_stop_token(fast: bool) -> None:
    network = opened("llama")
    free = theirs(network, prompt(2))
    stop = int(free[0, 3])
    made = Generator(network, 2, 32, fast_decoder=fast).generate(prompt(2), NEW, stop=frozenset({stop}))
    ends = [row.tolist().index(stop) if stop in row else NEW - 1 for row in free]
    assert made.tokens.shape[1] == max(ends) + 1
    for row, wanted, end in zip(made.tokens, free, ends, strict=True):
        assert torch.equal(row[: end + 1], wanted[: end + 1])
        assert (row[end:] == row[end]).all()


def test_samples_follow_the_seed_and_the_temperature() -> None:
    generator = Generator(opened("llama"), 1, 40)
    first, again, other = (generator.generate(prompt(), 24, temperature=1.5, seed=seed).tokens for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    cold = generator.generate(prompt(), 24, temperature=1e-4, seed=3).tokens
    assert torch.equal(cold, generator.generate(prompt(), 24).tokens)


def test_what_does_not_fit_is_refused() -> None:
    generator = Generator(opened("llama"), 1, 16)
    with pytest.raises(AerogelError, match=r"shape \(1, 9\) and 8 new tokens do not fit a generator of 1 rows and 16 tokens"):
        generator.generate(prompt(), 8)
    with pytest.raises(AerogelError, match="no causal language model"):
        Generator(opened("dit"), 1, 16)


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_the_screened_head_finds_the_token_of_all_logits(spread: float) -> None:
    """Also where many tokens are close: rows of the weight that differ by one part in a hundred."""
    make = torch.Generator().manual_seed(0)
    linear = nn.Linear(96, 512, bias=False)
    linear.weight.data = torch.randn(1, 96, generator=make) + spread * torch.randn(512, 96, generator=make)
    head = Head(linear)
    assert head.screens
    for _ in range(50):
        x_BC = torch.randn(1, 96, generator=make) * torch.logspace(-2, 2, 96)
        assert torch.equal(head.best(x_BC), linear(x_BC).argmax(-1))


@pytest.mark.quality
def test_a_real_model_in_four_bits_makes_the_tokens_of_transformers() -> None:
    from aerogel.engine.opening import open_model

    network = quantized(open_model("smollm2-135m", lazy=False), "W4A16_G64")
    network.module.float()
    for text in ("The history of the American presidency begins with", "def fibonacci(n):"):
        tokens_BT = torch.tensor([network.processor(text).input_ids])
        made = Generator(network, 1, 64).generate(tokens_BT, 6)
        assert made.path == "fast_decoder"
        assert torch.equal(made.tokens, theirs(network, tokens_BT, 6))
