"""The search for zeros: three stages on copies of a model, judged on data that nothing was calibrated on, and a recipe for the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

import aerogel
from aerogel.data import text
from aerogel.engine.calibration import Samples
from aerogel.engine.opening import open_model
from aerogel.engine.search import sparsity
from aerogel.engine.search.pruning_recipes import Budget, Prunable
from aerogel.engine.search.searching import Findings, search
from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.recipe import Recipe
from tests.folders import model_folder, text_file
from tests.methods.reconstruction.pruned import images, tiny_cnn

CRITERION = '''
"""Prunes the first weights of each layer."""
from dataclasses import dataclass
from typing import ClassVar
import torch
from aerogel.layers.conv import matrix
from aerogel.methods.sparsity.policy import PruningMethod

@dataclass(frozen=True)
class FirstWeights(PruningMethod):
    """Prunes the first weights of each layer."""
    reads_calls: ClassVar[bool] = False

    def compress(self, block):
        for name, share in self.shares(block).items():
            weight = matrix(block.module.get_submodule(name))
            order = torch.arange(weight.numel(), device=weight.device).view_as(weight).float()
            self.prune(block, name, self.kept(order, share))
'''


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return model_folder(folder / "model"), text_file(folder / "words.txt", 400)


def searched(texts: tuple[Path, Path], only: tuple[str, ...], budget: float | str = 0.5, **options: Any) -> Findings:
    return search(texts[0], "sparsity", budget, **{"samples": Samples(texts[1], 4, 24), "only": only} | options)


@pytest.fixture(scope="module")
def found(texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Path]:
    folder = tmp_path_factory.mktemp("search") / "out"
    return searched(texts, ("magnitude", "wanda", "erk", "weight_correction"), output=folder), folder


def rows(findings: Findings) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in findings.facts["rows"]}


def reasons(findings: Findings) -> dict[str, str]:
    return {row["policy"]: row["reason"] for row in findings.facts["left_out"]}


def test_stages_go_on_from_the_best(found: tuple[Findings, Path]) -> None:
    facts, made = found[0].facts, rows(found[0])
    first, second, third = facts["stages"]
    assert [stage["name"] for stage in facts["stages"]] == ["criteria", "allocations", "reconstructions"]
    assert first["tried"] == ["magnitude", "wanda"]
    assert sorted(second["tried"]) == ["erk + magnitude", "erk + wanda"]
    before = sorted((made[name] for name in first["tried"] + second["tried"] if made[name]["met"]), key=lambda row: row["kl"])[:2]
    assert third["tried"] == [f"{row['name']} + weight_correction" for row in before]
    assert "magnitude, wanda" in second["about"] or "wanda, magnitude" in second["about"]


def test_the_budget_is_met_and_the_least_moved_is_the_best(found: tuple[Findings, Path]) -> None:
    facts, best = found[0].facts, found[0].best
    met = [row for row in facts["rows"] if row["met"]]
    assert all(abs(row["zeros"] - 0.5) <= 1e-3 for row in met if "wanda" not in row["name"])
    assert all(row["zeros"] >= 0.495 for row in met)
    assert isinstance(best, Recipe)
    assert best.as_dict()["steps"] == min(met, key=lambda row: row["kl"])["steps"]
    assert facts["rows"][0]["kl"] == min(row["kl"] for row in met)
    sizes = {name: layer["weights"] for name, layer in facts["layers"].items()}
    assert "lm_head" not in sizes
    for row in facts["rows"]:
        assert sum(row["layers"][name] * size for name, size in sizes.items()) / sum(sizes.values()) == pytest.approx(row["zeros"])


def test_rows_are_what_the_recipe_does_to_the_held_out_half(found: tuple[Findings, Path], texts: tuple[Path, Path]) -> None:
    model, words = texts
    best = found[0].facts["rows"][0]
    rows_NL = text.samples(open_model(model).processor, words, 8, 24, 0)
    whole_NLV = open_model(model, lazy=False).run(text.calls(rows_NL[4:])[0]).logits
    pruned = aerogel.compress(model, {"steps": best["steps"]}, samples=Samples(words, 4, 24), measures=())
    ours_NLV = pruned.network.run(text.calls(rows_NL[4:])[0]).logits
    p_NLV, q_NLV = (log_softmax(logits[:, :-1].double(), -1) for logits in (whole_NLV, ours_NLV))
    assert best["kl"] == pytest.approx(float((p_NLV.exp() * (p_NLV - q_NLV)).sum(-1).mean()), rel=1e-4)
    nats = -q_NLV.gather(-1, rows_NL[4:, 1:, None]).mean()
    assert best["perplexity"] == pytest.approx(float(nats.exp()), rel=1e-4)
    assert best["top1"] == pytest.approx(float((p_NLV.argmax(-1) == q_NLV.argmax(-1)).double().mean()))
    assert found[0].facts["provenance"]["calibration"]["fingerprint"] == text.fingerprint(rows_NL[:4])


def test_the_folder_holds_the_recipe_and_no_weights(found: tuple[Findings, Path], texts: tuple[Path, Path]) -> None:
    findings, folder = found
    assert {path.name for path in folder.iterdir()} >= {"aerogel.json", "search.json", "report.html", "recipe.yaml"}
    assert not list(folder.glob("model*"))
    assert not folder.with_name("out.partial").exists()
    recipe, settings = Recipe.parse_run(folder / "recipe.yaml")
    assert recipe == findings.best
    assert settings.model is not None
    assert (settings.model.name, settings.data.source, settings.data.samples) == (str(texts[0]), str(texts[1]), 4)
    report = (folder / "report.html").read_text("utf-8")
    assert "Zeros of each layer" in report
    assert "Aerogel search for sparsity" in report


def test_the_original_is_not_changed(texts: tuple[Path, Path]) -> None:
    network = open_model(texts[0], lazy=False)
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    search(network, "sparsity", samples=Samples(texts[1], 2, 24), only=["magnitude", "weight_correction"])
    assert all(torch.equal(before[name], tensor) for name, tensor in network.module.state_dict().items())
    assert not network.pruned


def test_a_killed_search_goes_on_where_it_stopped(
    found: tuple[Findings, Path], texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = sparsity.compress, list[str]()

    def compress(network: Any, recipe: Recipe, **options: Any) -> Any:
        calls.append(recipe.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return own(network, recipe, **options)

    only, folder = ("magnitude", "wanda", "erk", "weight_correction"), tmp_path / "out"
    monkeypatch.setattr(sparsity, "compress", compress)
    with pytest.raises(KeyboardInterrupt):
        searched(texts, only, output=folder)
    with pytest.raises(AerogelError, match="holds an unfinished search; add --resume to resume it"):
        searched(texts, only, output=folder)
    with pytest.raises(AerogelError, match="was started with another budget"):
        searched(texts, only, 0.6, output=folder, resume=True)
    resumed = searched(texts, only, output=folder, resume=True)
    assert len(calls) == 1 + 6, "the three that were judged are not compressed again"
    without = [{key: value for key, value in row.items() if key != "seconds"} for row in resumed.facts["rows"]]
    assert without == [{key: value for key, value in row.items() if key != "seconds"} for row in found[0].facts["rows"]]
    assert not (tmp_path / "out.partial").exists()


def test_a_criterion_of_a_third_party_takes_part(texts: tuple[Path, Path], plugin: Path) -> None:
    (plugin / "methods" / "first_weights.py").write_text(CRITERION)
    findings = searched(texts, ("magnitude", "first_weights", "erk"))
    made = rows(findings)
    assert {"first_weights", "erk + first_weights"} <= set(made)
    assert made["first_weights"]["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert made["first_weights"]["kl"] > made["magnitude"]["kl"]


def test_a_pattern_has_no_allocations(texts: tuple[Path, Path]) -> None:
    findings = searched(texts, ("magnitude", "erk", "weight_correction"), "2:4")
    assert [stage["name"] for stage in findings.facts["stages"]] == ["criteria", "reconstructions"]
    assert reasons(findings) == {"erk": "in the pattern 2:4 every layer has the same share"}
    assert all(row["zeros"] == 0.5 for row in findings.facts["rows"])


def test_bytes_are_a_share(texts: tuple[Path, Path]) -> None:
    network = open_model(texts[0], lazy=False)
    weights = Prunable.of(network, 1).weights
    findings = searched(texts, ("magnitude",), f"{weights * (4 * 0.25 + 1 / 8) / 1000}kB")
    assert findings.facts["rows"][0]["zeros"] == pytest.approx(0.75, abs=1e-3)
    with pytest.raises(AerogelError, match="budget_bytes is 900,000,000,000, and the layers that are meant take"):
        searched(texts, ("magnitude",), "900GB")


def test_methods_that_train_are_tried_where_they_are_named(texts: tuple[Path, Path]) -> None:
    assert reasons(searched(texts, ("magnitude",))) == {}
    options = ["fcpts.steps=2", "reconstruct.steps=2"]
    made = searched(texts, ("magnitude", "fcpts", "reconstruct"), overrides=options)
    assert set(rows(made)) == {
        "magnitude", "fcpts + magnitude", "magnitude + reconstruct", "fcpts + magnitude + reconstruct"
    }  # fmt: skip
    assert made.facts["rows"][0]["steps"][-1]["reconstruct"]["steps"] == 2 or "reconstruct" not in made.facts["rows"][0]["name"]


def test_what_a_method_refuses_is_told(texts: tuple[Path, Path]) -> None:
    findings = searched(texts, ("magnitude", "bias_correction"))
    assert reasons(findings) == {
        "magnitude + bias_correction": "bias_correction: finds no bias to move: no layer that it acts on has one; leave it out"
    }


def test_convolutions_are_judged_by_their_output() -> None:
    network = tiny_cnn()
    only = ["magnitude", "wanda", "ria", "erk", "bias_correction", "weight_correction"]
    findings = search(network, "sparsity", 0.5, samples=images(6), only=only)
    facts = findings.facts
    assert (facts["judged"], facts["count"]) == ("classes", 12)
    assert set(facts["layers"]) == {f"blocks.{number}.{name}" for number in range(2) for name in ("first", "second")}
    assert all(abs(row["zeros"] - 0.5) <= 1e-3 for row in facts["rows"] if "wanda" not in row["name"]), "rows of 72 are rounded down"
    best = facts["rows"][0]
    calls = images(6)
    wanted = [network(**call.kwargs).double() for call in calls[3:]]
    aerogel.compress(network, {"steps": best["steps"]}, samples=calls[:3], measures=())
    given = [network(**call.kwargs).double() for call in calls[3:]]
    lost = sum(float((a - b).square().sum()) for a, b in zip(given, wanted, strict=True))
    assert best["error"] == pytest.approx(lost / sum(float(each.square().sum()) for each in wanted), rel=1e-5)
    assert best["top1"] == sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(given, wanted, strict=True)) / 12


def test_calls_that_no_file_can_name_are_left_out_of_the_recipe(tmp_path: Path) -> None:
    search(tiny_cnn(), "sparsity", samples=images(2), only=["magnitude"], output=tmp_path / "out")
    recipe, settings = Recipe.parse_run(tmp_path / "out" / "recipe.yaml")
    assert [step.name for step in recipe.steps] == ["magnitude"]
    assert settings.data.source is None
    assert json.loads((tmp_path / "out" / "search.json").read_text())["judged"] == "classes"


@pytest.mark.parametrize("budget", [0, 1, "nan", "abc", "3:2", "2:2", "0:4", -0.5, "1.5x", "0MB", "inf", ""])
def test_a_budget_that_says_nothing_about_zeros_is_refused(budget: Any) -> None:
    with pytest.raises(AerogelError, match="says nothing about zeros; give their share between 0 and 1"):
        Budget.of(budget)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ("rtn",)}, "rtn neither prunes weights, nor shares zeros out over layers, nor adjusts what pruning leaves; leave it out"),
        ({"only": ("erk",)}, "none of the methods says which weights become zero; name one that does too, such as magnitude"),
        ({"overrides": ["wanda.sparsity=0.3"]}, "wanda.sparsity is decided by the budget and the model here, the same for all"),
        ({"overrides": ["erk.targets=[Linear]"]}, "erk.targets is decided by the budget"),
        ({"samples": [Call((), {"input_ids": torch.zeros(1, 4, dtype=torch.long)})]}, "1 call: one half is calibrated on"),
        ({"budget": "7:13"}, "no linear layer whose inputs are in runs of 13 in its blocks, so there is nothing to prune"),
        ({"resume": True}, r"a search of weights that is saved to an output can be resumed \(sparsity, structured\); leave resume out"),
    ],
)
def test_what_cannot_be_searched_is_refused(texts: tuple[Path, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        searched(texts, **{"only": (), **options})


def test_a_model_with_nothing_to_prune_is_refused() -> None:
    with pytest.raises(AerogelError, match="has no linear layer or convolution that is not quantized in its blocks"):
        search(nn.Sequential(nn.LayerNorm(4)), "sparsity", samples=[Call((torch.zeros(1, 4),)), Call((torch.zeros(1, 4),))])
