"""HarmoniCa: a router of one score a step and module is trained along whole trajectories, without images (arXiv:2410.01723).

T steps, N modules, B samples. A score is the share of a module's new output that goes into what it gives; the rest is what it gave before.
Published: step-wise denoising training (SDT) and the image error proxy-guided objective (IEPO). Ours: losses in relative units, the
penalty's weight steered to the asked budget, exact decoding, forked proxies at half the cost, and the local search behind. In a group of
processes each goes along with its share of the images, and what comes out is what one process makes of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from aerogel.methods.base import CalibrationSize, CostEstimate
from aerogel.methods.feature_cache.policy import BudgetedCachePolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, CountOrZero, NonNegative, Positive
from aerogel.runtime.feature_cache.budgets import Budget
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.checkpointing import checkpointing_blocks
from aerogel.runtime.feature_cache.controlled import CacheContents, ControlledDenoiser, Row, controlled
from aerogel.runtime.feature_cache.masks import Search
from aerogel.runtime.feature_cache.replay import Replay, State, output_of, replays
from aerogel.runtime.feature_cache.schedule import Schedule
from aerogel.runtime.feature_cache.sharding import shares_of
from aerogel.runtime.feature_cache.trials import Trials, mean_square
from aerogel.training.distributed import averaged, group_size, of_first, share, variance
from aerogel.training.fit import progressed

Proxy = Literal["leave_one_out", "cumulative", "none"]
_BOUND = 5.0
"""Scores before the sigmoid stay within it; the first step's are there from the start and never move, so that it always computes."""
_HIGHEST = 1 / (1 + math.exp(-_BOUND))
_START, _SPREAD = 1.0, 0.3
"""Mean and deviation of the others at the start (published: 0 and 1, for ten times as many trajectories)."""
_FORWARDS = 4
"""About how many forwards an update takes: the teacher's, the student's and twice as much for gradients."""
_STEERING = 0.05
"""How fast the penalty's weight follows the budget: its logarithm moves by so much a trajectory while nothing is saved."""


