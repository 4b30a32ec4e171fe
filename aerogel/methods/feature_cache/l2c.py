"""Learning-to-Cache: a router of one score a step and module is trained at every second step, on noised images (arXiv:2406.01733).

T steps, N modules, B samples, C channels, H height, W width. The method learns from data: the original reads the images that its model was
trained on. Here the images are the pipeline's own, the final latents of the recorded generations, and are noised to the level of a step;
the trajectories themselves are not learned from. Steps are counted from the noise on: the second, fourth ... are trained and may reuse
what the step before gave, the others compute everything; so at most half of the cache entries are reused. Ours: exact decoding, odd T too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import AerogelError, reasons
from aerogel.methods.base import Before, CalibrationSize, CostEstimate
from aerogel.methods.feature_cache.policy import BudgetedCachePolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, NonNegative, Positive, Share
from aerogel.runtime.feature_cache.budgets import Budget
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.controlled import ControlledDenoiser, controlled
from aerogel.runtime.feature_cache.replay import Replay, State, output_of, replays
from aerogel.runtime.feature_cache.router import RouterState, RouterTraining
from aerogel.runtime.feature_cache.schedule import Schedule
from aerogel.runtime.feature_cache.trials import Trials
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True, eq=False, kw_only=True)
class L2cState(RouterState):
    """A schedule that was decoded from a router."""

    images: int
    """Clean images that were noised, repeats included."""


@dataclass(frozen=True)
class L2c(BudgetedCachePolicy[L2cState]):
    """Learns from noised images which attention and FFN outputs of a denoiser to cache at every second step, for an exact budget."""

    state: ClassVar[type[PolicyState]] = L2cState

    iterations: Count = 2000
    """Updates, each of the scores of one step (published: about 20 000 of 64 images); each is of as many images as were recorded at
    once."""
    rate: Positive = 1e-2
    """Learning rate of Adam (published: 1e-3 for ten times as many updates, and 1e-2 for DiT-L/2 at 20 steps)."""
    penalty: NonNegative = 1e-6
    """Weight of the scores' sum against the mean squared error (published: 1e-6 for DiT-XL/2 at 10 and 50 steps, 5e-6 at 20); about what
    reusing a module alone adds to that error, or no score falls."""
    threshold: Share = 0.1
    """For the log: the published decision computes modules with a score above it; here the budget decides."""
    check: Count = 500
    """Updates between two measurements for the log."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look at the budget and at the sampler."""
        yield from super().problems(network, before)
        yield from reasons(lambda: _noises(network))

    def check_ratio(self, budget: Budget, steps: int) -> None:
        """Raise AerogelError where every second step cannot save as much."""
        _within(budget, steps)

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """A forward that fills what is kept, a teacher, a student and its gradients at each update."""
        return CostEstimate(model_tokens=self.iterations * 5 * size.at_once)

    def calibrate(self, network: Network, calls: Sequence[Call]) -> L2cState:
        """Train and decode; raises AerogelError when the calls do not replay or every second step cannot meet the budget."""
        trajectories = Trajectories.of(network, calls)
        budget = self.budget(network, trajectories)
        _within(budget, len(trajectories.steps))
        _noises(network)
        runs, modules = replays(network, trajectories), tuple(cached_modules_of(network))
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        with controlled(network) as denoiser:
            training = L2cTraining(self, denoiser, runs, budget, generator)
            training.run(self.iterations, self.check)
            mask_TN = training.decoded()
            training.note(self.iterations, decoded=mask_TN)
            found = training.state(Schedule(runs[0].steps, trajectories.sampler, modules, mask_TN, trajectories.precision))
        return L2cState(**vars(found), images=training.images)


def _trained(steps: int) -> range:
    """The steps that may reuse."""
    return range(1, steps, 2)


def _within(budget: Budget, steps: int) -> None:
    rows, each = len(_trained(steps)), sum(budget.cost_N)
    if budget.saving > rows * each:
        raise AerogelError(
            f"the budget means to save {budget.saving:.3g}; l2c trains every second step only, caching all {len(budget.cost_N)} modules "
            f"at {rows} of {steps} steps saves {rows * each:.3g}: ask for less, or take a method that decides at every step"
        )


def _noises(network: Network) -> None:
    sampler = getattr(network.processor, "scheduler", None)
    if sampler is not None and not hasattr(sampler, "add_noise"):
        raise AerogelError(
            f"{type(sampler).__name__} does not noise clean images (it has no add_noise), which l2c learns from: "
            "give the pipeline another sampler, or take a method that learns along trajectories"
        )


class L2cTraining(RouterTraining):
    """Trains on noised images: each iteration moves the scores of one step once."""

    counts: ClassVar[str] = "iterations"

    def __init__(
        self, options: L2c, denoiser: ControlledDenoiser, runs: Sequence[Replay], budget: Budget, generator: torch.Generator
    ) -> None:
        self.options = options
        trained = _trained(len(runs[0].calls))
        logits_RN = torch.randn(len(trained), len(budget.cost_N), generator=generator)
        logits = dict(zip(trained, logits_RN, strict=True))
        super().__init__(denoiser, runs, budget, generator, logits, options.rate, options.threshold)
        self.images = 0
        """Clean images that were noised, repeats included."""
        self.clean = [run.finish(run.start(), self.wanted) for run in runs]
        """Final latents (B, C, H, W) of each recorded generation."""
        self.measure_on(runs[0], runs[0].noise(generator))

    def run(self, count: int, every: int) -> None:
        """Train; raises AerogelError when the scores come out not finite."""
        super().run(count, every)
        if not bool(self.scores().isfinite().all()):
            raise AerogelError(
                f"scores are not finite after {count} iterations: the model, or the original before the recipe, gives outputs that are "
                "not finite; look there first"
            )

    def update(self) -> None:
        """Noise clean images, take a whole step, and move the scores of the next step once."""
        step, number = _trained(self.shape[0])[self.drawn(len(self.rows))], self.drawn(len(self.runs))
        run, row_N = self.runs[number], self.rows[step]
        state = self.noised(run, self.clean[number], step - 1)
        with torch.no_grad():
            made, held = self.denoiser.step(run.call(state), [True] * self.shape[1], self.denoiser.empty)
            call = run.call(run.advance(state, output_of(made)))
            wanted = self.wanted(step, call)
        with torch.enable_grad():
            score_N = row_N.sigmoid()
            made, _ = self.denoiser.step(call, score_N, held)
            self.move(row_N, (output_of(made) - wanted).float().square().mean() + self.options.penalty * score_N.sum())

    def noised(self, run: Replay, clean_BCHW: Tensor, step: int) -> State:
        """Put new noise on clean images, as they would be before a step."""
        noise_BCHW = torch.randn(clean_BCHW.shape, generator=self.generator).to(clean_BCHW.device, clean_BCHW.dtype)
        sampler, steps_B = copy.deepcopy(run.sampler), run.sampler.timesteps[step].expand(len(clean_BCHW))
        self.images += len(clean_BCHW)
        return State(step, sampler.add_noise(clean_BCHW, noise_BCHW, steps_B), sampler)

    def decoded(self) -> Tensor:
        """Return the schedule of the budget: lowest scores first; of equal ones those that save most, and late steps before early ones."""
        return self.lowest_first(lambda step, module: (-self.budget.cost_N[module], -step))

    def unseen(self) -> Trials:
        """Return trials of the first recorded generation, with noise of their own."""
        return Trials(self.denoiser, self.runs[:1], [self.runs[0].noise(self.generator)])
