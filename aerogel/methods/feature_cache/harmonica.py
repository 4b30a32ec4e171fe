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
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

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
from aerogel.runtime.feature_cache.router import BOUND, RouterState, RouterTraining
from aerogel.runtime.feature_cache.schedule import Schedule, rows_of
from aerogel.runtime.feature_cache.sharding import shares_of
from aerogel.runtime.feature_cache.trials import Trials, mean_square
from aerogel.runtime.policy_state import PolicyState, saved_as
from aerogel.training.distributed import averaged, group_size, of_first, share, variance

Proxy = Literal["leave_one_out", "cumulative", "none"]
_HIGHEST = 1 / (1 + math.exp(-BOUND))
"""The first step's scores are there from the start and never move, so that it always computes."""
_START, _SPREAD = 1.0, 0.3
"""Mean and deviation of the others at the start (published: 0 and 1, for ten times as many trajectories)."""
_FORWARDS = 4
"""About how many forwards an update takes: the teacher's, the student's and twice as much for gradients."""
_STEERING = 0.05
"""Rate at which the penalty's weight follows the budget: its logarithm moves by so much a trajectory while nothing is saved."""


@dataclass(frozen=True, eq=False, kw_only=True)
class HarmonicaState(RouterState):
    """A schedule that was decoded from a router, or searched from there on."""

    lambda_T: Tensor = field(metadata=saved_as("lambda"))
    """Weight of each step's error in the loss (T): how the final image moves by it, 1 on average."""
    penalty: float
    """Weight of the scores' sum in the end."""
    decoded: tuple[str, ...] | None = None
    """The router's own schedule where a search went on from it, as `computed`."""


@dataclass(frozen=True)
class Harmonica(BudgetedCachePolicy[HarmonicaState]):
    """Learns which attention and FFN outputs of a denoiser to cache at which steps, for an exact budget.

    Without a budget (neither `ratio` nor `target_speedup`) the penalty stays as it is and the threshold decides, as published.
    """

    shares_calls: ClassVar[bool] = True
    state: ClassVar[type[PolicyState]] = HarmonicaState

    trajectories: Count = 200
    """Generations to train on (published: 2000 for 10 steps); each is of as many images as were recorded at once."""
    rate: Positive = 0.1
    """Learning rate of Adam (published: 0.01 for ten times as many trajectories)."""
    threshold: Annotated[float, Field(ge=0, lt=_HIGHEST)] = 0.1
    """A module with a score above it refreshes what is kept; without a budget, one with a score up to it is reused."""
    proxy: Proxy = "leave_one_out"
    """Weights of the steps: how the final image moves when a step alone computes everything, or when it joins those before it that
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
    """Store only the input of each block in training and recompute the block for gradients: slower, and less memory (published:
    no)."""
    fsdp: bool = False
    """Let each of several processes hold a part of the weights only (FSDP2): slower, and less memory. One process holds them all."""

    @property
    def shards_weights(self) -> bool:
        """True where `fsdp` asks for it."""
        return self.fsdp

    @property
    def budgeted(self) -> bool:
        """True where a budget is asked for."""
        return self.ratio is not None or self.target_speedup is not None

    def check_budget(self, network: Network, steps: int) -> None:
        """Check a budget where there is one."""
        if self.budgeted:
            super().check_budget(network, steps)

    def check_ratio(self, budget: Budget, steps: int) -> None:
        """Raise AerogelError where the bound on steps in a row forbids what the ratio asks for."""
        budget.with_max_reuse(self.max_age, steps)

    def budget(self, network: Network, trajectories: Trajectories) -> Budget:
        """Return the budget, by the costs that the first process measures; raises AerogelError also where max_age forbids it.

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

    def calibrate(self, network: Network, calls: Sequence[Call]) -> HarmonicaState:
        """Train, decode, search.

        Raises AerogelError when the calls do not replay or do not divide by the processes, or the budget cannot be met.
        """
        trajectories = Trajectories.of(network, calls)
        budget = self.budget(network, trajectories)
        runs, modules = replays(network, trajectories), tuple(cached_modules_of(network))
        generator = torch.Generator().manual_seed(int(of_first(torch.tensor(torch.initial_seed() % 2**63))))
        with controlled(network) as denoiser, checkpointing_blocks(denoiser) if self.checkpointing else nullcontext():
            training = HarmonicaTraining(self, denoiser, runs, budget, generator)
            training.run(self.trajectories, self.refresh)
            mask_TN = decoded_TN = training.decoded()
            training.note(self.trajectories, decoded=mask_TN)
            if self.search:
                mask_TN = training.searched(mask_TN)
            found = training.state(Schedule(runs[0].steps, trajectories.sampler, modules, mask_TN, trajectories.precision))
        decoded = rows_of(decoded_TN) if self.search else None
        return HarmonicaState(**vars(found), lambda_T=training.lambda_T, penalty=training.penalty, decoded=decoded)


