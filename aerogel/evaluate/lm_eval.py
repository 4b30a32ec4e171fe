"""Tasks of the Language Model Evaluation Harness, from local YAML files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from aerogel.errors import AerogelError
from aerogel.evaluate.measure import Measure, broken_model, require_finite, tokenizer_of
from aerogel.model.hooks import temporary_hooks
from aerogel.model.network import Network
from aerogel.options import Batch, Count


@dataclass(frozen=True)
class LmEval(Measure):
    """Scores on lm-eval tasks, through the harness's own `simple_evaluate` (arXiv 2405.14782).

    Tasks come from a folder of YAML files whose data lie beside them; a task that the harness would fetch needs its cache filled before.
    """

    asked: ClassVar[bool] = True
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})

    tasks: tuple[str, ...] = ()
    """Names of tasks."""
    folder: str | None = None
    """Folder of the tasks' YAML files, besides those that come with lm-eval."""
    limit: Count | None = None
    """Examples of each task at most; None takes all."""
    batch: Batch = 8
    """Requests in one forward."""

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return task -> {metric: value}; raises AerogelError without lm-eval or tasks, for an unknown task, and where results are NaN."""
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise AerogelError("lm_eval needs the lm-eval package: pip install 'aerogel[tasks]'") from error
        if not self.tasks:
            raise AerogelError("lm_eval has no tasks to run; name them (tasks) and the folder of their YAML files (folder)")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise AerogelError(f"lm_eval looks for tasks in {self.folder}, which is no folder; give the folder of their YAML files")
        manager = TaskManager(include_path=self.folder)
        unknown = sorted(set(self.tasks) - set(manager.all_tasks))
        if unknown:
            raise AerogelError(f"lm_eval knows no task {', '.join(unknown)}; give the folder of its YAML file (folder)")
        model = HFLM(pretrained=network.module, tokenizer=tokenizer_of(network), batch_size=self.batch)
        # A task's score can be a number although the logits are none: the largest of several NaN is the first.
        check = network.module.register_forward_hook(lambda _, args, output: require_finite(output.logits, network, "lm_eval"))
        with temporary_hooks([check]):
            answer = simple_evaluate(model=model, tasks=list(self.tasks), task_manager=manager, limit=self.limit, bootstrap_iters=0)
        return {task: _finite(network, task, _numbers(scores)) for task, scores in answer["results"].items()}


def _finite(network: Network, task: str, numbers: dict[str, float]) -> dict[str, float]:
    """Return the metrics of a task; raises AerogelError that names the model where one is NaN or infinite."""
    if broken := next((name for name, value in numbers.items() if not math.isfinite(value)), None):
        raise broken_model(network, "lm_eval", f"a {broken} of {numbers[broken]} on {task}")
    return numbers


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The metrics of one task without the harness's filter suffix, standard errors left out where it did not compute them."""
    return {name.removesuffix(",none"): float(value) for name, value in scores.items() if isinstance(value, int | float)}
