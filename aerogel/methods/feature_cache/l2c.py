"""Learning-to-Cache: a router of one score a step and module is trained at every second step, on noised images (arXiv:2406.01733).

T steps, N modules, B samples, C channels, H height, W width. The method learns from data: the original reads the images that its model was
trained on. Here the images are the pipeline's own, the final latents of the recorded generations, and are noised to the level of a step;
the trajectories themselves are not learned from. Steps are counted from the noise on: the second, fourth ... are trained and may reuse
what the step before gave, the others compute everything; so at most half of the cache entries are reused. Ours: exact decoding, odd T too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
from aerogel.runtime.feature_cache.schedule import Schedule
from aerogel.runtime.feature_cache.trials import Trials, mean_square
from aerogel.training.fit import progressed

_BOUND = 5.0
"""Scores before the sigmoid stay within it."""


@dataclass(frozen=True)
class L2c(BudgetedCachePolicy):
    """Learns from noised images which attention and FFN outputs of a denoiser to cache at every second step, for an exact budget."""

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

    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Train and decode; raises AerogelError when the calls do not replay or every second step cannot meet the budget."""
        trajectories = Trajectories.of(network, calls)
        budget = self.budget(network, trajectories)
        _within(budget, len(trajectories.steps))
        _noises(network)
        runs, modules = replays(network, trajectories), tuple(cached_modules_of(network))
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        with controlled(network) as denoiser:
            training = _Training(self, denoiser, runs, budget, generator)
            training.run()
            mask_TN = training.decoded()
            training.note(mask_TN)
            unseen = Trials(denoiser, runs[:1], [runs[0].noise(generator)])
            error, without = unseen.error(mask_TN), unseen.error(torch.ones_like(mask_TN))
        state = Schedule(runs[0].steps, trajectories.sampler, modules, mask_TN).as_state()
        return state | {
            "scores": training.scores(), "guidance": runs[0].guidance, "images": training.images, "error": error,
            "error_without_reuse": without, "log": training.log,
        }  # fmt: skip


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


@dataclass
class _Training:
    """A router on its way."""

    options: L2c
    denoiser: ControlledDenoiser
    runs: Sequence[Replay]
    budget: Budget
    generator: torch.Generator
    images: int = 0
    """Clean images that were noised, repeats included."""
    log: list[dict[str, float]] = field(default_factory=list)
    """At each check: iterations so far, share of cache entries reused, error of the soft and of the hard schedule."""

    def __post_init__(self) -> None:
        self.shape = (len(self.runs[0].calls), len(self.budget.cost_N))
        trained = _trained(self.shape[0])
        logits_RN = torch.randn(len(trained), self.shape[1], generator=self.generator)
        self.rows = {step: nn.Parameter(row_N) for step, row_N in zip(trained, logits_RN, strict=True)}
        """Scores before the sigmoid (N), by step."""
        self.optimizer = torch.optim.AdamW(self.rows.values(), lr=self.options.rate, weight_decay=0.0)
        self.clean = [run.finish(run.start(), self._wanted) for run in self.runs]
        """Final latents (B, C, H, W) of each recorded generation."""
        self.fixed = (self.runs[0], self.runs[0].noise(self.generator))
        """Of the measurements: always the same noise."""
        run, start = self.fixed
        self.exact = run.finish(start, self._wanted)

    def run(self) -> None:
        """All iterations; raises AerogelError when the scores come out not finite."""
        for number in range(self.options.iterations):
            if number % self.options.check == 0:
                self._log(number)
            self.iterate()
            progressed((number + 1) / self.options.iterations)
        if not bool(self.scores().isfinite().all()):
            raise AerogelError(
                f"scores are not finite after {self.options.iterations} iterations: the model, or the original before the recipe, gives "
                "outputs that are not finite; look there first"
            )

    def iterate(self) -> None:
        """Noise clean images, take a whole step, and move the scores of the next step once."""
        step, number = _trained(self.shape[0])[self._drawn(len(self.rows))], self._drawn(len(self.runs))
        run, row_N = self.runs[number], self.rows[step]
        state = self._noised(run, self.clean[number], step - 1)
        with torch.no_grad():
            made, held = self.denoiser.step(run.call(state), [True] * self.shape[1], self.denoiser.empty)
            call = run.call(run.advance(state, output_of(made)))
            wanted = self._wanted(step, call)
        with torch.enable_grad():
            score_N = row_N.sigmoid()
            made, _ = self.denoiser.step(call, score_N, held)
            loss = (output_of(made) - wanted).float().square().mean() + self.options.penalty * score_N.sum()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        with torch.no_grad():
            row_N.clamp_(-_BOUND, _BOUND)

    def _wanted(self, _: int, call: Call) -> Tensor:
        return output_of(self.denoiser.wanted(call))

    def _drawn(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def _noised(self, run: Replay, clean_BCHW: Tensor, step: int) -> State:
        """Clean images under new noise, as they would be before a step."""
        noise_BCHW = torch.randn(clean_BCHW.shape, generator=self.generator).to(clean_BCHW.device, clean_BCHW.dtype)
        sampler, steps_B = copy.deepcopy(run.sampler), run.sampler.timesteps[step].expand(len(clean_BCHW))
        self.images += len(clean_BCHW)
        return State(step, sampler.add_noise(clean_BCHW, noise_BCHW, steps_B), sampler)

    def scores(self) -> Tensor:
        """The scores (T, N) as they are; steps that are not trained compute everything."""
        scores_TN = torch.ones(self.shape)
        for step, row_N in self.rows.items():
            scores_TN[step] = row_N.detach().sigmoid()
        return scores_TN

    def decoded(self) -> Tensor:
        """The schedule of the budget: lowest scores first; of equal ones those that save most, and late steps before early ones."""
        scores_TN = self.scores()
        entries = [(step, module) for step in self.rows for module in range(self.shape[1])]
        order = sorted(entries, key=lambda entry: (float(scores_TN[entry]), -self.budget.cost_N[entry[1]], -entry[0]))
        return self.budget.decoded(order, self.shape)

    def note(self, mask_TN: Tensor) -> None:
        """Measure once more, for the log: what was learned, and the schedule that came out."""
        self._log(self.options.iterations, decoded=mask_TN)

    def _log(self, number: int, **masks: Tensor) -> None:
        scores_TN = self.scores()
        hard_TN = scores_TN > self.options.threshold
        images = {name: self._image(table_TN) for name, table_TN in {"soft": scores_TN, "hard": hard_TN, **masks}.items()}
        errors = {f"{name}_error": mean_square([image], [self.exact]) for name, image in images.items()}
        self.log.append({"iterations": float(number), "reused": 1 - float(hard_TN.float().mean()), **errors})

    def _image(self, table_TN: Tensor) -> Tensor:
        """The final image of the fixed noise under scores or decisions."""
        run, start = self.fixed
        held = self.denoiser.empty

        def denoise(step: int, call: Call) -> Tensor:
            nonlocal held
            row = table_TN[step] if table_TN.is_floating_point() else table_TN[step].tolist()
            made, held = self.denoiser.step(call, row, held)
            return output_of(made)

        return run.finish(start, denoise)
