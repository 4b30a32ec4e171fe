"""The search for parts that can leave, by a clock that counts multiplications: the least share that is fast enough, and the best method."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import aerogel
from aerogel import catalog
from aerogel.engine.calibration import Samples
from aerogel.engine.opening import open_model
from aerogel.engine.search import structured
from aerogel.engine.search.searching import Findings, search
from aerogel.errors import AerogelError
from aerogel.methods.structured.policy import StructuredMethod
from aerogel.recipe import Recipe, Step
from tests.folders import model_folder, text_file
from tests.tiny import FAMILIES, opened, output

STRUCTURED = {name for name in catalog.names("methods") if issubclass(catalog.find("methods", name), StructuredMethod)}
LAYER = ("shortgpt.protect_last=0", "prune_ffn_channels.multiple=16")
"""Options under which parts of a model of two small layers can leave."""


class Multiplications:
    """A clock that goes on by a second for each multiplication of a layer's weight, in whatever model."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def add(self, layer: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        """Count those of a layer."""
        if isinstance(layer, nn.Linear | nn.Conv2d):
            self.seconds += y.numel() * layer.weight[0].numel()


@pytest.fixture
def clock() -> Iterator[Multiplications]:
    made = Multiplications()
    handle = nn.modules.module.register_module_forward_hook(made.add)
    yield made
    handle.remove()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return model_folder(folder / "model", num_hidden_layers=4), text_file(folder / "words.txt", 400)


def searched(texts: tuple[Path, Path], clock: Multiplications, budget: str = "1.2x", **options: Any) -> Findings:
    given = {"samples": Samples(texts[1], 4, 24), "overrides": LAYER, "rounds": 1} | options
    return search(texts[0], "structured", budget, clock=clock, **given)


def test_every_method_is_at_its_least_share_and_the_least_moved_is_the_best(
    texts: tuple[Path, Path], clock: Multiplications, tmp_path: Path
) -> None:
    findings = searched(texts, clock, output=tmp_path / "out")
    rows = {row["name"]: row for row in findings.facts["rows"]}
    assert rows.keys() | {one["policy"] for one in findings.facts["left_out"]} == STRUCTURED
    assert {"shortgpt", "prune_ffn_channels", "prune_attention_heads"} <= rows.keys()
    network = open_model(texts[0], lazy=False)
    for name, row in rows.items():
        strengths = [Step(name, each).as_dict() for each in method_of(name).strengths(network)]
        weaker = sorted(one["speedup"] for one in row["tried"] if one["parameters"] > row["parameters"])
        assert row["speedup"] >= 0.98 * 1.2
        assert row["steps"][0] in strengths
        assert bool(weaker) == (row["steps"][0] != strengths[0])
        assert all(speedup < 0.98 * 1.2 for speedup in weaker)
    assert isinstance(findings.best, Recipe)
    assert findings.best.steps[0].name == min(rows.values(), key=lambda row: row["kl"])["name"]

    aerogel.compress(texts[0], findings.best, samples=Samples(texts[1], 4, 24), output=tmp_path / "pruned")
    left = sum(parameter.numel() for parameter in aerogel.load(tmp_path / "pruned", lazy=False).module.parameters())
    whole = sum(parameter.numel() for parameter in network.module.parameters())
    assert left / whole == pytest.approx(findings.facts["rows"][0]["parameters"], abs=1e-6)
    assert "A forward of model is" in (tmp_path / "out" / "report.html").read_text("utf-8")


def method_of(name: str) -> StructuredMethod:
    options = {"shortgpt": {"protect_last": 0}, "prune_ffn_channels": {"multiple": 16}}.get(name, {})
    made: StructuredMethod = catalog.find("methods", name)(**options)
    return made


