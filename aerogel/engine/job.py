"""The job of one run: checks that come before any work, then the steps, then saving what comes out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import torch

from aerogel.engine import provenance, structure_file
from aerogel.engine.calibration import Calibration, Shown, prepare, reading
from aerogel.engine.coverage import coverage
from aerogel.engine.estimates import needs_calls
from aerogel.engine.numbers import check_activations, check_weights
from aerogel.engine.planning import Plan, plan_network
from aerogel.engine.preflight import check_calls, check_output, check_plan, partial_of
from aerogel.engine.progress import Watch
from aerogel.engine.result import Result, save_locked, write
from aerogel.engine.resume import Progress, fingerprint_of, resumable
from aerogel.engine.sharing import check_shares, in_full
from aerogel.engine.stages import reaches_around
from aerogel.errors import AerogelError
from aerogel.evaluate.measure import Measure
from aerogel.io import save
from aerogel.io.adapters import adapter_in
from aerogel.io.checkpoint import Checkpoint
from aerogel.io.engines import Engine
from aerogel.io.older import SCHEMA
from aerogel.io.quantized import fuse_activations
from aerogel.io.record.measures import Metrics
from aerogel.io.record.schema import KeptModule, PlanRecord, RecipeRecord, Record
from aerogel.model.network import Network
from aerogel.model.processes import Processes
from aerogel.recipe import Recipe

if TYPE_CHECKING:
    from aerogel.engine.run import Run


@dataclass
class Job:
    """A run from its checks to its result."""

    network: Network
    recipe: Recipe
    output: Path | None
    seed: int
    processes: Processes
    engine: Engine | None = None
    """The engine that has to open the result, if one has to."""
    plan: Plan = field(init=False)

    def recall_structure(self) -> None:
        """Take over the structure that an unfinished run has found."""
        if self.output is not None:
            structure_file.recall(self.network, partial_of(self.output))

    def check(self, read: Shown, resume: bool) -> Calibration:
        """Look for everything that would make the run fail; the quick looks come first. What is in files is looked at by one process."""
        network, of_first = self.network, self.processes.of_first
        if resume and (network.checkpoint is None or self.output is None):
            raise AerogelError(_not_resumable(network))
        self.plan = plan_network(network, self.recipe, reading(network, read), processes=self.processes, engine=self.engine)
        check_plan(self.plan)
        output, needed = self.output, 2 * self.plan.predicted_bytes + self.plan.activation_bytes
        if output is not None:
            of_first(lambda: check_output(output, needed, network.origin, resume))
        steps = self.recipe.steps
        calibration = Calibration(())
        if needs_calls(self.recipe):
            calibration = prepare(network, read, self.seed, head=reaches_around(network, steps))
            check_calls(network, self.recipe, calibration.calls)
            check_shares(self.recipe, calibration.calls, self.processes)
        of_first(lambda: check_weights(network))
        if needs_calls(self.recipe):
            of_first(lambda: check_activations(network, read))
        return calibration

    def expected(self, measures: Sequence[str | Measure] | None) -> dict[Any, float]:
        """Seconds that the stages will take, as far as the plan can tell."""
        unmeasured = measures is not None and not measures
        return {**self.plan.seconds, **({"evaluate": 0.0} if unmeasured else {}), **({} if self.output else {"save": 0.0})}

    def record(self, calibration: Calibration) -> Record:
        """Return the record as it is before the run."""
        return Record(
            schema_number=SCHEMA,
            model=provenance.model_of(self.network),
            recipe=RecipeRecord(**self.recipe.as_dict()),
            provenance=provenance.provenance_of(self.network, self.seed, calibration.facts | self._of_processes()),
            metrics=Metrics(),
            journal=[],
            kept=[KeptModule(**vars(kept)) for kept in self.plan.kept],
            plan=PlanRecord(
                layers=len(self.plan.touched),
                share_reached=self.plan.share_reached,
                predicted_bytes=self.plan.predicted_bytes,
                peak_memory_bytes=self.plan.peak_memory_bytes,
                device_memory_bytes=self.plan.device_memory_bytes,
            ),
        )

    def _of_processes(self) -> dict[str, str]:
        """How several processes shared the run, for the report."""
        told = [f"{self.processes.count} processes", *in_full(self.network, self.recipe, self.processes)]
        return {} if self.processes.alone else {"processes": "; ".join(told)}

    def run(self, run: Run, record: Record, watch: Watch) -> Result:
        """Do the steps and save what comes out."""
        if self.network.checkpoint is None:
            return self._run_live(run, record, watch)
        if self.output is not None:
            record = self._run_lazily(run, record, watch, self.output)
            return Result(self.recipe, record, run.policies, folder=self.output, device=self.network.device, source=self.network.source)
        keep = Path(self.processes.of_first(lambda: mkdtemp(prefix="aerogel-")))
        with ExitStack() as stack:
            if self.processes.first:
                stack.callback(shutil.rmtree, keep, ignore_errors=True)
            record = self._run_lazily(run, record, watch, keep / "model")
            stack.pop_all()
        device, source, own = self.network.device, self.network.source, keep if self.processes.first else None
        return Result(self.recipe, record, run.policies, folder=keep / "model", keep=own, device=device, source=source)

    def _go(self, run: Run, record: Record, watch: Watch) -> Record:
        with watch.stage("compress"):
            run.go()
        made_with = record.provenance.as_dict()
        if run.batches.halvings:
            made_with["calibration"] = {**made_with["calibration"], "memory": run.batches.told}
        return record.replaced(journal=run.journal, coverage=coverage(self.network, run.policies), provenance=made_with)

    def _run_lazily(self, run: Run, record: Record, watch: Watch, output: Path) -> Record:
        source, partial = self.network.checkpoint, partial_of(output)
        assert source is not None
        made_of = self.processes.of_first(lambda: self._made_of(source, run.calibration))
        run.progress = progress = Progress.open(partial, self.network, source, made_of, self.processes)
        self.processes.of_first(lambda: structure_file.keep(self.network, partial))
        with self._resumable(partial):
            record = self._go(run, record, watch)

        def saved() -> Record:
            with self._resumable(partial), watch.stage("save"), save.new_folder(output) as folder:
                whole = write(folder, self.network, record, run.policies, progress.tensors())
            shutil.rmtree(partial, ignore_errors=True)
            return whole

        return self.processes.of_first(saved)

    def _resumable(self, partial: Path) -> AbstractContextManager[None]:
        """Say, where the disk fails, that finished blocks are kept; a temporary folder goes with the run."""
        return resumable(partial) if self.output is not None else nullcontext()

    def _made_of(self, source: Checkpoint, calibration: Calibration) -> dict[str, Any]:
        """Return the parts that a resumed run is compared with the unfinished one by."""
        return {
            "model": fingerprint_of(source),
            "recipe": self.recipe.as_dict(),
            "seed": self.seed,
            "dtype": provenance.dtype_name(self.network.source.dtype) if self.network.source else None,
            "data": calibration.facts.get("fingerprint"),
            "versions": provenance.versions(),
            "threads": torch.get_num_threads(),
            "device": self.network.device.type,
            "calls": len(calibration.calls),
            "number of processes": self.processes.count,
            "adapter": _adapter_of(self.network),
        }

    def _run_live(self, run: Run, record: Record, watch: Watch) -> Result:
        record = self._go(run, record, watch)
        fuse_activations(self.network.module)
        result = Result(self.recipe, record, run.policies, network=self.network)
        if (output := self.output) is not None:
            with watch.stage("save"):
                self.processes.of_first(lambda: save_locked(result, output))
            result.folder = output
        return result


def _not_resumable(network: Network) -> str:
    """Say why a run cannot go on where another stopped."""
    if network.source is None or network.checkpoint is not None:
        return "only a model opened from a folder and saved to an output can be resumed"
    return (
        f"{network.origin or network.source.folder} is held in memory whole while it is compressed, as denoisers are, so nothing of an "
        "unfinished run is kept; leave resume out to start again"
    )


def _adapter_of(network: Network) -> dict[str, Any] | None:
    """Return the fingerprint of the LoRA adapter that is merged into a model; None without one."""
    folder = None if network.source is None else network.source.adapter
    adapter = None if folder is None else adapter_in(folder)
    return None if adapter is None else adapter.fingerprint
