"""Coarser grids: cells cover an image once, shapes follow it, and a mean stands in the middle of its cell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aerogel.methods.tokens.downsampling import Downsampling, cells, coarse
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.grids import repeated
from aerogel.runtime.tokens.shortening import Shortening
from tests.methods.tokens.staged import generated
from tests.tiny import FAMILIES, IMAGE_TOKEN, opened


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 400))
def test_cells_cover_an_image_once(height: int, width: int, count: int) -> None:
    found = list(cells(height, width, count))
    assert 1 <= len(found) <= max(1, min(count, height * width))
    assert sorted(place for _, cell in found for place in cell.tolist()) == list(range(height * width))
    assert all(middle in cell.tolist() for middle, cell in found)


@pytest.mark.parametrize(("shape", "count", "expected"), [((24, 24), 144, (12, 12)), ((24, 24), 64, (8, 8)), ((6, 12), 18, (3, 6))])
def test_grids_keep_the_shape_of_an_image(shape: tuple[int, int], count: int, expected: tuple[int, int]) -> None:
    assert coarse(*shape, count) == expected


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_means_stand_in_the_middle_of_their_cells(name: str) -> None:
    network = opened(name)
    call = FAMILIES[name].calls(1)[0]
    seen = []
    method = Downsampling(keep=2)

    def choose(stage: object) -> object:
        seen.append((stage, method.choose(stage)))  # type: ignore[arg-type]
        return seen[-1][1]

    with Shortening(network, decoder_of(network), {0: choose}).on() as shortening:
        network.run(call)
    stage, selection = seen[0]
    ids_BN = call.kwargs["input_ids"]
    tokens = int((ids_BN[0] == IMAGE_TOKEN).sum())
    assert shortening.lengths[0] == ids_BN.shape[1] - tokens + 2
    for row, ids_N in enumerate(ids_BN):
        image = (ids_N == IMAGE_TOKEN).nonzero()[:, 0]
        for place in (selection.keep_BK[row] & (ids_N == IMAGE_TOKEN)).nonzero()[:, 0].tolist():
            cell = next(cell for middle, cell in cells(*((2, 2) if tokens == 4 else (2, 4)), 2) if int(image[middle]) == place)
            torch.testing.assert_close(selection.hidden_BKC[row, place], stage.hidden_BKC[row, image[cell]].mean(0))


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_knows_the_grid_of_images(beams: int) -> None:
    """Where transformers hands it to the vision tower alone; the keys of the prompt are those of a forward, in every beam."""
    network, call = opened("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].calls(1)[0]
    method = Downsampling(keep=2)
    with method.on(network, method.calibrate(network, [call])):
        forced = network.module(**{**call.kwargs, "use_cache": True}).past_key_values.layers[0].keys
        held = generated(network, call, 2, num_beams=beams).past_key_values.layers[0].keys
    assert forced.shape[2] == call.kwargs["input_ids"].shape[1] - 6
    torch.testing.assert_close(held[:, :, : forced.shape[2]], forced.repeat_interleave(beams, dim=0))


def test_grids_are_repeated_with_their_rows() -> None:
    vision_BN = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0]]).bool()
    grid_N3 = torch.tensor([[1, 2, 4], [1, 2, 2], [1, 4, 2]])
    assert torch.equal(repeated(grid_N3, vision_BN), grid_N3[[0, 1, 0, 1, 2, 2]])
    assert torch.equal(repeated(grid_N3, vision_BN[::2]), grid_N3)
