"""MoDES: experts are dropped by layer importance times router weight, with thresholds of text and vision of their own (arXiv:2511.15690).

L layers, M modalities (text, vision), T tokens, K experts a token is routed to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from aerogel.methods.base import CalibrationSize, CostEstimate
from aerogel.methods.experts.policy import ExpertSkippingPolicy, ExpertSkippingState
from aerogel.options import NonNegative, Share
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.frontier import Evaluations, Found, Value, exhaustive, frontier, violations
from aerogel.runtime.expert_skipping.routing import Bypass, Routed, Rule, Shape, Skipping
from aerogel.runtime.expert_skipping.thresholds import POINTS, Score, UnreachableError, grid, seen
from aerogel.runtime.policy_state import PolicyState
from aerogel.runtime.token_types import KINDS, MODALITIES, TEXT, VISION

_PUBLISHED = {TEXT: 0.71, VISION: 0.6}
"""End of the public code's grid, before its sigmoid."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ModesState(ExpertSkippingState):
    """Importance of the layers, thresholds, and how they were found."""

    importance: Tensor
    """Importance (L, M) of each layer's experts; sums to one in each modality."""
    power: float
    """Power of the importance in the score."""
    thresholds: Tensor
    """Thresholds (M) of text and vision."""
    ratio: float | None = None
    """Share of the token-expert assignments that was asked for."""
    tried: Tensor | None = None
    """Evaluations: numbers of the two thresholds, KL divergence, share that is dropped."""
    evaluations: int = 0
    """Number of evaluations."""
    against_monotony: Mapping[str, int] = field(default_factory=dict)
    """Counts of how often KL divergence and ratio fell from one evaluated cell to the next, and of how many steps."""


