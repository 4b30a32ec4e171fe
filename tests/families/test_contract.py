"""What every family promises: its blocks are walked as in a plain forward, its edges are edges, no linear is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel import catalog
from aerogel.engine.opening import open_model
from aerogel.model.block import Block
from aerogel.model.calls import Call, record, tensors_in
from aerogel.model.edges import Edge, fold
from aerogel.model.network import Network
from aerogel.model.walk import Walk
from tests.tiny import FAMILIES, VARIANTS, family_of, opened, output

TINY = FAMILIES | VARIANTS
EVERY = pytest.mark.parametrize("name", sorted(TINY))

# LLaVA reads the image features before the encoder's last block, so nothing that happens in that block is ever seen.
UNREAD = {"model.vision_tower.encoder.layers.2"}

# The share of the weights of linears in blocks, routers and experts included, that a method with default patterns reaches.
SHARE = dict.fromkeys(("qwen3_moe", "qwen3_moe_dense", "mixtral", "deepseek_v3", "gpt_oss", "internvl", "qwen3_vl_moe"), 0.995)


def blocks_of(network: Network) -> list[Block]:
    blocks = network.blocks()
    return [Block(name, module, place, len(blocks), (), network) for place, (name, module) in enumerate(blocks.items())]


def plain_calls(network: Network, calls: list[Call]) -> dict[str, list[Call]]:
    """What each block gets in plain forwards."""
    with torch.no_grad():
        runs: list[Callable[[], Any]] = [partial(network.module, *call.args, **call.kwargs) for call in calls]
        return {name: record(module, runs) for name, module in network.blocks().items()}


def execution_order(network: Network, call: Call) -> list[str]:
    order: list[str] = []
    with ExitStack() as stack:
        for name, module in network.blocks().items():
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: order.append(name)).remove)
        output(network.module, call)
    return order


def hooks_of(network: nn.Module) -> dict[str, list[int]]:
    """Numbers of all hooks by module; transformers puts some of its own on at the first forward."""
    return {name: [*module._forward_hooks, *module._forward_pre_hooks] for name, module in network.named_modules()}


def assert_same(ours: Call, theirs: Call) -> None:
    left, right = tensors_in((ours.args, ours.kwargs)), tensors_in((theirs.args, theirs.kwargs))
    assert len(left) == len(right) > 0
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert ours.kwargs.keys() == theirs.kwargs.keys()


@EVERY
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_blocks_get_the_tensors_of_a_plain_forward(name: str, on_disk: bool, tmp_path: Path) -> None:
    network, calls = opened(name), TINY[name].calls(3)
    expected = plain_calls(network, calls)
    visited = []
    for block in Walk(network, calls, folder=tmp_path if on_disk else None):
        visited.append(block.name)
        for ours, theirs in zip(block.calls, expected[block.name], strict=True):
            assert_same(ours, theirs)
    assert visited == execution_order(network, calls[0])
    assert sorted(visited) == sorted(network.blocks())


class OneAtATime:
    """Holds the weights of the block in hand and no other."""

    def __init__(self, network: Network) -> None:
        self._blocks, self._checkpoint = network.blocks(), network.checkpoint

    def enter(self, name: str) -> None:
        assert self._checkpoint is not None
        self._checkpoint.materialise(self._blocks[name], name)
        resident = [other for other, block in self._blocks.items() if not any(p.is_meta for p in block.parameters())]
        assert resident == [name]

    def release(self, name: str) -> None:
        assert self._checkpoint is not None
        self._checkpoint.release(self._blocks[name])


@pytest.mark.parametrize("name", [name for name in sorted(TINY) if TINY[name].family not in catalog.names("families")])
def test_one_block_in_memory_is_enough(name: str, tmp_path: Path) -> None:
    calls = TINY[name].calls(3)
    expected = plain_calls(opened(name), calls)
    TINY[name].build().save_pretrained(tmp_path)
    network = open_model(tmp_path)
    for block in Walk(network, calls, residency=OneAtATime(network)):
        for ours, theirs in zip(block.calls, expected[block.name], strict=True):
            assert_same(ours, theirs)


@EVERY
def test_a_walk_leaves_nothing_behind(name: str) -> None:
    network, calls = opened(name), TINY[name].calls(2)
    before = [output(network.module, call) for call in calls]
    hooks = hooks_of(network.module)
    for block in Walk(network, calls):
        for call in block.calls:
            block.run(call)
    assert hooks_of(network.module) == hooks
    assert not any("forward" in module.__dict__ for module in network.module.modules())
    for call, expected in zip(calls, before, strict=True):
        assert torch.equal(output(network.module, call), expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_text_alone_does_not_reach_the_vision_tower(name: str) -> None:
    network, calls = opened(name), TINY[name].calls(3)
    assert ["pixel_values" in call.kwargs for call in calls] == [True, True, False]
    vision = network.towers[0].name
    counts = {block.name: len(list(block.calls)) for block in Walk(network, calls)}
    assert counts == {block: 2 if block.startswith(vision) else 3 for block in network.blocks()}


@EVERY
def test_padded_rows_are_among_the_calls_of_language_models(name: str) -> None:
    masks = [call.kwargs["attention_mask"] for call in TINY[name].calls(2) if "attention_mask" in call.kwargs]
    language = family_of(name).modality in ("text", "image-text")
    assert [bool((mask == 0).any()) for mask in masks] == ([False, True] if language else [])


def scaled_by_hooks(block: Block, edge: Edge, scale_C: Tensor, stack: ExitStack, *, sinks: bool = True) -> None:
    """The definition of an edge: channels leave the sources times s and enter the sinks divided by s, column by column."""
    rows = sorted({int(row) for row in edge.rows_I if row >= 0})
    scale_of = {row: float(scale) for row, scale in zip(rows, scale_C, strict=True)}
    wide = torch.tensor([scale_of.get(int(row), 1.0) ** edge.power for row in edge.rows_I])

    def along(module: nn.Module, tensor: Tensor, values: Tensor) -> Tensor:
        dim = 1 if isinstance(module, nn.GroupNorm | nn.Conv2d) else tensor.ndim - 1
        return values.view([-1 if place == dim else 1 for place in range(tensor.ndim)])

    def multiply(module: nn.Module, _: Any, result: Tensor) -> Tensor:
        size = result.shape[1 if isinstance(module, nn.GroupNorm | nn.Conv2d) else -1]
        if edge.added_I is not None:
            return modulating_more(result)
        return result * along(module, result, torch.tensor([scale_of.get(row, 1.0) for row in range(size)]))

    def modulating_more(result: Tensor) -> Tensor:
        result = result.clone()
        for row, added in dict(zip(edge.rows_I.tolist(), edge.added_I.tolist(), strict=True)).items():  # type: ignore[union-attr]
            result[..., row] = (result[..., row] + edge.offset) * scale_of[row] - edge.offset
            result[..., added] *= scale_of[row]
        return result

    def divide(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] / along(module, args[0], wide), *args[1:])

    for source in edge.sources:
        stack.callback(block.module.get_submodule(source).register_forward_hook(multiply).remove)
    for sink in edge.sinks if sinks else ():
        stack.callback(block.module.get_submodule(sink).register_forward_pre_hook(divide).remove)


@EVERY
def test_edges_are_edges(name: str) -> None:
    network, calls = opened(name), TINY[name].calls(2)
    before = [output(network.module, call) for call in calls]
    generator = torch.Generator().manual_seed(0)
    for block in blocks_of(network):
        for edge in block.edges():
            scale_C = torch.exp(0.7 * torch.randn(len(edge.rows_C), generator=generator))
            with ExitStack() as stack:
                scaled_by_hooks(block, edge, scale_C, stack)
                for call, expected in zip(calls, before, strict=True):
                    torch.testing.assert_close(output(network.module, call), expected, rtol=0, atol=2e-5, msg=f"{block.name} {edge}")
            with ExitStack() as stack:
                scaled_by_hooks(block, edge, scale_C, stack, sinks=False)
                moved = (output(network.module, calls[0]) - before[0]).abs().max()
            assert (moved > 1e-3) == (block.name not in UNREAD), f"{block.name} {edge}"


@EVERY
def test_folding_keeps_the_function(name: str) -> None:
    network, calls = opened(name), TINY[name].calls(2)
    before = [output(network.module, call) for call in calls]
    weights = {key: tensor.clone() for key, tensor in network.module.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for block in blocks_of(network):
        for edge in block.edges():
            fold(block.module, edge, torch.exp(0.7 * torch.randn(len(edge.rows_C), generator=generator)))
            for source in edge.sources:
                key = f"{block.name}.{source}.weight"
                assert not torch.equal(network.module.state_dict()[key], weights[key])
    for call, expected in zip(calls, before, strict=True):
        torch.testing.assert_close(output(network.module, call), expected, rtol=0, atol=5e-5)


@EVERY
def test_every_linear_is_reached_or_kept(name: str) -> None:
    network = opened(name)
    weights: dict[str, int] = {}
    reached: dict[str, int] = {}
    for block in blocks_of(network):
        embeddings = {f"{part}.weight" for part, module in block.module.named_modules() if isinstance(module, nn.Embedding)}
        for part, parameter in block.module.named_parameters():
            if parameter.ndim > 1 and part not in embeddings and not part.endswith("scale_shift_table"):
                weights[block.full_name(part)] = parameter.numel()
        reached |= {
            block.full_name(f"{part}.weight"): linear.weight.numel() for part, linear in block.linears(("Linear", "Conv2d")).items()
        }
    missed = weights.keys() - reached.keys()
    assert missed == {key for key in weights if key.endswith((".mlp.gate.weight", ".mlp.router.weight"))}
    assert reached.keys() <= weights.keys()
    assert sum(reached.values()) / sum(weights.values()) >= SHARE.get(name, 1.0)
