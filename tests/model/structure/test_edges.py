"""Edges are found as papers and code of quantization name them, family by family, head by head."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.model.calls import Call
from aerogel.model.edges import Edge
from aerogel.model.structure.edges import edges_of
from tests.model.structure.known_edges import KNOWN, Known
from tests.tiny import FAMILIES, VARIANTS, opened

TINY = FAMILIES | VARIANTS


def written_out(known: Known, names: list[str]) -> Iterator[tuple[str, set[str]]]:
    """The sources that a line means in a block, each with its sinks."""
    pattern = re.compile(re.escape(known.source).replace(r"\*", r"([^.]+)"))
    for source in filter(pattern.fullmatch, names):
        parts = list(pattern.fullmatch(source).groups())  # type: ignore[union-attr]
        globs = [sink.replace("*", parts[0], 1) if parts else sink for sink in known.sinks]
        sinks = {name for glob in globs for name in names if re.fullmatch(re.escape(glob).replace(r"\*", r"[^.]+"), name)}
        if sinks:
            yield source, sinks


def rows_by_hand(known: Known, block: nn.Module, source: str, sink: str) -> list[int]:
    """For each column of the sink the row of the source, counted head by head."""
    rows, columns = len(block.get_submodule(source).weight), block.get_submodule(sink).weight.shape[1]
    width = rows if not known.tail else (rows - columns) // 2 if known.heads else columns
    first, repeats = rows - width, columns // width
    if repeats == 1:
        return list(range(first, rows))
    head = block.get_submodule(source.rpartition(".")[0]).head_dim
    return [first + group * head + channel for group in range(width // head) for _ in range(repeats) for channel in range(head)]


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_known_edge_is_found(name: str) -> None:
    network = opened(name)
    found = 0
    for block, module in network.blocks().items():
        edges = {source: edge for edge in network.edges[block].edges for source in edge.sources}
        names = [part for part, _ in module.named_modules()]
        for known in KNOWN.get(TINY[name].family, ()):
            if not all(getattr(network.config, key, None) == value for key, value in known.when):
                continue
            for source, sinks in written_out(known, names):
                assert set(edges[source].sinks) == sinks, f"{block} {source}"
                assert edges[source].rows_I.tolist() == rows_by_hand(known, module, source, next(iter(sinks)))
                found += 1
    assert found or name in ("flux", "flux_schnell", "sd3_medium", "unet_pixels")


def test_offsets_of_norms_are_found() -> None:
    offsets = {name: {edge.offset for edges in opened(name).edges.values() for edge in edges.edges} for name in ("llama", "gemma2")}
    assert offsets == {"llama": {0.0}, "gemma2": {0.0, 1.0}}


class Toy(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Any, width: int = 6, reads: int | None = None) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(6, width), nn.Linear(reads or width, 6), between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


def found_in(block: nn.Module) -> list[Edge]:
    return edges_of(block, Call((torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0)),))).edges


@pytest.mark.parametrize(
    ("between", "power"),
    [(nn.Identity(), 1), (nn.ReLU(), 1), (lambda x: x.relu().square(), 2), (lambda x: x.flip(-1), 1), (lambda x: 3 * x, 1)],
)
def test_what_passes_scales_on_makes_an_edge(between: Any, power: int) -> None:
    (edge,) = found_in(Toy(between))
    assert (edge.sources, edge.sinks, edge.power) == (("up",), ("down",), power)


@pytest.mark.parametrize(
    "between",
    [
        nn.GELU(),
        nn.LayerNorm(6, elementwise_affine=False),
        lambda x: x + 1,
        lambda x: x.softmax(-1),
        lambda x: x.clamp(-50, 50),
        lambda x: x @ torch.ones(6, 6, dtype=x.dtype),
    ],
    ids=["gelu", "norm", "constant", "softmax", "clamp", "mixed"],
)
def test_what_changes_scales_makes_none(between: Any) -> None:
    assert not found_in(Toy(between))


def test_a_product_of_halves_lets_one_of_them_through() -> None:
    (edge,) = found_in(Toy(lambda x: x.chunk(2, -1)[0].sigmoid() * x.chunk(2, -1)[1], 12, 6))
    assert edge.rows_I.tolist() == list(range(6, 12))


def test_a_source_that_the_output_reads_too_is_none() -> None:
    class Leak(Toy):
        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return self.down(y) + 1e-3 * y

    assert not found_in(Leak(nn.Identity()))


def test_a_layer_that_did_not_run_and_may_read_a_source_forbids_the_edge() -> None:
    block = Toy(nn.Identity())
    block.idle = nn.Linear(6, 2)
    assert not found_in(block)


def test_weights_are_what_they_were() -> None:
    network = opened("qwen3_moe")
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in network.module.named_parameters()}
    assert any(edges.edges for edges in network.edges.values())
    after = dict(network.module.named_parameters())
    assert all(after[name] is parameter and parameter.data_ptr() == place for name, (parameter, place) in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.module.modules())
