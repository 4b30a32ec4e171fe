"""Reconstruction finds the best weights on the support, never makes a part worse, and leaves zeros where they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.engine.opening import open_model
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.layers.conv import matrix
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.samples import reconstruction_error
from aerogel.model.units import captured, rows_of
from aerogel.model.walk import Walk
from tests.methods.reconstruction.pruned import images, tiny_cnn, visit, zeros
from tests.tiny import FAMILIES, opened

CHOICES = [
    {"granularity": granularity, "inputs": inputs, "mask": mask}
    for granularity in ("single", "layer", "block")
    for inputs, mask in (("sparse", "static"), ("dense", "static"), ("sparse", "recomputed"))
]


def fitted(network: Network, calls: list[Call], **options: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Reconstruct with few steps; returns the notes and the zeros before."""
    before: dict[str, Tensor] = {}

    def see(block: Block, when: str) -> None:
        if when == "before":
            before.update(zeros(network))

    return visit(network, calls, [{"reconstruct": {"steps": 10, "batch": 4, "rate": 1e-3, **options}}], see=see), before


@pytest.mark.parametrize("options", CHOICES, ids=lambda options: "-".join(options.values()))
def test_a_convolutional_network_is_never_worse_and_its_zeros_stay(options: dict[str, str]) -> None:
    network = open_model(tiny_cnn())
    notes, before = fitted(network, images(), **options)
    assert {note["name"] for note in notes} == network.pruned
    assert len(network.pruned) == 6
    assert all(note["error"] <= note["error_before"] for note in notes)
    assert sum(note["error"] < 0.98 * note["error_before"] for note in notes) > 3
    after = zeros(network)
    for name, zero_OI in before.items():
        assert int(after[name].sum()) == int(zero_OI.sum()), name
        if options["mask"] == "static":
            assert torch.equal(after[name], zero_OI), name


