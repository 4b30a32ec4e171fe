"""Inner blocks that rest: outer ones read what these gave last, skipped blocks really do not run, streams and runs stay apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.skip_connections import SkipState, caching_inner_blocks, inner, skip_state
from tests.runtime.feature_cache.test_schedule import STEPS
from tests.tiny import FAMILIES, VARIANTS, fill, opened, output


def _stable(**options: Any) -> nn.Module:
    """The shape of Stable Diffusion 1 with three levels for four."""
    shape: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (32, 32, 64), "layers_per_block": 2, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32, "attention_head_dim": 4,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**shape | options)


def _large(**options: Any) -> nn.Module:
    """The shape of SDXL with two levels for three."""
    return _stable(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, **options,
    )  # fmt: skip


MADE: dict[str, Callable[[], nn.Module]] = {
    "stable": _stable,
    "large": _large,
    "no middle": partial(_stable, mid_block_type=None),
}


def made(name: str) -> Network:
    if name not in MADE:
        return opened(name)
    torch.manual_seed(0)
    module = MADE[name]().float().eval()
    fill(module, torch.Generator().manual_seed(0))
    return Network(module.requires_grad_(False), catalog.find("families", "unet"))


def calls(name: str, seed: int = 0, steps: Sequence[float] = STEPS) -> list[Call]:
    """One generation: all samples of a call are at one step."""
    given = (FAMILIES | VARIANTS).get(name, FAMILIES["unet"]).calls(len(steps) + seed)[seed:]
    more = {"added_cond_kwargs": {"text_embeds": torch.ones(2, 16), "time_ids": torch.arange(12.0).view(2, 6)}} if name == "large" else {}
    return [
        Call((), call.kwargs | more | {"timestep": torch.full_like(call.kwargs["timestep"], int(step))})
        for call, step in zip(given, steps, strict=True)
    ]


def state_of(network: Network, name: str, branch: int, whole: str) -> SkipState:
    return skip_state(network, Trajectories.of(network, calls(name)), branch, whole)


OUTER: dict[tuple[str, int], tuple[str, int, tuple[str, ...]]] = {
    ("unet", 0): ("up_blocks.1.resnets.1", 32, ()),
    ("unet", 1): ("up_blocks.1.resnets.0", 32, ("down_blocks.0.resnets.0", "up_blocks.1.resnets.1")),
    ("unet", 2): (
        "up_blocks.0.resnets.1", 32,
        ("down_blocks.0.", "up_blocks.0.attentions.1", "up_blocks.0.upsamplers.0", "up_blocks.1."),
    ),
    ("unet", 3): ("up_blocks.0.resnets.0", 64, ("down_blocks.", "up_blocks.")),
    ("unet_pixels", 0): ("up_blocks.1.resnets.1", 32, ()),
    ("unet_pixels", 2): (
        "up_blocks.0.resnets.1", 32,
        ("down_blocks.0.", "up_blocks.0.attentions.1", "up_blocks.0.upsamplers.0", "up_blocks.1."),
    ),
    ("stable", 0): ("up_blocks.2.resnets.2", 32, ("up_blocks.2.attentions.2",)),
    ("stable", 2): ("up_blocks.2.resnets.0", 32, ("down_blocks.0.resnets", "down_blocks.0.attentions", "up_blocks.2.")),
    ("stable", 4): (
        "up_blocks.1.resnets.1", 32,
        ("down_blocks.0.", "down_blocks.1.resnets.0", "down_blocks.1.attentions.0", "up_blocks.1.attentions.1", "up_blocks.1.resnets.2",
         "up_blocks.1.attentions.2", "up_blocks.1.upsamplers.0", "up_blocks.2."),
    ),
    ("large", 0): ("up_blocks.1.resnets.2", 32, ()),
    ("large", 3): (
        "up_blocks.0.resnets.2", 32, ("down_blocks.0.", "up_blocks.0.attentions.2", "up_blocks.0.upsamplers.0", "up_blocks.1.")
    ),
    ("no middle", 0): ("up_blocks.2.resnets.2", 32, ("up_blocks.2.attentions.2",)),
    ("no middle", 7): (
        "up_blocks.0.resnets.1", 64, ("down_blocks.0.", "down_blocks.1.", "down_blocks.2.resnets.0", "up_blocks.0.resnets.2",
                                      "up_blocks.0.upsamplers.0", "up_blocks.1.", "up_blocks.2."),
    ),
}  # fmt: skip
"""For a network and a branch: the block that reads the skip, the channels of it, and where blocks run at all steps beside that one."""

EVERY = pytest.mark.parametrize(("name", "branch"), list(OUTER), ids=lambda value: str(value))


def literal(network: Network, given: Sequence[Call], whole: str, reader: str, skip: int) -> list[Tensor]:
    """All blocks run always; at steps that reuse the reader gets, beside the skip, what it got when all blocks ran last."""
    kept: list[Tensor] = []
    row = 0

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if whole[row] == "1":
            kept[:] = [x[:, :-skip]]
        return (torch.cat([kept[0], x[:, -skip:]], dim=1), *args[1:])

    hook = network.module.get_submodule(reader).register_forward_pre_hook(enter)
    answers = []
    for call in given:
        answers.append(output(network.module, call))
        row += 1
    hook.remove()
    return answers


@contextmanager
def leaves(network: Network) -> Iterator[set[str]]:
    """Grows by the modules without parts that run."""
    ran: set[str] = set()
    parts = {name: part for name, part in network.module.named_modules() if not list(part.children())}
    hooks = [part.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, part in parts.items()]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def equal(answers: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(answers, wanted, strict=True))


@EVERY
def test_answers_are_those_of_hooks_that_set_the_feature(name: str, branch: int) -> None:
    """And skipped blocks do not run, whatever part of them one looks at."""
    network = made(name)
    reader, skip, outer = OUTER[name, branch]
    wanted = literal(network, calls(name), "1001", reader, skip)
    state = state_of(network, name, branch, "1001")
    blocks = tuple(f"{block}." for block in network.blocks())
    with leaves(network) as ran:
        plain = [output(network.module, call) for call in calls(name)]
        every = set(ran)
        awake = {part for part in every if not part.startswith(blocks) or part.startswith((f"{reader}.", *outer))}
        with caching_inner_blocks(network, state) as by:
            for row, call in enumerate(calls(name)):
                ran.clear()
                assert torch.equal(output(network.module, call), wanted[row])
                assert ran == (every if row in (0, 3) else awake)
    assert by.decisions == [(0, True), (1, False), (2, False), (3, True)]
    assert 0 < len(awake) < len(every)
    assert [torch.equal(a, b) for a, b in zip(plain, wanted, strict=True)] == [True, False, False, True]


@pytest.mark.parametrize("whole", ["1111", "1110", "1010"])
def test_one_feature_is_kept_while_somebody_wants_it(whole: str) -> None:
    network = made("unet")
    reader, skip, _ = OUTER["unet", 1]
    wanted = literal(network, calls("unet"), whole, reader, skip)
    with caching_inner_blocks(network, state_of(network, "unet", 1, whole)) as by:
        assert equal([output(network.module, call) for call in calls("unet")], wanted)
    assert by.peak_bytes == ("0" in whole) * 2 * 64 * 8 * 8 * 4


@pytest.mark.parametrize("name", ["unet", "unet_pixels", "stable"])
def test_what_goes_on_comes_off(name: str) -> None:
    network = made(name)
    wanted = [output(network.module, call) for call in calls(name)]
    before = {part: set(module.__dict__) for part, module in network.module.named_modules()}
    weights = {key: value.clone() for key, value in network.module.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.module.modules()]
    with caching_inner_blocks(network, state_of(network, name, 1, "1000")):
        assert not equal([output(network.module, call) for call in calls(name)], wanted)
    assert {part: set(module.__dict__) for part, module in network.module.named_modules()} == before
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.module.modules()]
    assert all(torch.equal(value, weights[key]) for key, value in network.module.state_dict().items())
    assert equal([output(network.module, call) for call in calls(name)], wanted)


def test_runs_and_branches_of_guidance_do_not_see_each_other() -> None:
    network = made("unet")
    state = state_of(network, "unet", 1, "1001")
    alone = []
    for seed in (0, 4):
        with caching_inner_blocks(network, state):
            alone.append([output(network.module, call) for call in calls("unet", seed)])
    with caching_inner_blocks(network, state) as by:
        for seed, wanted in zip((0, 4), alone, strict=True):
            assert equal([output(network.module, call) for call in calls("unet", seed)], wanted)
            for call in calls("unet")[:2]:  # given up
                output(network.module, call)
        one = by.peak_bytes
        by.reset()
        for first, second, *wanted in zip(calls("unet"), calls("unet", 4), *alone, strict=True):
            assert equal([output(network.module, first), output(network.module, second)], wanted)
        assert by.peak_bytes == 2 * one


def test_another_shape_in_the_middle_of_a_run_runs_all_blocks() -> None:
    network = made("unet")
    state = state_of(network, "unet", 0, "1000")
    single = [Call((), {key: value[:1] for key, value in call.kwargs.items()}) for call in calls("unet")]
    wanted = output(network.module, single[1])
    with caching_inner_blocks(network, state) as by:
        output(network.module, calls("unet")[0])
        assert torch.equal(output(network.module, single[1]), wanted)
        output(network.module, single[2])
    assert by.decisions == [(0, True), (1, True), (2, False)]


def test_a_failure_leaves_nothing_behind() -> None:
    network = made("unet")
    with caching_inner_blocks(network, state_of(network, "unet", 1, "1000")) as by:
        wanted = [output(network.module, call) for call in calls("unet")]
        output(network.module, calls("unet", 4)[0])
        wrong = Call((), calls("unet", 4)[1].kwargs | {"sample": torch.zeros(2, 5, 8, 8)})
        with pytest.raises(RuntimeError):
            output(network.module, wrong)
        block = network.blocks()["down_blocks.1.resnets.0"]
        assert block(torch.zeros(1, 32, 4, 4), torch.zeros(1, 128)).shape == (1, 64, 4, 4), "a block by itself runs"
        assert equal([output(network.module, call) for call in calls("unet")], wanted)
    assert [whole for _, whole in by.decisions] == [True, False, False, False, True, True, False, False, False]


@pytest.mark.parametrize(("branch", "last"), [(0, 3), (3, 3)])
def test_skips_are_counted_from_the_outermost(branch: int, last: int) -> None:
    network = made("unet")
    found = inner(network, calls("unet")[0], branch)
    assert (found[0], found[-1]) == {
        0: ("down_blocks.0.resnets.0", "up_blocks.1.resnets.0"),
        3: ("mid_block.resnets.0", "mid_block.resnets.1"),
    }[branch]
    for wrong in (-1, last + 1):
        with pytest.raises(AerogelError, match=f"branch {wrong} is none of this denoiser's {last + 1} skip connections"):
            inner(network, calls("unet")[0], wrong)
    with pytest.raises(AerogelError, match="none of this denoiser's 8 skip connections"):
        inner(made("no middle"), calls("no middle")[0], 8)


@pytest.mark.parametrize("name", ["dit", "pixart", "wan"])
def test_denoisers_without_skips_are_refused(name: str) -> None:
    with pytest.raises(AerogelError, match=f"the {name} family names no skip connections"):
        skip_state(opened(name), Trajectories.of(opened(name), calls(name)), 0, "1000")


def test_blocks_that_others_read_too_are_refused() -> None:
    """A second row of images beside the blocks, and residuals that a ControlNet adds."""
    module = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=16,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"), up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )  # fmt: skip
    other = Network(module.eval(), catalog.find("families", "unet"))
    with pytest.raises(AerogelError, match="the denoiser reads more of them than what the last gives"):
        skip_state(other, Trajectories.of(other, calls("unet_pixels")), 0, "1000")
    network = made("unet")
    residuals = tuple(torch.ones(2, width, size, size) for width, size in ((32, 8), (32, 8), (32, 4), (64, 4)))
    controlled = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": torch.ones(2, 64, 4, 4)}
    with pytest.raises(AerogelError, match="residuals of a ControlNet"):
        skip_state(network, Trajectories.of(network, [Call((), call.kwargs | controlled) for call in calls("unet")]), 0, "1000")


def test_states_of_other_networks_are_refused() -> None:
    state = state_of(made("unet"), "unet", 0, "1000")
    with (
        pytest.raises(AerogelError, match=r"made for 14 blocks, this denoiser has \d+; .* is none of them"),
        caching_inner_blocks(made("stable"), state),
    ):
        pass
    with (
        pytest.raises(AerogelError, match=r"made for 15 blocks, this denoiser has 14$"),
        caching_inner_blocks(made("unet"), replace(state, blocks=15)),
    ):
        pass


def test_residuals_of_a_controlnet_are_refused() -> None:
    network = opened("unet")
    (call,) = FAMILIES["unet"].calls(1)
    call = Call((), call.kwargs | {"timestep": torch.tensor(900)})
    given = Call((), call.kwargs | {"mid_block_additional_residual": torch.zeros(2, 64, 4, 4)})
    state = skip_state(network, Trajectories.of(network, [call, call]), 0, "10")
    message = "residuals of a ControlNet .*this call brings mid_block_additional_residual"
    with caching_inner_blocks(network, state), pytest.raises(AerogelError, match=message):
        network.run(given)
    with pytest.raises(AerogelError, match=message):
        skip_state(network, Trajectories.of(network, [given, given]), 0, "10")
