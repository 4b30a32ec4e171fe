"""cache-dit: at which steps all blocks run, as the mask of steps that it reads, and as diffusers' own configuration where that is exact.

Field names and their meaning are those of cache-dit 1.5 and diffusers 0.42.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aerogel.errors import AerogelError
from aerogel.export.cache_policy import caching
from aerogel.export.exporter import Exporter, SavedPolicy, Source
from aerogel.io.record import files
from aerogel.io.save import new_folder
from aerogel.model.family import Family
from aerogel.runtime.feature_cache.block_cache import BlockCacheState, TableRule
from aerogel.runtime.feature_cache.schedule import ScheduleState

_OURS, _THEIRS = "cache_dit.yaml", "diffusers.yaml"


@dataclass(frozen=True)
class CacheDit(Exporter):
    """The steps at which a policy runs all blocks: as cache-dit's mask, and as diffusers' TaylorSeer configuration where that is exact."""

    def refuse(self, source: Source) -> list[str]:
        """Policies that decide while they run, that reuse parts of a step, or that do more than reuse."""
        try:
            _read(source)
        except AerogelError as error:
            return [str(error)]
        return []

    def carries(self, policy: SavedPolicy) -> bool:
        """Return True for a feature cache."""
        return isinstance(policy.state, BlockCacheState | ScheduleState)

    def write(self, source: Source, output: Path) -> None:
        """Write output/cache_dit.yaml and, where diffusers can say the same exactly, output/diffusers.yaml."""
        self.accept(source)
        mask = _read(source)
        other = _taylorseer(mask)
        with new_folder(output) as target:
            (target / _OURS).write_text(_commented(_about_cache_dit(mask), {"cache_config": _cache_config(mask)}), encoding="utf-8")
            if other is not None:
                (target / _THEIRS).write_text(_commented(_about_diffusers(mask), other), encoding="utf-8")


@dataclass(frozen=True)
class _Mask:
    """A policy that a mask of steps can say."""

    policy: str
    model: str
    family: Family
    sampler: str
    runs: tuple[bool, ...]
    """For each step, whether all blocks run."""
    first: int
    """Blocks at the beginning that the policy lets run at every step."""
    last: int
    """Blocks at the end that it lets run."""
    outputs: bool
    """True where it returns cached outputs of modules, instead of what blocks added to the stream."""

    @property
    def always(self) -> int:
        """Blocks at the beginning that run in cache-dit, which needs one to compare steps by."""
        return max(self.first, 1)


def _read(source: Source) -> _Mask:
    """Read the folder's caching policy; raises AerogelError that says why no mask of steps can say it."""
    found = caching(source)
    if found is None:
        raise AerogelError("it has no caching policy; compress with a recipe that has one, such as fora")
    name, policy, state = found
    model = files.read(source.folder).model
    family = next(family for family in source.families if family.name == model.family)
    if not family.hidden_state_args:
        raise AerogelError(f"cache-dit supports transformers with sequential blocks, not {family.name} models")
    if policy.plain and isinstance(state, ScheduleState):
        runs, first, last, blocks = _of_units(state)
    elif hasattr(policy, "rule") and isinstance(state, BlockCacheState):
        runs, first, last, blocks = _of_block_ranges(name, policy.rule(state), state)
    else:
        raise AerogelError(f"{name} does more at some steps than give outputs again, which a mask of steps cannot say")
    mask = _Mask(name, model.name, family, state.sampler, runs, first, last, isinstance(state, ScheduleState))
    if mask.always + last >= blocks:
        raise AerogelError(f"cache-dit lets the first block run at every step, which leaves none of the {blocks} that {name} reuses")
    return mask


def _of_units(state: ScheduleState) -> tuple[tuple[bool, ...], int, int, int]:
    """Return the steps at which all modules run, the blocks at both ends that always do, and the number of blocks."""
    for number, row in enumerate(state.computed[1:], 1):
        if "1" in row and "0" in row:
            raise AerogelError(
                f"step {number + 1} of {len(state.steps)} (time step {state.steps[number]:g}) reuses {row.count('0')} of {len(row)} "
                "modules, and a mask of steps says all or none; export it by cache_policy, or compress with a policy of whole steps"
            )
    runs = (True, *("1" in row for row in state.computed[1:]))  # nothing is kept before the first step
    return runs, 0, 0, len({module.rpartition(".")[0] for module in state.modules})


def _of_block_ranges(name: str, rule: Any, state: BlockCacheState) -> tuple[tuple[bool, ...], int, int, int]:
    """The same of a rule that leaves blocks out."""
    if not isinstance(rule, TableRule):
        raise AerogelError(f"{name} decides while it runs, a mask of steps says it beforehand")
    out = [rule.skipped_range(step, None) for step in range(len(state.steps))]
    used = {rule.ranges[number] for number in out if number is not None}
    if len(used) > 1:
        raise AerogelError(f"{name} leaves out {len(used)} different block ranges, a mask of steps has one; set its options to one")
    blocks = state.blocks
    first, end = used.pop() if used else (0, blocks)
    return tuple(number is None for number in out), first, blocks - end, blocks