@pytest.mark.parametrize("name", ["llama", "unet", "dit", "qwen3_moe"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_every_kind_of_network_gets_better(name: str, granularity: str) -> None:
    network = opened(name)
    notes, before = fitted(network, FAMILIES[name].calls(2), granularity=granularity, rate=3e-4)
    done = [note for note in notes if "error" in note]
    assert len(done) > 0.7 * len(network.pruned)
    assert all(note["error"] <= note["error_before"] for note in done)
    assert sum(note["error"] < note["error_before"] for note in done) > 0.8 * len(done)
    assert all("token" in note["fallback"] for note in notes if "error" not in note)
    assert all(torch.equal(zero_OI, before[name]) for name, zero_OI in zeros(network).items())


class Alone(nn.Module):
    """Two blocks of one linear layer each."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(12, 12, bias=bias)}) for _ in range(2)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block["linear"](hidden_states)
        return hidden_states


def test_a_linear_layer_comes_to_the_least_squares_solution_on_its_support() -> None:
    """With the original inputs and fixed zeros."""
    torch.manual_seed(0)
    network = open_model(Alone(bias=False).eval().requires_grad_(False))
    mix = torch.randn(12, 12)
    calls = [Call((), {"hidden_states": torch.randn(2, 20, 12) @ mix}) for _ in range(2)]
    dense = copy.deepcopy(network.module)
    options = {"granularity": "single", "inputs": "dense", "steps": 600, "batch": 4, "rate": 0.02}
    notes = visit(network, calls, [{"reconstruct": options}], share=0.5)
    x_TI = torch.cat([call.kwargs["hidden_states"].reshape(-1, 12) for call in calls])
    for note in notes:
        weight_OI, own_OI = (matrix(model.get_submodule(note["name"])) for model in (network.module, dense))  # type: ignore[arg-type]
        wanted_TO = x_TI @ own_OI.T
        best = 0.0
        for row, wanted_T in zip(weight_OI, wanted_TO.T, strict=True):
            support = x_TI[:, row != 0].double()
            solution = torch.linalg.lstsq(support, wanted_T.double()[:, None]).solution
            best += float((support @ solution - wanted_T.double()[:, None]).square().sum())
        reached = float((x_TI @ weight_OI.T - wanted_TO).square().sum())
        assert reached <= 1.01 * best
        assert note["error"] == pytest.approx(reached / float(wanted_TO.square().sum()), rel=1e-3)
        x_TI = wanted_TO


def test_an_error_that_is_noted_is_that_of_the_block() -> None:
    network, calls = opened("llama"), FAMILIES["llama"].calls(2)
    measured: dict[tuple[str, str], float] = {}

    def see(block: Block, when: str) -> None:
        if block.name:
            assert block.targets is not None
            outputs = [block.run(call) for call in block.calls]
            pairs = zip(outputs, block.targets, strict=True)
            rows = [len(target) for target in block.targets]
            errors = [float(reconstruction_error(output, wanted)) * count for (output, wanted), count in zip(pairs, rows, strict=True)]
            measured[block.name, when] = sum(errors) / sum(rows) / block.samples().power

    notes = visit(network, calls, [{"reconstruct": {"steps": 10, "batch": 4, "rate": 3e-4}}], see=see)
    for note in notes:
        assert note["error_before"] == pytest.approx(measured[note["block"], "before"], rel=1e-4)
        assert note["error"] == pytest.approx(measured[note["block"], "after"], rel=1e-4)


def test_the_row_of_a_layer_ends_before_a_join() -> None:
    """In-place activations and sums do not confuse it."""
    network = open_model(tiny_cnn())
    first = next(iter(Walk(network, images(1))))
    rows = rows_of(first, ["first", "second"])
    assert {name: row.names for name, row in rows.items()} == {"first": ("first", "norm1", "act"), "second": ("second", "norm2")}


def test_what_is_captured_is_what_came_in_and_out() -> None:
    network = open_model(tiny_cnn())
    block = next(iter(Walk(network, images(2))))
    conv, norm = block.module.get_submodule("first"), block.module.get_submodule("norm1")
    inputs, outputs = captured(block, conv, norm)  # the activation behind works in place
    assert len(inputs) == len(outputs) == 2
    assert all(torch.equal(norm(conv(x)), y) for x, y in zip(inputs, outputs, strict=True))


def test_n_of_m_stays_when_zeros_are_recomputed() -> None:
    network = opened("llama")
    recipe = {
        "name": "r",
        "steps": [{"magnitude": {"pattern": "2:4"}}, {"reconstruct": {"mask": "recomputed", "steps": 10, "batch": 4, "rate": 0.01}}],
    }
    before = {name: part.weight.clone() for name, part in network.module.named_modules() if isinstance(part, nn.Linear)}
    result = aerogel.compress(network, recipe, samples=FAMILIES["llama"].calls(2), measures=())
    moved = 0
    for name in result.network.pruned:
        weight_OI = result.network.module.get_submodule(name).weight
        assert int((weight_OI.reshape(-1, 4) != 0).sum(-1).max()) == 2, name
        largest = before[name].reshape(-1, 4).abs().topk(2, dim=-1).indices
        moved += int((weight_OI.reshape(-1, 4).gather(-1, largest) == 0).sum())
    assert moved > 0


def test_zeros_that_rise_from_step_to_step(tmp_path: Path) -> None:
    """A recipe repeats pruning and reconstruction; what was pruned before stays pruned."""
    steps = [part for share in (0.3, 0.5) for part in ({"magnitude": {"sparsity": share}}, {"reconstruct": {"steps": 4, "batch": 4}})]
    FAMILIES["llama"].build().save_pretrained(tmp_path / "source")
    calls = FAMILIES["llama"].calls(2)
    result = aerogel.compress(tmp_path / "source", {"name": "r", "steps": steps}, samples=calls, output=tmp_path / "out", measures=())
    module = aerogel.load(tmp_path / "out", lazy=False).module
    names = [line["name"] for line in result.journal if "sparsity" in line]
    assert len(names) == 2 * len(set(names))
    assert all(float((module.get_submodule(name).weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3) for name in names)


def test_without_pruning_before_it_is_refused() -> None:
    with pytest.raises(AerogelError, match="reconstruct adjusts pruned layers, and no step before it prunes"):
        aerogel.compress(FAMILIES["llama"].build(), {"name": "r", "steps": [{"reconstruct": {}}]}, measures=())


MAGNITUDE: dict[str, Any] = {"magnitude": {"sparsity": 0.1}}
LAYERS: list[dict[str, Any]] = [
    {"reconstruct": {"granularity": "single"}}, {"reconstruct": {"mask": "recomputed"}}, {"weight_correction": {}}, {"bias_correction": {}},
]  # fmt: skip
BLOCK: dict[str, Any] = {"reconstruct": {"granularity": "block"}}


@pytest.mark.parametrize(
    ("family", "before", "after", "refused"),
    [
        *(("llama", [{"rotate": {}}, MAGNITUDE], after, "another basis") for after in (BLOCK, *LAYERS)),
        *(("llama", [{"ria": {"pattern": "2:4"}}], after, "another order or scale") for after in LAYERS),
        ("llama", [{"ria": {"pattern": "2:4"}}], BLOCK, ""),
        *(("llama", [{"ria": {"pattern": "2:4", "permute": False}}], after, "") for after in LAYERS),
        *(("qwen3_moe", [{"prune_experts": {}}, MAGNITUDE], after, "another order or scale") for after in LAYERS),
        ("qwen3_moe", [{"prune_experts": {}}, MAGNITUDE], BLOCK, ""),
    ],
)
def test_what_stands_elsewhere_in_the_original_model_is_not_compared(
    family: str, before: list[dict[str, Any]], after: dict[str, Any], refused: str
) -> None:
    """Rotated blocks would be fitted to what they gave in another basis: an error of 2.2 where pruning has made one of 0.003."""
    found = plan(opened(family), {"name": "r", "steps": [*before, after]}).problems
    assert any(refused in line for line in found) if refused else not any("another" in line for line in found)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"steps": 0}, "option 'steps'"), ({"granularity": "net"}, "option 'granularity'"), ({"rate": float("nan")}, "option 'rate'")],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AerogelError, match=words):
        aerogel.methods.reconstruction.reconstruct.Reconstruct(**options)


def test_a_classifier_of_images_from_its_folder(tmp_path: Path) -> None:
    """Allocation, criterion, reconstruction and correction, one after the other, on a network without attention."""
    both = {"targets": ["Linear", "Conv2d"]}
    steps = [
        {"erk": {"sparsity": 0.6, **both}},
        {"magnitude": {"sparsity": None, **both}},
        {"reconstruct": {"granularity": "layer", "steps": 5, "batch": 4, "rate": 1e-3}},
        {"bias_correction": {}},
    ]
    calls = [Call((), {"pixel_values": torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))})]
    source = Path(__file__).resolve().parents[3] / "zoo" / "fashion-judge"
    result = aerogel.compress(source, {"name": "r", "steps": steps}, samples=calls, output=tmp_path / "out", measures=())
    given = {line["name"]: line["allocated"] for line in result.journal if line["method"] == "erk"}
    errors = [line for line in result.journal if line["method"] == "reconstruct"]
    module = aerogel.load(tmp_path / "out", lazy=False).module
    assert len(given) == len(errors) == 10
    # A dense layer that reads what it read before has no error to remove: the first ones, which ERK leaves dense.
    assert all(line["error"] < line["error_before"] or line["error_before"] == 0 for line in errors)
    assert sum(line["error_before"] > 0 for line in errors) == 6
    for name, share in given.items():
        weight = module.get_submodule(name).weight
        assert int((weight == 0).sum()) == round(share * weight.numel()), name
    assert [line["name"] for line in result.journal if "bias_shift" in line] == ["classifier.1"]
