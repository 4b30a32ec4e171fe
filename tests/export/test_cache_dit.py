"""cache-dit's mask, read by its rules as its source has them, and diffusers' own hooks under the configuration that was written.

cache-dit itself is not installed here: `Masked` is what its blocks do at a step, written out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from diffusers.hooks.hooks import CacheContext, StateManager
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook, TaylorSeerState
from torch import Tensor, nn

import aerogel
from aerogel.engine.exporting import source_of
from aerogel.errors import AerogelError
from aerogel.export.cache_dit import CacheDit, evenly_spaced
from aerogel.export.cache_policy import CachePolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from tests import image_pipelines
from tests.runtime.feature_cache.test_block_cache import deep, ran
from tests.runtime.feature_cache.test_schedule import calls, counted
from tests.tiny import FAMILIES, output

SEVEN = tuple(900.0 - 100 * step for step in range(7))
FIELDS = {
    "cache_type", "Fn_compute_blocks", "Bn_compute_blocks", "residual_diff_threshold", "max_accumulated_residual_diff_threshold",
    "max_warmup_steps", "warmup_interval", "max_cached_steps", "max_continuous_cached_steps", "enable_separate_cfg", "cfg_compute_first",
    "cfg_diff_compute_separate", "num_inference_steps", "steps_computation_mask", "steps_computation_policy", "force_refresh_step_hint",
    "force_refresh_step_policy",
}  # fmt: skip
"""Of cache-dit's DBCacheConfig, which passes over what it does not know."""


def exported(name: str, step: dict[str, Any], folder: Path) -> tuple[Network, Path, list[Call]]:
    """A network of five blocks, what was written for it, and the calls of a generation."""
    given = calls(name, steps=SEVEN)
    result = aerogel.compress(deep(name).module, {"steps": [step]}, samples=given, measures=(), output=folder / "master")
    CacheDit().write(source_of(folder / "master"), folder / "out")
    return result.network, folder / "out", given


def config_in(out: Path) -> dict[str, Any]:
    read = yaml.safe_load((out / "cache_dit.yaml").read_text())
    assert read.keys() == {"cache_config"}
    config: dict[str, Any] = read["cache_config"]
    assert config.keys() <= FIELDS
    return config