@dataclass(frozen=True)
class Modes(ExpertSkippingPolicy[ModesState]):
    """Drops an assignment where the layer's importance times the router's weight is below the threshold of the token's modality."""

    state: ClassVar[type[PolicyState]] = ModesState

    ratio: Share = 0.67
    """Share of the token-expert assignments to drop, over all layers."""
    importance: Literal["modality", "layer", "none"] = "modality"
    """Importance of a layer, the change of answers without its experts: by modality, one number a layer, or all layers alike."""
    power: NonNegative | tuple[NonNegative, ...] = 1.0
    """Power of the importance in the score: 1 as published, less to tell layers apart less sharply; of several the best is taken."""
    bypass: Bypass = "zero"
    """Replacement of a layer's experts while its importance is measured: nothing, or their own input (as the public code has it)."""
    thresholds: Literal["modality", "single"] = "modality"
    """One threshold for text and one for vision, or a single one."""
    grid: Literal["quantiles", "published"] = "quantiles"
    """Grid of thresholds: where the scores are, or that of the public code."""
    points: Annotated[int, Field(ge=2, le=1000)] = POINTS
    """Thresholds of each modality that are looked at."""
    exhaustive: bool = False
    """Try all combinations of the two thresholds; for small grids."""
    evaluations: str = ""
    """A folder in which evaluations are kept, so that a search that was stopped goes on."""

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """A walk along the border of the grid, or all of it; two a layer for importance are left out, as layers are not known here."""
        evaluations = (self.points**2 if self.exhaustive else 2 * self.points) * len(self._powers)
        return CostEstimate(model_tokens=size.tokens * evaluations)

    def fitted(self, answers: Answers, shape: Shape) -> dict[str, Any]:
        """Importance, then thresholds; raises AerogelError for a ratio that no threshold reaches."""
        importance_LM = answers.once(("importance", self.importance, self.bypass), lambda: self._importance(answers, shape))
        found = {power: self._found(answers, importance_LM, power) for power in self._powers}
        best = min(found, key=lambda power: found[power][0])
        return {"importance": importance_LM, "power": best, "ratio": self.ratio, **found[best][1]}

    def rule(self, state: ModesState) -> Rule:
        """Drop what scores below the threshold of its token; special tokens count as text where they are not protected."""
        return _rule(state.importance**state.power, state.thresholds)

    @property
    def _powers(self) -> tuple[float, ...]:
        return self.power if isinstance(self.power, tuple) else (self.power,)

    def _found(self, answers: Answers, importance_LM: Tensor, power: float) -> tuple[float, dict[str, Any]]:
        """The least KL among the thresholds that drop enough; these, and how they were found."""
        grids = {kind: self._grid(answers, importance_LM**power, kind) for kind in (TEXT, VISION)}
        if self.thresholds == "single":
            grids = {TEXT: sorted({*grids[TEXT], *grids[VISION]} if answers.has_images else grids[TEXT]), VISION: [0.0]}
        evaluations = self._evaluations(answers, importance_LM, power, grids)
        search = exhaustive if self.exhaustive else frontier
        rows, columns = (len(grids[kind]) for kind in (TEXT, VISION))
        found: Found | None = search(evaluations, rows, columns, self.ratio)
        if found is None:
            raise UnreachableError(self.ratio, evaluations((rows - 1, columns - 1)).ratio)
        tried = [[*cell, *value] for cell, value in evaluations.known.items()]
        return found.value.error, {
            "thresholds": torch.tensor(self._pair(grids, found.cell), dtype=torch.float64),
            "tried": torch.tensor(tried, dtype=torch.float64),
            "evaluations": len(tried),
            "against_monotony": violations(evaluations.known),
        }

    def _importance(self, answers: Answers, shape: Shape) -> Tensor:
        """Importance (L, M) that sums to one in each modality; zero where a modality does not occur."""
        if self.importance == "none":
            return torch.full((shape.layers, len(MODALITIES)), 1 / shape.layers)
        told = [(TEXT,), (VISION,)] if self.importance == "modality" else [(TEXT, VISION)]
        columns = []
        for kinds in told:
            occurs = answers.has_images or TEXT in kinds
            errors = [answers.judge(self._without(answers, layer, kinds)).error if occurs else 0.0 for layer in range(shape.layers)]
            columns.append(torch.tensor(errors))
        importance_LM = torch.stack(columns * (len(MODALITIES) // len(columns)), dim=1)
        return importance_LM / importance_LM.sum(0).clamp(min=torch.finfo(torch.float32).tiny)

    def _without(self, answers: Answers, layer: int, kinds: tuple[int, ...]) -> Skipping:
        """Return the rule that drops all assignments of one layer for tokens of some kinds."""

        def rule(routed: Routed) -> Tensor:
            own_T = torch.isin(routed.kind_T, torch.tensor(kinds, device=routed.kind_T.device))
            return ~((routed.layer == layer) & own_T)[:, None].expand_as(routed.index_TK)

        return Skipping(rule, answers.vocabulary, bypass=self.bypass)

    def _grid(self, answers: Answers, weight_LM: Tensor, kind: int) -> list[float]:
        if kind == VISION and not answers.has_images:
            return [0.0]
        if self.grid == "published":
            places = torch.linspace(0, _PUBLISHED[kind], self.points, dtype=torch.float64).tolist()
            return [2 / (1 + math.exp(-10 * (place - 1))) for place in places]
        return grid(seen(answers, _score(weight_LM), (kind,)), self.points)

    def _pair(self, grids: Mapping[int, list[float]], cell: tuple[int, int]) -> list[float]:
        text = grids[TEXT][cell[0]]
        return [text, text if self.thresholds == "single" else grids[VISION][cell[1]]]

    def _evaluations(self, answers: Answers, importance_LM: Tensor, power: float, grids: Mapping[int, list[float]]) -> Evaluations:
        def evaluate(cell: tuple[int, int]) -> Any:
            thresholds = torch.tensor(self._pair(grids, cell), dtype=torch.float64)
            return answers.judge(self.skip(_rule(importance_LM**power, thresholds), answers.vocabulary))

        about = {
            "importance": importance_LM.tolist(), "grids": [grids[TEXT], grids[VISION]], "answer tokens": answers.tokens,
            "switches": [self.renormalise, self.keep_top1, self.protect_special, self.thresholds, power],
        }  # fmt: skip
        known: dict[tuple[int, int], Value] = answers.once(("evaluations", json.dumps(about)), dict)
        return Evaluations(evaluate, Path(self.evaluations) / f"power-{power:g}.jsonl" if self.evaluations else None, about, known)


def _score(weight_LM: Tensor) -> Score:
    """Return the layer's importance for the token's modality times the router's weight of each expert."""
    weight_LK = _ByKind(weight_LM)

    def score(routed: Routed) -> Tensor:
        return routed.share_TK * weight_LK.on(routed.share_TK.device)[routed.layer][routed.kind_T][:, None]

    return score


def _rule(weight_LM: Tensor, threshold_M: Tensor) -> Rule:
    score, threshold_K = _score(weight_LM), _ByKind(threshold_M)

    def rule(routed: Routed) -> Tensor:
        return ~(score(routed) < threshold_K.on(routed.share_TK.device)[routed.kind_T][:, None])

    return rule


class _ByKind:
    """Values of the modalities as values of all kinds of token: what is neither text nor vision counts as text."""

    def __init__(self, of_modality: Tensor) -> None:
        self._values = of_modality.float()[..., [VISION if kind == VISION else TEXT for kind in range(len(KINDS))]]

    def on(self, device: torch.device) -> Tensor:
        """The values on a device, where they stay: a copy for each layer would make the host wait."""
        if self._values.device != device:
            self._values = self._values.to(device)
        return self._values