def test_a_speed_that_cannot_be_had_is_said_with_the_one_that_can(texts: tuple[Path, Path], clock: Multiplications) -> None:
    findings = searched(texts, clock, "50x", only=["prune_ffn_channels"], overrides=LAYER[1:])
    assert findings.best is None
    ((name, reason),) = [(one["policy"], one["reason"]) for one in findings.facts["left_out"]]
    assert name == "prune_ffn_channels"
    assert reason.startswith("with as much removed as can be, ")
    assert reason.endswith(" times as fast")


def test_filters_of_a_denoiser(clock: Multiplications) -> None:
    network, calls = opened("unet"), FAMILIES["unet"].calls(4)
    before = [output(network.module, call) for call in calls]
    findings = search(network, "structured", "1.05x", samples=calls, only=["prune_conv_filters", "shortgpt"], rounds=1, clock=clock)
    (row,) = findings.facts["rows"]
    assert (row["name"], findings.facts["judged"]) == ("prune_conv_filters", "outputs")
    assert 0 < row["error"] < 1
    assert row["speedup"] >= 0.98 * 1.05
    assert all(torch.equal(output(network.module, call), expected) for call, expected in zip(calls, before, strict=True))


def test_a_search_that_was_killed_goes_on(
    texts: tuple[Path, Path], clock: Multiplications, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, made = structured.compress, list[str]()

    def compress(network: Any, recipe: Any, **options: Any) -> Any:
        made.append(recipe.name)
        if recipe.name == "shortgpt":
            raise KeyboardInterrupt
        return own(network, recipe, **options)

    monkeypatch.setattr(structured, "compress", compress)
    only: dict[str, Any] = {"only": ["prune_attention_heads", "shortgpt"], "overrides": (), "output": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        searched(texts, clock, **only)
    kept = json.loads((tmp_path / "out.partial" / "rows.json").read_text())
    assert list(kept) == ["prune_attention_heads"]
    monkeypatch.setattr(structured, "compress", own)
    with pytest.raises(AerogelError, match="started with another budget"):
        searched(texts, clock, "1.3x", **only, resume=True)
    findings = searched(texts, clock, **only, resume=True)
    assert {row["name"] for row in findings.facts["rows"]} == {"prune_attention_heads", "shortgpt"}
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("second", [1.3, 1.0])
def test_the_speed_that_is_reported_did_not_choose_the_share(
    second: float, texts: tuple[Path, Path], clock: Multiplications, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the times were that chose it: the model that is delivered is timed by itself, and may miss the budget."""
    pruned, calibrated = structured.StructuredSearch._pruned, list[Any]()

    def remember(self: Any, step: Step, *given: Any) -> Any:
        made = pruned(self, step, *given)
        calibrated.extend([made] if step.method.repair else [])  # type: ignore[union-attr]
        return made

    def timed(self: Any, copy: Any) -> float:
        return second if any(copy is one for one in calibrated) else 1.5

    monkeypatch.setattr(structured.StructuredSearch, "_pruned", remember)
    monkeypatch.setattr(structured.StructuredSearch, "_speedup", timed)
    findings = searched(texts, clock, only=["prune_attention_heads"], overrides=())
    (row,) = findings.facts["rows"]
    assert {one["speedup"] for one in row["tried"]} == {1.5}
    assert (row["speedup"], row["met"], findings.best is not None) == (second, second > 1.2, second > 1.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "0.5"}, "budget '0.5' is no speed-up of a forward"),
        ({"budget": "1x"}, "no speed-up"),
        ({"only": ["gptq"]}, "gptq removes no parts of a model"),
        ({"overrides": ["shortgpt.count=3"]}, "shortgpt.count is what the budget says here"),
        ({"overrides": ["prune_attention_heads.share=0.3"]}, "prune_attention_heads.share is what the budget says here"),
    ],
)
def test_what_makes_no_sense_is_refused(texts: tuple[Path, Path], options: dict[str, Any], message: str, clock: Multiplications) -> None:
    with pytest.raises(AerogelError, match=message):
        searched(texts, clock, **options)