def _cache_config(mask: _Mask) -> dict[str, Any]:
    """The fields of cache-dit's DBCacheConfig."""
    return {
        "Fn_compute_blocks": mask.always,
        "Bn_compute_blocks": mask.last,
        "max_warmup_steps": 0,  # never more than the mask's first ones
        "num_inference_steps": len(mask.runs),
        "steps_computation_mask": [int(runs) for runs in mask.runs],
        "steps_computation_policy": "static",
    }


def _taylorseer(mask: _Mask) -> dict[str, Any] | None:
    """The fields of diffusers' TaylorSeerCacheConfig under which the same modules run at the same steps; None where there are none."""
    found = evenly_spaced(mask.runs) if mask.outputs and _enables_caches(mask.family) else None
    if found is None:
        return None
    before, interval, after = found
    modules = mask.family.cached_modules
    parts = [f"{module.glob.rpartition('.')[0]}.{part}" for module in modules for part in module.parts]
    return {
        "cache_interval": interval,
        "disable_cache_before_step": before,
        "disable_cache_after_step": after,
        "max_order": 0,
        "taylor_factors_dtype": None,  # as they come; bfloat16 by default
        "cache_identifiers": [_as_pattern(module.glob) for module in modules],
        "skip_predict_identifiers": [_as_pattern(part) for part in parts] or None,
    }


def evenly_spaced(runs: Sequence[bool]) -> tuple[int, int, int | None] | None:
    """(before, interval, after) of diffusers' rule for these steps: it runs before one, every so many behind it, and from another on.

    Counting begins one step behind `before`, so that an even spacing from the first step on is a `before` of -1.
    """
    steps = range(len(runs))
    ends = len(runs) - next((back for back, one in enumerate(reversed(runs)) if not one), len(runs))
    for before in (*steps[1:], -1):
        for interval in range(1, len(runs) + 1):
            for after in (None, ends):
                if all(runs[step] == _computes(step, before, interval, after) for step in steps):
                    return before, interval, after
    return None


def _computes(step: int, before: int, interval: int, after: int | None) -> bool:
    return step < before or (step - before - 1) % interval == 0 or (after is not None and step >= after)


def _enables_caches(family: Family) -> bool:
    """Return True where diffusers can enable a cache on denoisers of the family, whose pipelines then tell branches of guidance apart."""
    if importlib.util.find_spec("diffusers") is None:
        return False
    import diffusers

    return all(hasattr(getattr(diffusers, name, None), "enable_cache") for name in family.matches)


def _as_pattern(glob: str) -> str:
    """A glob in which `*` stands for one part of a dotted name, as a regular expression."""
    return r"[^.]+".join(re.escape(part) for part in glob.split("*"))


def _commented(about: str, fields: Mapping[str, Any]) -> str:
    """A file of YAML with a comment above."""
    lines = (f"# {line}".rstrip() for line in about.splitlines())
    return "\n".join((*lines, yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, width=140)))


def _about_cache_dit(mask: _Mask) -> str:
    many = "the first block runs" if mask.always == 1 else f"the first {mask.always} blocks run"
    last = f", so do the last {mask.last}" if mask.last else ""
    return (
        f"Steps of the policy {mask.policy} for {mask.model}, as a mask for cache-dit 1.5:\n\n"
        "    import cache_dit\n"
        f'    cache_dit.enable_cache(pipeline, **cache_dit.load_configs("{_OURS}"))\n\n'
        f"{_made_for(mask)}; cache-dit does not check that.\n"
        f"At a step with 0 {many}{last}, and what the other blocks added to the stream at the last step with 1 is added again.\n"
        f"{_compared(mask)}"
    )


def _compared(mask: _Mask) -> str:
    """Return how what cache-dit does compares with the policy."""
    if mask.outputs:
        return (
            f"Under {mask.policy} each attention and feed-forward gives its last output again instead, through the gate of the step at\n"
            "hand: the steps are the same, the images and the error that was measured of the policy are not."
        )
    if mask.first < mask.always:
        return f"{mask.policy} leaves out the first block too, which cache-dit always runs; else the two do the same."
    return f"{mask.policy} leaves out the same blocks in the same way."


def _about_diffusers(mask: _Mask) -> str:
    return (
        f"The policy {mask.policy} for {mask.model}, as a cache of diffusers 0.42:\n\n"
        "    import diffusers, yaml\n"
        f'    config = diffusers.TaylorSeerCacheConfig(**yaml.safe_load(open("{_THEIRS}")))\n'
        "    pipeline.transformer.enable_cache(config)\n\n"
        f"{_made_for(mask)}; diffusers does not check that.\n"
        "Of order 0 it predicts nothing: attentions and feed-forwards give their last outputs again at the steps of the policy, and the\n"
        "numbers are the same. Norms before them run at every step, which the policy spares."
    )


def _made_for(mask: _Mask) -> str:
    return f"It was made for {len(mask.runs)} steps of {mask.sampler or 'its sampler'}"
