"""The engine: `compress` checks, walks, saves and measures; `Run.go` is the only loop over the steps of a recipe.

Neighbouring block methods share one walk. A network whose weights are not resident is compressed block by block through a progress
folder beside the output: memory holds about two blocks, and a killed run goes on where it stopped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from aerogel.engine import policies
from aerogel.engine.calibration import Calibration, CalibrationInput, shown, with_batch_size
from aerogel.engine.estimates import needs_teacher
from aerogel.engine.in_parts import in_parts, wants_parts
from aerogel.engine.job import Job
from aerogel.engine.numbers import check_answers
from aerogel.engine.opening import open_model
from aerogel.engine.policies import CalibratedPolicy, Parameters
from aerogel.engine.progress import Event, Tell, Watch
from aerogel.engine.result import Result
from aerogel.engine.resume import Progress, Stage
from aerogel.engine.scores import Scores, measure
from aerogel.engine.sharing import reads_calls, shares_calls
from aerogel.engine.stages import quantizes_weights, reaches_around, seeded, stages_of
from aerogel.engine.teacher import TeacherWalk, residency_of, resident, teacher_of
from aerogel.engine.visits import before_again, compress_block
from aerogel.evaluate.measure import Measure
from aerogel.io.engines import engine_of
from aerogel.io.locks import locked
from aerogel.io.record import files
from aerogel.io.source import ModelSource
from aerogel.kernels.malloc import limit_fragmentation
from aerogel.methods.base import BlockMethod, Method, RuntimePolicy
from aerogel.model.batches import Batches
from aerogel.model.block import Block
from aerogel.model.network import Network
from aerogel.model.placement import AUTO, Device, fitting
from aerogel.model.processes import ALONE, Processes
from aerogel.model.walk import InMemory, Walk, blocks_of
from aerogel.recipe import Recipe, Step
from aerogel.training.fit import watched


def compress(
    model: Network | nn.Module | ModelSource | str | Path,
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    output: str | Path | None = None,
    overrides: Iterable[str] = (),
    samples: CalibrationInput | None = None,
    measures: Sequence[str | Measure] | None = None,
    seed: int = 0,
    resume: bool = False,
    device: Device = AUTO,
    batch_size: int | Literal["auto"] = AUTO,
    processes: Processes = ALONE,
    engine: str | None = None,
    tell: Tell = lambda event: None,
) -> Result:
    """Compress a model by a recipe; with `output` the result is saved there.

    A live module is changed in place; a model opened from a folder is not held in memory, and its source is only read. `measures`
    are names or Measure values (all that fit by default, none if empty). With `resume` an unfinished run for the same output goes on
    and ends with the same bits. `device` computes (see `load`); `batch_size` is how many sequences, chats or images one call of the
    calibration has, which a device with too little memory takes in halves. With several `processes` (`Processes.join()` under torchrun),
    each calls this with the same arguments, and the first one writes and measures. Where an `engine` is named (a key of
    `aerogel.io.engines.ENGINES`, such as vllm), what it does not open is refused. Raises AerogelError before any work when the run could
    not end well.
    """
    watch = Watch(tell)
    checked, wanted = Recipe.parse(recipe, overrides), engine_of(engine)
    named = isinstance(model, str | Path | ModelSource)  # what lives already is in memory anyway, and its speed is measured on the way
    with ExitStack() as held, limit_fragmentation() if named else nullcontext(), fitting("a step of this recipe"):
        if output is not None:
            processes.of_first(partial(_lock, held, Path(output)))
        with watch.stage("load", str(model) if named else ""):
            network = open_model(model, device=device, dequantize=quantizes_weights(checked))
        job = Job(network, checked, Path(output).absolute() if output is not None else None, seed, processes, wanted)
        if resume:
            job.recall_structure()
        with watch.stage("check"):
            if (origin := network.origin) is not None:
                processes.of_first(partial(files.verify, origin))
            calibration = job.check(with_batch_size(shown(network, samples), batch_size, processes.count), resume)
        tell(Event("check", 1, 1, expected=job.expected(measures)))
        record = job.record(calibration)
        before = _scores_of_live(network, measures) if origin is None and processes.first else {}
        run = Run(network, checked, calibration, seed, tell, processes)
        result = job.run(run, record, watch)
    if not processes.first:
        return result
    _warn_of_fallbacks(run.journal)
    if run.batches.halvings:
        warnings.warn(run.batches.told, stacklevel=2)
    result.add(timings=watch.seconds)
    if measures is None or measures:
        try:
            with watch.stage("evaluate"):
                result.add(metrics={**before, **_scores(result, network.source or origin, measures, tell)})
        except torch.OutOfMemoryError:
            warnings.warn(f"not measured: the whole models do not fit into the memory of {network.device}", stacklevel=2)
    result.add(timings=watch.seconds)
    return result


def _scores(result: Result, source: ModelSource | Path | None, measures: Sequence[str | Measure] | None, tell: Tell) -> dict[str, Scores]:
    """Measure what a run made, beside the original where that is in a folder."""
    network = result.network
    original = open_model(source, lazy=False, device=network.device) if source is not None else None
    with policies.on(network, result.policies):
        return measure(network, original, measures, tell, speed=True, side="compressed")


def _scores_of_live(network: Network, measures: Sequence[str | Measure] | None) -> dict[str, Scores]:
    """A module changed in place is measured before; afterwards there is no original to compare with."""
    if measures is not None and not measures:
        return {}
    return measure(network, None, measures, speed=True, side="original")


@dataclass
class Run:
    """A recipe on its way through a network."""

    network: Network
    recipe: Recipe
    calibration: Calibration
    seed: int
    tell: Tell
    processes: Processes = ALONE
    progress: Progress | None = None
    journal: list[dict[str, Any]] = field(default_factory=list)
    policies: list[CalibratedPolicy] = field(default_factory=list)
    parameters: Parameters = field(init=False)
    batches: Batches = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = Parameters(self.network.blocks())
        self.batches = Batches(self.network.placement)

    def go(self) -> None:
        """Do every step; neighbouring block methods share one walk, and the policies calibrated so far are on."""
        stages = stages_of(self.recipe)
        if needs_teacher(self.recipe):
            self.network.teacher = teacher_of(self.network)
        try:
            for number, steps in enumerate(stages):
                self._do(number, steps, len(stages))
        finally:
            self.network.teacher = None

    def _do(self, number: int, steps: Sequence[Step], stages: int) -> None:
        """Do block methods together, or one other step; a policy that revises the one before takes its place."""
        step = steps[0]
        before = policies.superseded(step, self.policies) if isinstance(step.method, RuntimePolicy) else None
        active = self.policies if before is None else self.policies[:-1]
        with ExitStack() as stack:
            for measured in active:
                stack.enter_context(self.parameters.on(self.network, measured))
            if isinstance(step.method, BlockMethod):
                self._visit_blocks(number, steps, stages)
                return
            at = Event("compress", number, stages, step.name)
            self.tell(at)
            with watched(partial(self._inside, at, 0, 1)):
                if isinstance(step.method, Method):
                    self._change_whole(number, step.name, step.method)
                else:
                    self.policies = [*active, self._calibrate(number, step, step.method, before)]

    def _calibrate(self, number: int, step: Step, policy: RuntimePolicy[Any], before: CalibratedPolicy | None) -> CalibratedPolicy:
        with self._held(policy), seeded(self.seed, number):
            self._check_answers(policy)
            return policies.calibrated(self.network, step, self.calibration.calls, before, self.processes)

    @contextmanager
    def _held(self, policy: RuntimePolicy[Any]) -> Iterator[None]:
        """Hold the network, and the teacher where the policy has one, on the device for a while: whole, or this process's part."""
        teacher = self._teacher(policy)
        if not wants_parts(policy):
            with self._resident(), resident(teacher):
                yield
            return
        with ExitStack() as stack:
            stack.enter_context(in_parts(self.network, self.calibration.calls[0], self.progress))
            if teacher is not None:
                stack.enter_context(in_parts(teacher, self.calibration.calls[0], residency_of(teacher)))
            yield

    def _teacher(self, method: Method | RuntimePolicy[Any]) -> Network | None:
        return self.network.teacher if "teacher" in method.requires else None

    def _visit_blocks(self, number: int, steps: Sequence[Step], stages: int) -> None:
        stage = self.progress.stage(number) if self.progress else None
        apart = not reads_calls(steps) and stage is not None and not self.processes.alone
        visits = self._walk(stage, steps) if reads_calls(steps) else self._tour(stage)
        for block in visits:
            at = Event("compress", number * block.total + block.position, stages * block.total, block.name or "around the blocks")
            self.tell(at)
            block.parameters = self.parameters.of(block.name)
            again = before_again(block, visits.again if isinstance(visits, TeacherWalk) else None)
            self.batches.fit(partial(self._change_block, block, steps, number, at), again, block.processes)
            if not (apart and block.name):
                block.copy_first(self.processes)
        self.policies = [self.parameters.taken_over(measured) for measured in self.policies]

    def _change_block(self, block: Block, steps: Sequence[Step], number: int, at: Event) -> None:
        with seeded(self.seed, number, block.position):
            for place, step in enumerate(steps):
                with watched(partial(self._inside, at, place, len(steps))):
                    compress_block(block, step)

    def _restore(self, stage: Stage, names: Iterable[str]) -> None:
        """Take over blocks that an earlier process finished: structure, journal, learned parameters of policies."""
        for finished in stage.restore(names):
            self.journal += finished.notes
            self.parameters.of(finished.block).update(finished.parameters)

    def _inside(self, at: Event, place: int, places: int, share: float) -> None:
        """Tell how far the step in hand has come with the part in hand."""
        self.tell(replace(at, inside=(place + share) / places))

    def _walk(self, stage: Stage | None, steps: Sequence[Step]) -> Iterable[Block]:
        """The blocks with their calls, each put away when it is finished."""
        walk = Walk(
            self.network,
            self.calibration.calls,
            residency=self.progress,
            folder=stage.walk if stage else None,
            finished=self._finish(stage),
            around=reaches_around(self.network, steps),
            batches=self.batches,
            processes=self.processes,
            shares_calls=shares_calls(steps),
        )
        if stage:
            self._restore(stage, walk.order[: walk.position])
        if any("teacher" in step.method.requires for step in steps):
            assert self.network.teacher is not None, "go() makes one"
            folder = stage.walk / "teacher" if stage else None
            return TeacherWalk(walk, self.network.teacher, self.calibration.calls, folder, self.batches)
        return walk

    def _tour(self, stage: Stage | None) -> Iterator[Block]:
        """The blocks without calls, for methods that look at weights only; processes that have them in files each do some of them."""
        finish, start = self._finish(stage, apart=True), len(self.journal)
        done = stage.committed() if stage else set()
        if stage:
            self._restore(stage, (name for name in self.network.blocks() if name in done))
        residency = self.progress or InMemory(self.network)
        *left, around = (block for block in blocks_of(self.network) if block.name not in done)
        mine = left[self.processes.rank :: self.processes.count] if stage else left
        with self.network.glue_on_device():
            for block in mine:
                residency.enter(block.name)
                yield block
                finish(block)
                residency.release(block.name)
            if stage and not self.processes.alone:
                self.processes.wait()
                self._restore(stage, (block.name for block in left if block not in mine))
                place = {name: position for position, name in enumerate(self.network.blocks())}
                self.journal[start:] = sorted(self.journal[start:], key=lambda line: place[line["block"]])
            yield around
            finish(around)

    def _finish(self, stage: Stage | None, apart: bool = False) -> Callable[[Block], None]:
        def finish(block: Block) -> None:
            self.journal += block.notes
            if stage and block.name:
                stage.commit(block, apart)

        return finish

    def _change_whole(self, number: int, step: str, method: Method) -> None:
        """Whole-network steps need the whole network in memory, and are done again when a run is resumed."""
        stage = self.progress.stage(number) if self.progress else None
        with (
            seeded(self.seed, number),
            self._resident(stage),
            resident(self._teacher(method)),
            torch.set_grad_enabled("gradients" in method.requires),
        ):
            self._check_answers(method)
            method.apply(self.network, self.network.placement.bring_calls(self.calibration.calls))
            self.processes.copy_first(self.network.module.state_dict())
        self.journal += [{"method": step, **note} for note in self.network.take_notes()]

    def _check_answers(self, method: Method | RuntimePolicy[Any]) -> None:
        """Refuse a model that overflows before it is measured whole; a cache that is on would take the calls for a generation."""
        cached = any(measured.policy.skips_modules for measured in self.policies)
        if "calls" in method.requires and not cached:
            check_answers(self.network, self.calibration.calls)

    @contextmanager
    def _resident(self, stage: Stage | None = None) -> Iterator[None]:
        """Hold the whole network on the device for a while; with a stage, blocks are put away as they are afterwards."""
        if self.progress is None:
            with self.network.on_device():
                yield
            return
        for name in self.network.blocks():
            self.progress.enter(name)
        yield
        for block in blocks_of(self.network):
            if block.name:
                if stage:
                    stage.commit(block)
                self.progress.release(block.name)


def _lock(held: ExitStack, output: Path) -> None:
    held.enter_context(locked(output))


def _warn_of_fallbacks(journal: Sequence[Mapping[str, Any]]) -> None:
    """Say which linear layers did not get what the recipe asks for, by reason."""
    fallen: dict[str, list[str]] = {}
    for line in journal:
        if line.get("fallback"):
            fallen.setdefault(line["fallback"], []).append(line["name"])
    for reason, names in fallen.items():
        more = f" and {len(names) - 1} other linear layers" if len(names) > 1 else ""
        warnings.warn(f"{names[0]}{more}: {reason}", stacklevel=3)