@dataclass
class Masked(nn.Module):
    """A row of blocks under cache-dit's static mask: the first ones run; then the others, or their last residual is added."""

    blocks: Sequence[nn.Module]
    config: dict[str, Any]
    step: int = 0
    residual: Tensor | None = None
    ran: list[int] = field(default_factory=list)

    __hash__ = nn.Module.__hash__

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def runs(self) -> bool:
        """Warm-up goes no further than the mask's first ones; then the mask decides, and static means that nothing else does."""
        mask = self.config["steps_computation_mask"]
        leading = mask.index(0) if 0 in mask else len(mask)
        warm = self.step in range(min(self.config["max_warmup_steps"], leading))
        return warm or (self.step < len(mask) and mask[self.step] == 1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, last = self.config["Fn_compute_blocks"], len(self.blocks) - self.config["Bn_compute_blocks"]
        assert first >= 1
        for block in self.blocks[:first]:
            x = block(x, *args, **kwargs)
        if self.runs:
            entered = x
            for block in self.blocks[first:last]:
                x = block(x, *args, **kwargs)
            self.residual = x - entered
            self.ran.append(self.step)
        else:
            assert self.residual is not None
            x = self.residual + x
        for block in self.blocks[last:]:
            x = block(x, *args, **kwargs)
        self.step += 1
        return x


@contextmanager
def masked(module: Any, config: dict[str, Any]) -> Iterator[Masked]:
    """Let one module stand for all blocks."""
    blocks = module.transformer_blocks
    row = Masked(list(blocks), config)
    if hasattr(blocks[0], "norm1") and hasattr(blocks[0].norm1, "emb"):  # DiT looks into a block for the embedder
        row.norm1 = blocks[0].norm1
    module.transformer_blocks = nn.ModuleList([row])
    try:
        yield row
    finally:
        module.transformer_blocks = blocks


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_blocks_that_are_left_out_by_a_table_are_left_out_the_same_way(name: str, tmp_path: Path) -> None:
    network, out, given = exported(name, {"delta_dit": {"interval": 3, "share": 0.6, "boundary": 1.0}}, tmp_path)
    config = config_in(out)
    assert (config["Fn_compute_blocks"], config["Bn_compute_blocks"]) == (2, 0)
    assert config["steps_computation_mask"] == [1, 0, 0, 1, 0, 0, 1]
    assert "delta_dit leaves out the same blocks in the same way." in (out / "cache_dit.yaml").read_text()
    with aerogel.cached(network, tmp_path / "master"):
        wanted = [output(network.module, call) for call in given]
    with masked(network.module, config) as row:
        made = [output(network.module, call) for call in given]
    assert row.ran == [0, 3, 6]
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(wanted[1], output(network.module, given[1]))


def test_whole_steps_of_units_become_a_mask(tmp_path: Path) -> None:
    """The blocks behind the first run at the same steps; the answers are others, as the file says."""
    network, out, given = exported("pixart", {"uniform_cache": {"ratio": 0.4, "first": 2}}, tmp_path)
    config = config_in(out)
    state = json.loads((tmp_path / "master/aerogel.json").read_text())["policies"][0]["state"]
    assert config["steps_computation_mask"] == [int("1" in row) for row in state["computed"]]
    assert (config["steps_computation_policy"], config["num_inference_steps"], config["Fn_compute_blocks"]) == ("static", 7, 1)
    seen = ran(network)
    with aerogel.cached(network, tmp_path / "master"):
        ours = [output(network.module, call) for call in given]
    wanted = [step for step, one in enumerate(config["steps_computation_mask"]) if one]
    assert seen.count(4) == len(wanted) == 4
    with masked(network.module, config) as row:
        theirs = [output(network.module, call) for call in given]
    assert row.ran == wanted
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.allclose(a, b, atol=1e-5) == (step in wanted)
    assert "the images and the error that was measured of the policy are not" in (out / "cache_dit.yaml").read_text()


def test_a_policy_of_all_blocks_keeps_the_first_there(tmp_path: Path) -> None:
    _, out, _ = exported("dit", {"magcache": {"threshold": 10.0}}, tmp_path)
    config = config_in(out)
    state = json.loads((tmp_path / "master/aerogel.json").read_text())["policies"][0]["state"]
    assert config["steps_computation_mask"] == [1 - int(one) for one in state["left_out"]]
    assert 0 in config["steps_computation_mask"]
    assert config["Fn_compute_blocks"] == 1
    assert "magcache leaves out the first block too, which cache-dit always runs" in (out / "cache_dit.yaml").read_text()


def test_it_says_how_it_is_loaded(tmp_path: Path) -> None:
    _, out, _ = exported("wan", {"fora": {}}, tmp_path)
    lines = (out / "cache_dit.yaml").read_text().splitlines()
    assert '#     cache_dit.enable_cache(pipeline, **cache_dit.load_configs("cache_dit.yaml"))' in lines
    assert "#     pipeline.transformer.enable_cache(config)" in (out / "diffusers.yaml").read_text().splitlines()
    assert all(len(line) <= 140 for line in lines)


def theirs(network: Network, out: Path, given: Sequence[Call]) -> list[Tensor]:
    """What diffusers answers under the written configuration, as its pipelines call it."""
    config = diffusers.TaylorSeerCacheConfig(**yaml.safe_load((out / "diffusers.yaml").read_text()))
    module: Any = network.module
    module.enable_cache(config)
    made = []
    for call in given:
        with module.cache_context("cond"):
            made.append(output(module, call))
    module.disable_cache()
    return made


@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox"])
@pytest.mark.parametrize(
    ("step", "mask"),
    [
        ({"fora": {}}, [1, 0, 1, 0, 1, 0, 1]),
        ({"fora": {"interval": 3}}, [1, 0, 0, 1, 0, 0, 1]),
        ({"uniform_cache": {"ratio": 0.43, "first": 2}}, [1, 1, 0, 1, 0, 1, 0]),
    ],
)
def test_diffusers_runs_the_same_units_and_answers_the_same(name: str, step: dict[str, Any], mask: list[int], tmp_path: Path) -> None:
    network, out, given = exported(name, step, tmp_path)
    assert config_in(out)["steps_computation_mask"] == mask
    with counted(network) as ours_ran, aerogel.cached(network, tmp_path / "master"):
        wanted = [output(network.module, call) for call in given]
    with counted(network) as theirs_ran:
        made = theirs(network, out, given)
    assert sorted(theirs_ran) == sorted(ours_ran)
    assert len(ours_ran) == sum(mask) * len(cached_modules_of(network))
    for a, b in zip(made, wanted, strict=True):
        assert torch.equal(a, b)
    reused = mask.index(0)
    assert not torch.equal(made[reused], output(network.module, given[reused]))


def test_steps_that_diffusers_cannot_space_have_no_configuration_of_it(tmp_path: Path) -> None:
    _, out, _ = exported("wan", {"uniform_cache": {"ratio": 0.45, "first": 1}}, tmp_path)
    assert config_in(out)["steps_computation_mask"] == [1, 0, 1, 1, 0, 1, 0]
    assert not (out / "diffusers.yaml").exists()


def test_denoisers_without_caches_of_diffusers_have_no_configuration_of_it(tmp_path: Path) -> None:
    _, out, _ = exported("pixart", {"fora": {}}, tmp_path)
    assert [path.name for path in out.iterdir()] == ["cache_dit.yaml"]


def test_every_spacing_that_is_found_is_what_the_hook_does() -> None:
    """Over all sets of steps out of seven: the hook's own count of steps, driven without a network."""
    found = 0
    for bits in range(64):
        runs = [True, *(bool(bits >> place & 1) for place in range(6))]
        if (spaced := evenly_spaced(runs)) is None:
            continue
        found += 1
        before, interval, after = spaced
        manager = StateManager(TaylorSeerState, init_kwargs={})
        manager.set_context(CacheContext("cond"))
        hook = TaylorSeerCacheHook(interval, before, torch.float32, manager, after)
        assert [hook._measure_should_compute()[0] for _ in runs] == runs
    assert 30 <= found < 64


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"pab": {"self_every": 2, "cross_every": 3, "first": -1, "last": 1000}}, r"step 2 of 7 \(time step 800\) reuses 10 of 15 modules"),
        ({"taylorseer": {}}, "taylorseer does more at some steps than give outputs again"),
        ({"toca": {}}, "toca does more at some steps"),
        ({"first_block": {}}, "first_block decides while it runs"),
        ({"delta_dit": {"boundary": 0.5}}, "delta_dit leaves out 2 different block ranges"),
    ],
)
def test_what_a_mask_of_steps_cannot_say_is_refused(step: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=message):
        exported("pixart", step, tmp_path)
    assert not (tmp_path / "out").exists()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    given = deep("dit").module
    aerogel.compress(given, {"steps": [{"rtn": {"scheme": "W8A8"}}]}, samples=calls("dit"), measures=(), output=tmp_path / "plain")
    assert CacheDit().refuse(source_of(tmp_path / "plain")) == [
        "it has no caching policy; compress with a recipe that has one, such as fora"
    ]
    for name, module in {"unet": FAMILIES["unet"].build(), "short": image_pipelines.classes().transformer}.items():
        seen = calls("unet" if name == "unet" else "dit")
        aerogel.compress(module, {"steps": [{"fora": {}}]}, samples=seen, measures=(), output=tmp_path / name)
    (reason,) = CacheDit().refuse(source_of(tmp_path / "unet"))
    assert reason == "cache-dit supports transformers with sequential blocks, not unet models"
    (reason,) = CacheDit().refuse(source_of(tmp_path / "short"))
    assert reason == "cache-dit lets the first block run at every step, which leaves none of the 1 that fora reuses"


def test_the_artefact_of_a_policy_is_enough(tmp_path: Path) -> None:
    _, out, _ = exported("wan", {"fora": {}}, tmp_path)
    CachePolicy().write(source_of(tmp_path / "master"), tmp_path / "artefact")
    CacheDit().write(source_of(tmp_path / "artefact"), tmp_path / "again")
    for path in out.iterdir():
        assert (tmp_path / "again" / path.name).read_text() == path.read_text()
