"""Temporal features of a compressed denoiser compared with the original's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from aerogel.data.denoising import Denoising, record
from aerogel.errors import AerogelError
from aerogel.evaluate.measure import Measure, original_of, pipeline_of
from aerogel.model.network import Network
from aerogel.model.time_path import features_of, find
from aerogel.model.trajectories import Trajectories
from aerogel.numerics.temporal import drift, totals
from aerogel.options import Count


@dataclass(frozen=True)
class Temporal(Measure):
    """Temporal features of a denoiser against the original's: error, cosine and mismatch, by step and block.

    A temporal feature is what a block gets to know of the time step: the step alone determines it, no image and no prompt. Each is
    compared with the original's. The mismatch rate is the share of steps and blocks whose feature lies nearer to the original's of
    another step: the block is told the wrong time (arXiv:2311.16503).
    """

    compares: ClassVar[bool] = True
    asked: ClassVar[bool] = True
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})

    steps: Count = 20
    """Sampling steps: those that the model was calibrated for."""

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return steps, layers, errors, cosines and mismatches (of a layer at each step), and error, cosine, least_cosine and mismatch.

        Raises AerogelError where the temporal features depend on more than the step, or a step is none the network was calibrated for.
        """
        if self.steps < 1:
            raise AerogelError(f"steps {self.steps}: a sampler makes at least 1")
        original = original_of(self, against)
        path = find(original)
        path.require_alone()
        pipeline = pipeline_of(original)
        # One image of no prompt in particular: the features see neither.
        calls = record(pipeline, original.module, Denoising(1, self.steps, prompts=("",), batch=1))
        steps = Trajectories.of(original, calls).distinct_steps
        wanted, given = (features_of(side, calls[0], steps) for side in (original, network))
        names = [name for name in wanted if name in path.projections]
        if missing := [name for name in names if name not in given or given[name].shape != wanted[name].shape]:
            raise AerogelError(
                f"{missing[0]} has features of another shape than in the original, or none; compare a model with its own original"
            )
        if broken := [name for name in names if not given[name].isfinite().all()]:
            raise AerogelError(f"{broken[0]} has temporal features that are NaN or infinite; the model's weights are damaged")
        drifts = [drift(wanted[name], given[name]) for name in names]
        return {
            "sampler": type(pipeline.scheduler).__name__,
            "steps": list(steps),
            "layers": names,
            "errors": [one.relative.tolist() for one in drifts],
            "cosines": [one.cosine_T.tolist() for one in drifts],
            "mismatches": [one.mismatch_T.tolist() for one in drifts],
            **totals(drifts)._asdict(),
        }