class HarmonicaTraining(RouterTraining):
    """Trains along whole trajectories: each generation moves the scores of all steps once."""

    counts: ClassVar[str] = "trajectories"

    def __init__(
        self, options: Harmonica, denoiser: ControlledDenoiser, runs: Sequence[Replay], budget: Budget, generator: torch.Generator
    ) -> None:
        self.options = options
        logits_TN = _START + _SPREAD * torch.randn(len(runs[0].calls), len(budget.cost_N), generator=generator)
        logits_TN[0] = BOUND
        super().__init__(denoiser, runs, budget, generator, dict(enumerate(logits_TN)), options.rate, options.threshold)
        self.rows[0].requires_grad_(False)
        self.refreshes_above = options.threshold
        self.shares = shares_of(runs)
        """Of each generation, what this process makes of it; noise is drawn for the whole, so that it is the same in any number of them."""
        self.lambda_T = torch.ones(self.shape[0])
        self.penalty = options.penalty
        cost_N = torch.tensor(budget.cost_N)
        self.weight_N = cost_N / cost_N.mean()
        self.measure_on(*self.begin())

    def scores(self) -> Tensor:
        """Return the scores (T, N) as they are; in one sigmoid, since row by row the last bit may be another."""
        return torch.stack([row_N.detach() for row_N in self.rows.values()]).sigmoid()

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over all processes."""
        return averaged(x)

    def begin(self) -> tuple[Replay, State]:
        """Draw new noise for one of the recorded generations."""
        number = self.drawn(len(self.runs))
        return self.shares[number], self._noise(number)

    def _noise(self, number: int) -> State:
        whole = self.runs[number].noise(self.generator)
        return replace(whole, x_BCHW=share(whole.x_BCHW))

    def update(self) -> None:
        """Train on one trajectory, and move the penalty's weight towards the budget."""
        self.trajectory(*self.begin())
        self._steer()

    def trajectory(self, run: Replay, state: State) -> None:
        """One generation: the student goes its own way, and each row is moved once, by the step that it belongs to."""
        with torch.no_grad():
            made, held = self.denoiser.step(run.call(state), self.rows[0].sigmoid(), self.denoiser.empty)
        state = run.advance(state, output_of(made))
        while state.step < self.shape[0]:
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
            self.move(row_N, self.lambda_T[state.step] * apart + self.penalty * (self.weight_N * score_N).sum())
        return run.advance(state, given), held

    def _steer(self) -> None:
        """Move the penalty's weight towards the budget."""
        if not self.options.budgeted:
            return
        reached = self.budget.saved(self.hard()) / max(self.budget.saving, 1e-12)
        self.penalty *= math.exp(_STEERING * max(-1.0, 1 - reached))

    @torch.no_grad()
    def measure(self, number: int) -> None:
        """Measure anew what the final image owes to each step, and what thresholds make of the scores."""
        soft, along = self._along()
        if self.options.proxy != "none":
            found_T = averaged(self._left_out(soft, along) if self.options.proxy == "leave_one_out" else self._joined(along))
            self.lambda_T = found_T / found_T[1:].mean().clamp(min=torch.finfo(torch.float32).tiny)
        self.note(number, soft)

    @property
    def conditions(self) -> dict[str, float]:
        """Return the log's values beside errors: the penalty's weight."""
        return {"penalty": self.penalty}

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
        """Return how the final image (mean square) moves when a step alone computes everything; the first step does anyway."""
        scores_TN, found = self.scores(), [0.0]
        for step in range(1, self.shape[0]):
            rows: list[Row] = [[True] * self.shape[1], *scores_TN[step + 1 :]]
            found.append(mean_square([self.finish(*along[step], rows)], [soft]))
        return torch.tensor(found)

    def _joined(self, along: list[tuple[State, CacheContents]]) -> Tensor:
        """Return how the final image moves when a step reuses too, after all steps before it do and none behind it does."""
        everything = [[True] * self.shape[1]] * self.shape[0]
        images = [self.finish(*along[step + 1], everything[step + 1 :]) for step in range(self.shape[0])]
        return torch.tensor([0.0, *(mean_square([after], [before]) for before, after in pairwise(images))])

    def decoded(self) -> Tensor:
        """The schedule of the budget: lowest scores first; of equal ones those that cost the image least for what they save.

        Without a budget the schedule of the threshold, which from then on is the budget.
        """
        if not self.options.budgeted:
            mask_TN = self.budget.enforce(self.hard())
            self.budget = replace(self.budget, saving=self.budget.saved(mask_TN))
            return mask_TN
        return self.lowest_first(lambda step, module: (float(self.lambda_T[step]) / max(self.budget.cost_N[module], 1e-12),))

    @torch.no_grad()
    def searched(self, mask_TN: Tensor) -> Tensor:
        """Improve by trials on noise of their own: once from whole steps, with half of them or fewer, then from the router's schedule."""
        trials = self.trials()
        search = Search(trials, self.budget, self.options.search // 2)
        other_TN = search.swaps(search.single_modules(search.whole_steps(self.shape)))
        search.limit = self.options.search
        return min((search.swaps(mask_TN), other_TN), key=trials.error)

    def trials(self) -> Trials:
        """Return trials of about as many images as `samples` says, with noise of their own."""
        images = len(self.fixed[1].x_BCHW) * group_size()
        numbers = [number % len(self.runs) for number in range(math.ceil(self.options.samples / images))]
        return Trials(self.denoiser, [self.shares[number] for number in numbers], [self._noise(number) for number in numbers], shared=True)

    def unseen(self) -> Trials:
        """Return trials of the first recorded generation, with noise of their own."""
        return Trials(self.denoiser, self.shares[:1], [self._noise(0)], shared=True)
