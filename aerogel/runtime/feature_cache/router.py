"""A router: one score a step and module, trained one step's scores at a time, and decoded to a schedule that meets a budget.

T steps, N modules, B samples. A score is the share of a module's new output that goes into what it gives; the rest is what it gave before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from aerogel.model.calls import Call
from aerogel.runtime.feature_cache.budgets import Budget
from aerogel.runtime.feature_cache.controlled import CacheContents, ControlledDenoiser, Row
from aerogel.runtime.feature_cache.replay import Replay, State, output_of
from aerogel.runtime.feature_cache.schedule import Schedule, ScheduleState
from aerogel.runtime.feature_cache.trials import Trials, mean_square
from aerogel.training.fit import progressed

BOUND = 5.0
"""Scores before the sigmoid stay within it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RouterState(ScheduleState):
    """A schedule that was decoded from a router; errors are mean squared errors of final latents."""

    scores: Tensor
    """Scores (T, N) as they were trained; 1, or nearly, at steps that always compute."""
    guidance: float
    """Guidance of the recorded generations, as Replay has it."""
    error: float
    """Error from noise that was not trained on."""
    error_without_reuse: float
    """Error from that noise where all modules run."""
    log: tuple[Mapping[str, float], ...]
    """At each measurement: updates so far, share of cache entries reused, errors of the soft and of the hard schedule."""


class RouterTraining(ABC):
    """A router on its way; methods say how one update moves it, and how scores become a schedule."""

    counts: ClassVar[str]
    """Name of an update in the log, in the plural."""
    refreshes_above: float = 0.0
    """Score above which a module refreshes what is kept."""

    def __init__(
        self,
        denoiser: ControlledDenoiser,
        runs: Sequence[Replay],
        budget: Budget,
        generator: torch.Generator,
        logits: Mapping[int, Tensor],
        rate: float,
        threshold: float,
    ) -> None:
        self.denoiser, self.runs, self.budget, self.generator, self.threshold = denoiser, runs, budget, generator, threshold
        self.shape = (len(runs[0].calls), len(budget.cost_N))
        self.rows = {step: nn.Parameter(row_N) for step, row_N in logits.items()}
        """Scores before the sigmoid (N), by step."""
        self.optimizer = torch.optim.AdamW(self.rows.values(), lr=rate, weight_decay=0.0)
        self.log: list[dict[str, float]] = []

    def measure_on(self, run: Replay, start: State) -> None:
        """Set what the log's errors are measured on: always the same noise."""
        self.fixed = (run, start)
        self.exact = run.finish(start, self.wanted)

    def wanted(self, _: int, call: Call) -> Tensor:
        """Return the output to come close to."""
        return output_of(self.denoiser.wanted(call))

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over all processes that train together; one trains by itself unless a method says otherwise."""
        return x

    def drawn(self, count: int) -> int:
        """Draw a number below `count`."""
        return int(torch.randint(count, (), generator=self.generator))

    def run(self, count: int, every: int) -> None:
        """Make so many updates, with a measurement before the first and then every so many."""
        for number in range(count):
            if number % every == 0:
                self.measure(number)
            self.update()
            progressed((number + 1) / count)

    @abstractmethod
    def update(self) -> None:
        """Train once."""

    def move(self, row_N: nn.Parameter, loss: Tensor) -> None:
        """Take a step of Adam with the scores of one step alone."""
        self.optimizer.zero_grad(set_to_none=True)
        row_N.grad = self.mean(torch.autograd.grad(loss, row_N)[0])
        self.optimizer.step()
        with torch.no_grad():
            row_N.clamp_(-BOUND, BOUND)

    def scores(self) -> Tensor:
        """Return the scores (T, N) as they are; steps without any compute everything."""
        scores_TN = torch.ones(self.shape)
        for step, row_N in self.rows.items():
            scores_TN[step] = row_N.detach().sigmoid()
        return scores_TN

    def hard(self) -> Tensor:
        """Return which modules compute (T, N) if scores up to the threshold reuse."""
        return self.scores() > self.threshold

    @abstractmethod
    def decoded(self) -> Tensor:
        """Return the schedule (T, N) of the budget."""

    def lowest_first(self, ties: Callable[[int, int], tuple[float, ...]]) -> Tensor:
        """Return the schedule that reuses the lowest scores until the budget is met; of equal ones those with the lower `ties`."""
        scores_TN = self.scores()
        entries = [(step, module) for step, row_N in self.rows.items() if row_N.requires_grad for module in range(self.shape[1])]
        order = sorted(entries, key=lambda entry: (float(scores_TN[entry]), *ties(*entry)))
        return self.budget.decoded(order, self.shape)

    def measure(self, number: int) -> None:
        """Measure before an update, for the log."""
        self.note(number)

    @property
    def conditions(self) -> dict[str, float]:
        """Return the log's values beside errors."""
        return {}

    @torch.no_grad()
    def note(self, number: int, soft: Tensor | None = None, **masks: Tensor) -> None:
        """Log the errors of soft scores, whose final image may be known, of scores at the threshold, and of other schedules (T, N)."""
        hard_TN = self.hard()
        images = {"soft": self._image(self.scores()) if soft is None else soft}
        images |= {name: self._image(mask_TN) for name, mask_TN in {"hard": hard_TN, **masks}.items()}
        error_I = self.mean(torch.tensor([mean_square([image], [self.exact]) for image in images.values()], dtype=torch.float64))
        errors = dict(zip((f"{name}_error" for name in images), error_I.tolist(), strict=True))
        self.log.append({self.counts: float(number), "reused": 1 - float(hard_TN.float().mean()), **self.conditions, **errors})

    def _image(self, table_TN: Tensor) -> Tensor:
        rows: Sequence[Row] = list(table_TN) if table_TN.is_floating_point() else table_TN.tolist()
        return self.finish(self.fixed[1], self.denoiser.empty, rows)

    def finish(self, state: State, held: CacheContents, rows: Sequence[Row]) -> Tensor:
        """Return the final image of the fixed noise from a state on, under scores or decisions for each step that is left."""
        run, state = self.fixed[0], state.fork()
        for row in rows:
            made, held = self.denoiser.step(run.call(state), row, held, self.refreshes_above)
            state = run.advance(state, output_of(made))
        return state.x_BCHW

    @abstractmethod
    def unseen(self) -> Trials:
        """Return trials on noise that was not trained on."""

    def state(self, schedule: Schedule) -> RouterState:
        """Return the state of a schedule that came out."""
        unseen = self.unseen()
        return RouterState(
            **vars(schedule.as_state()),
            scores=self.scores(),
            guidance=self.runs[0].guidance,
            error=unseen.error(schedule.computed_TN),
            error_without_reuse=unseen.error(torch.ones_like(schedule.computed_TN)),
            log=tuple(self.log),
        )