@dataclass(frozen=True)
class Harmonica(BudgetedCachePolicy):
    """Learns which attention and FFN outputs of a denoiser to cache at which steps, for an exact budget.

    Without a budget (neither `ratio` nor `target_speedup`) the penalty stays as it is and the threshold decides, as published.
    """

    trajectories: Count = 200
    """Generations to train on (published: 2000 for 10 steps); each is of as many images as were recorded at once."""
    rate: Positive = 0.1
    """Learning rate of Adam (published: 0.01 for ten times as many trajectories)."""
    threshold: Annotated[float, Field(ge=0, lt=_HIGHEST)] = 0.1
    """A module with a score above it refreshes what is kept; without a budget, one with a score up to it is reused."""
    proxy: Proxy = "leave_one_out"
    """What weighs the steps: how the final image moves when a step alone computes everything, or when it joins those before it that
    reuse (as the released code has it); `none` weighs all alike."""
    refresh: Count = 50
    """Trajectories between two measurements of the proxy."""
    penalty: NonNegative = 3e-4
    """Weight of the scores' sum at the start, against relative errors; from there it is steered to the budget, if there is one."""
    search: CountOrZero = 0
    """Trials of a local search: half of them from the best complete steps, the others from the learned one; the better result is kept."""
    samples: Count = 32
    """Images that are made in each trial."""
    max_age: CountOrZero = 0
    """Steps in a row at which a module may be reused, in the schedule that comes out; 0 is without bound (as published)."""
    checkpointing: bool = False
    """Whether training stores only the input of each block and recomputes the block for gradients: slower, and less memory (published:
    no)."""

    @property
    def budgeted(self) -> bool:
        """Whether a budget is asked for."""
        return self.ratio is not None or self.target_speedup is not None

    def check_budget(self, network: Network, steps: int) -> None:
        """Check a budget where there is one."""
        if self.budgeted:
            super().check_budget(network, steps)

    def check_ratio(self, budget: Budget, steps: int) -> None:
        """Raise AerogelError where the bound on steps in a row forbids what the ratio asks for."""
        budget.with_max_reuse(self.max_age, steps)

    def budget(self, network: Network, trajectories: Trajectories) -> Budget:
        """What has to be saved, by the costs that the first process measures; raises AerogelError also where max_age forbids it.

        Nothing, and all modules cost the same, where a threshold decides.
        """
        mine = super().budget(network, trajectories) if self.budgeted else Budget((1.0,) * len(cached_modules_of(network)), 0.0)
        saving, *cost_N = of_first(torch.tensor([mine.saving, *mine.cost_N], dtype=torch.float64)).tolist()
        return Budget(tuple(cost_N), saving).with_max_reuse(self.max_age, len(trajectories.steps))

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """A teacher, a student and its gradients at each step; proxies, each of half a generation; trials, the same, in both branches."""
        trained = self.trajectories * size.steps * _FORWARDS
        proxies = self.trajectories / self.refresh * size.steps**2 / 2
        return CostEstimate(model_tokens=(trained + proxies) * size.at_once + self.search * size.steps * self.samples * size.sample)

    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Train, decode, search.

        Raises AerogelError when the calls do not replay or do not divide by the processes, or the budget cannot be met.
        """
        trajectories = Trajectories.of(network, calls)
        budget = self.budget(network, trajectories)
        runs, modules = replays(network, trajectories), tuple(cached_modules_of(network))
        generator = torch.Generator().manual_seed(int(of_first(torch.tensor(torch.initial_seed() % 2**63))))
        with controlled(network) as denoiser, checkpointing_blocks(denoiser) if self.checkpointing else nullcontext():
            training = _Training(self, denoiser, runs, budget, len(modules), generator)
            training.run()
            mask_TN = decoded_TN = training.decoded()
            training.note(mask_TN)
            if self.search:
                mask_TN = training.searched(mask_TN)
            unseen = training.unseen()
            error, without = unseen.error(mask_TN), unseen.error(torch.ones_like(mask_TN))
        found = Schedule(runs[0].steps, trajectories.sampler, modules, mask_TN)
        router = {"decoded": replace(found, computed_TN=decoded_TN).as_state()["computed"]} if self.search else {}
        return found.as_state() | router | {
            "scores": training.scores(), "lambda": training.lambda_T, "penalty": training.penalty, "guidance": runs[0].guidance,
            "error": error, "error_without_reuse": without, "log": training.log,
        }  # fmt: skip


@dataclass
class _Training:
    """A router on its way."""

    options: Harmonica
    denoiser: ControlledDenoiser
    runs: Sequence[Replay]
    budget: Budget
    modules: int
    generator: torch.Generator
    log: list[dict[str, float]] = field(default_factory=list)
    """At each measurement of the proxy: trajectories so far, share of cache entries reused, error of the soft and of the hard schedule."""

    def __post_init__(self) -> None:
        self.shares = shares_of(self.runs)
        """Of each generation, what this process makes of it; noise is drawn for the whole, so that it is the same in any number of them."""
        self.steps = len(self.runs[0].calls)
        logits_TN = _START + _SPREAD * torch.randn(self.steps, self.modules, generator=self.generator)
        logits_TN[0] = _BOUND
        self.rows = [nn.Parameter(row_N) for row_N in logits_TN]
        self.rows[0].requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.rows[1:], lr=self.options.rate, weight_decay=0.0)
        self.lambda_T = torch.ones(self.steps)
        self.penalty = self.options.penalty
        cost_N = torch.tensor(self.budget.cost_N)
        self.weight_N = cost_N / cost_N.mean()
        self.fixed = self._begin()
        """Of the proxies: always the same noise."""
        self.exact = self.fixed[0].finish(self.fixed[1], lambda _, call: output_of(self.denoiser.wanted(call)))

    def run(self) -> None:
        """Train on all trajectories."""
        for number in range(self.options.trajectories):
            if number % self.options.refresh == 0:
                self.refresh(number)
            self.trajectory(*self._begin())
            self._steer()
            progressed((number + 1) / self.options.trajectories)

    def _begin(self) -> tuple[Replay, State]:
        """New noise for one of the recorded generations."""
        number = int(torch.randint(len(self.runs), (), generator=self.generator))
        return self.shares[number], self._noise(number)

    def _noise(self, number: int) -> State:
        whole = self.runs[number].noise(self.generator)
        return replace(whole, x_BCHW=share(whole.x_BCHW))

    def trajectory(self, run: Replay, state: State) -> None:
        """One generation: the student goes its own way, and each row is moved once, by the step that it belongs to."""
        with torch.no_grad():
            made, held = self.denoiser.step(run.call(state), self.rows[0].sigmoid(), self.denoiser.empty)
        state = run.advance(state, output_of(made))
        while state.step < self.steps:
            state, held = self._step(run, state, held)

    def _step(self, run: Replay, state: State, held: CacheContents) -> tuple[State, CacheContents]:
        call, row_N = run.call(state), self.rows[state.step]
        with torch.no_grad():
            wanted = run.guided(output_of(self.denoiser.wanted(call)))
        with torch.enable_grad():
            score_N = row_N.sigmoid()
            made, held = self.denoiser.step(call, score_N, held, self.options.threshold)
            given = output_of(made)
            apart = (run.guided(given) - wanted).float().square().mean() / variance(wanted)
            loss = self.lambda_T[state.step] * apart + self.penalty * (self.weight_N * score_N).sum()
            self.optimizer.zero_grad(set_to_none=True)
            row_N.grad = averaged(torch.autograd.grad(loss, row_N)[0])
            self.optimizer.step()
        with torch.no_grad():
            row_N.clamp_(-_BOUND, _BOUND)
        return run.advance(state, given), held

    def scores(self) -> Tensor:
        """The scores (T, N) as they are."""
        return torch.stack([row_N.detach() for row_N in self.rows]).sigmoid()

    def hard(self) -> Tensor:
        """Which modules compute (T, N) if scores up to the threshold reuse."""
        return self.scores() > self.options.threshold

    def _steer(self) -> None:
        """Move the penalty's weight towards the budget."""
        if not self.options.budgeted:
            return
        reached = self.budget.saved(self.hard()) / max(self.budget.saving, 1e-12)
        self.penalty *= math.exp(_STEERING * max(-1.0, 1 - reached))

    @torch.no_grad()
    def refresh(self, number: int) -> None:
        """Measure anew what the final image owes to each step, and what thresholds make of the scores."""
        soft, along = self._along()
        if self.options.proxy != "none":
            found_T = averaged(self._left_out(soft, along) if self.options.proxy == "leave_one_out" else self._joined(along))
            self.lambda_T = found_T / found_T[1:].mean().clamp(min=torch.finfo(torch.float32).tiny)
        self._log(number, soft=soft, hard=self._hardened(self.hard()))

    def _log(self, number: int, **images: Tensor) -> None:
        mine = [mean_square([image], [self.exact]) for image in images.values()]
        errors = dict(zip((f"{name}_error" for name in images), averaged(torch.tensor(mine, dtype=torch.float64)).tolist(), strict=True))
        reused = 1 - float(self.hard().float().mean())
        self.log.append({"trajectories": float(number), "reused": reused, "penalty": self.penalty, **errors})

    def _hardened(self, mask_TN: Tensor) -> Tensor:
        """The final image under a mask."""
        return self._finish(self.fixed[1], self.denoiser.empty, mask_TN.tolist())

    def _along(self) -> tuple[Tensor, list[tuple[State, CacheContents]]]:
        """The final image under soft scores, and what the trajectory and the cache entries were before each step and at the end."""
        run, state = self.fixed
        along, held, state = [], self.denoiser.empty, state.fork()
        for score_N in self.scores():
            along.append((state.fork(), held))
            made, held = self.denoiser.step(run.call(state), score_N, held, self.options.threshold)
            state = run.advance(state, output_of(made))
        return state.x_BCHW, [*along, (state, held)]

    def _left_out(self, soft: Tensor, along: list[tuple[State, CacheContents]]) -> Tensor:
        """How the final image (mean square) moves when a step alone computes everything; the first step does anyway."""
        scores_TN, found = self.scores(), [0.0]
        for step in range(1, self.steps):
            rows: list[Row] = [[True] * self.modules, *scores_TN[step + 1 :]]
            found.append(mean_square([self._finish(*along[step], rows)], [soft]))
        return torch.tensor(found)

    def _joined(self, along: list[tuple[State, CacheContents]]) -> Tensor:
        """How the final image moves when a step reuses too, after all steps before it do and none behind it does."""
        everything = [[True] * self.modules] * self.steps
        images = [self._finish(*along[step + 1], everything[step + 1 :]) for step in range(self.steps)]
        return torch.tensor([0.0, *(mean_square([after], [before]) for before, after in pairwise(images))])

    def _finish(self, state: State, held: CacheContents, rows: Sequence[Row]) -> Tensor:
        run, state = self.fixed[0], state.fork()
        for row in rows:
            made, held = self.denoiser.step(run.call(state), row, held, self.options.threshold)
            state = run.advance(state, output_of(made))
        return state.x_BCHW

    def decoded(self) -> Tensor:
        """The schedule of the budget: lowest scores first; of equal ones those that cost the image least for what they save.

        Without a budget the schedule of the threshold, which from then on is the budget.
        """
        if not self.options.budgeted:
            mask_TN = self.budget.enforce(self.hard())
            self.budget = replace(self.budget, saving=self.budget.saved(mask_TN))
            return mask_TN
        scores_TN = self.scores()
        entries = [(step, module) for step in range(1, self.steps) for module in range(self.modules)]
        order = sorted(
            entries, key=lambda entry: (float(scores_TN[entry]), float(self.lambda_T[entry[0]]) / max(self.budget.cost_N[entry[1]], 1e-12))
        )
        return self.budget.decoded(order, (self.steps, self.modules))

    @torch.no_grad()
    def note(self, mask_TN: Tensor) -> None:
        """Measure once more, for the log: what was learned, and the schedule that came out."""
        soft, _ = self._along()
        self._log(self.options.trajectories, soft=soft, hard=self._hardened(self.hard()), decoded=self._hardened(mask_TN))

    @torch.no_grad()
    def searched(self, mask_TN: Tensor) -> Tensor:
        """Improve by trials on noise of their own: once from whole steps, with half of them or fewer, then from the router's schedule."""
        trials = self._trials()
        search = Search(trials, self.budget, self.options.search // 2)
        other_TN = search.swaps(search.single_modules(search.whole_steps((self.steps, self.modules))))
        search.limit = self.options.search
        return min((search.swaps(mask_TN), other_TN), key=trials.error)

    def _trials(self) -> Trials:
        images = len(self.fixed[1].x_BCHW) * group_size()
        numbers = [number % len(self.runs) for number in range(math.ceil(self.options.samples / images))]
        return Trials(self.denoiser, [self.shares[number] for number in numbers], [self._noise(number) for number in numbers], shared=True)

    def unseen(self) -> Trials:
        """Trials of the first recorded generation, with noise of their own."""
        return Trials(self.denoiser, self.shares[:1], [self._noise(0)], shared=True)
