"""Runtime policies on disk: their states as tensors beside the weights and numbers in aerogel.json, put back on as contexts."""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.io import kv_scales
from aerogel.io.json_files import read_object
from aerogel.io.quantized import OWN, quantization_of
from aerogel.io.record.schema import PolicyRecord
from aerogel.io.save import Extras
from aerogel.io.shards import write_shards
from aerogel.io.states import STATES, stored
from aerogel.methods.base import RuntimePolicy, name_of
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.processes import ALONE, Processes
from aerogel.model.trace import NON_BLOCK
from aerogel.recipe import Recipe, Step
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True)
class CalibratedPolicy:
    """A policy with the state that its calibration gave."""

    step: Step
    state: PolicyState
    """The record that the policy's class declares as its state."""

    @property
    def policy(self) -> RuntimePolicy[Any]:
        """The policy itself."""
        assert isinstance(self.step.method, RuntimePolicy)
        return self.step.method


def calibrated(
    network: Network, step: Step, calls: Sequence[Call], before: CalibratedPolicy | None = None, processes: Processes = ALONE
) -> CalibratedPolicy:
    """Calibrate a policy, from the state of the one before where it supersedes that; raises AerogelError where it cannot follow it.

    Each of several processes does that, and all take the state of the first one: it may depend on measured times.
    """
    method = step.method
    assert isinstance(method, RuntimePolicy)
    if before is not None and (why := method.refusal(before.policy)):
        raise AerogelError(why)
    on_device = network.placement.bring_calls(calls)
    state = method.calibrated(network, on_device, None if before is None else before.state)
    if not processes.alone:
        state = method.read(processes.of_first(lambda: network.placement.take_back(state.as_dict())))
    return CalibratedPolicy(step, state)


def superseded(step: Step, before: Sequence[CalibratedPolicy]) -> CalibratedPolicy | None:
    """Return the last of the policies before, if this step takes its place."""
    assert isinstance(step.method, RuntimePolicy)
    return before[-1] if before and step.method.supersedes else None


class Parameters:
    """The parameters of the policies that are on, by block: policies look them up at each forward, block methods may learn them."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self._by_block: dict[str, dict[str, Tensor]] = {name: {} for name in (*blocks, NON_BLOCK)}

    def of(self, block: str) -> dict[str, Tensor]:
        """Return those inside a block by full name, to be changed in place."""
        return self._by_block[block]

    @contextmanager
    def on(self, network: Network, measured: CalibratedPolicy) -> Iterator[None]:
        """Put a policy on with its parameters as they are here; raises AerogelError for a name that another policy has."""
        own = measured.policy.parameters(measured.state)
        for name, value in own.items():
            values = self.of(next((block for block in self._by_block if name.startswith(f"{block}.")), NON_BLOCK))
            if name in values:
                raise AerogelError(f"two policies have a parameter {name}, the second is {measured.step.name}; leave one of them out")
            values[name] = value
        with measured.policy.on_with(network, measured.state, ChainMap(*self._by_block.values())):
            yield
        for values in self._by_block.values():
            for name in own.keys() & values.keys():
                del values[name]

    def taken_over(self, measured: CalibratedPolicy) -> CalibratedPolicy:
        """Return the policy with its parameters as they are here."""
        now = ChainMap(*self._by_block.values())
        values = {name: now[name].detach() for name in measured.policy.parameters(measured.state)}
        return replace(measured, state=measured.policy.with_parameters(measured.state, values))


@contextmanager
def on(network: Network, policies: Sequence[CalibratedPolicy]) -> Iterator[None]:
    """Put policies on in the order of the recipe; afterwards the network is what it was."""
    with ExitStack() as stack:
        for measured in policies:
            stack.enter_context(measured.policy.on(network, measured.state))
        yield


def save(policies: Sequence[CalibratedPolicy], folder: Path) -> tuple[list[PolicyRecord], dict[str, str]]:
    """Write the tensors of all states into a folder; returns the rest for aerogel.json, and the checksum of the file of tensors."""
    tensors = {
        f"{number}.{key}": value.detach().contiguous()
        for number, measured in enumerate(policies)
        for key, value in measured.state.as_dict().items()
        if isinstance(value, Tensor)
    }
    place = Path(STATES)
    written = write_shards(folder / place.parent, tensors.items(), place.stem, max_shard_size=1 << 62) if tensors else {}
    checksums = {str(place.with_name(name)): checksum for name, checksum in written.items()}
    records = [
        PolicyRecord(
            step=measured.step.as_dict(),
            state={key: value for key, value in measured.state.as_dict().items() if not isinstance(value, Tensor)},
        )
        for measured in policies
    ]
    return records, checksums


def extras(policies: Sequence[CalibratedPolicy]) -> Extras:
    """Return what policies add to the weights, to quantization_config and to the command line, for engines."""
    entries: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    arguments: dict[str, Any] = {}
    for measured in policies:
        entries |= measured.policy.config_entries
        tensors |= measured.policy.config_tensors(measured.state)
        arguments |= measured.policy.engine_arguments
    return Extras(entries, tensors, arguments)


def load(folder: Path | None, rename: Callable[[str], str] = str) -> list[CalibratedPolicy]:
    """Read back what `save` wrote, or what somebody else says in a quantization_config; empty when the folder has no policies.

    `rename` gives the names in memory of tensors that somebody else wrote.
    """
    if folder is None:
        return []
    read = []
    for named, state in stored(folder):
        (step,) = Recipe.parse({"steps": [named]}).steps
        assert isinstance(step.method, RuntimePolicy)
        read.append(CalibratedPolicy(step, step.method.read(state)))
    return read if any(one.policy.config_entries for one in read) else [*read, *_of_config(folder, rename)]


def _of_config(folder: Path, rename: Callable[[str], str]) -> Iterator[CalibratedPolicy]:
    """The policies that a quantization_config of somebody else describes."""
    config = quantization_of(read_object(folder / "config.json")) if (folder / "config.json").is_file() else {}
    if config.get("quant_method") not in OWN or (scheme := kv_scales.scheme_in(config)) is None:
        return
    tensors = kv_scales.read(folder, config, rename)
    classes = (catalog.find("methods", name) for name in catalog.names("methods"))
    for cls in (cls for cls in classes if issubclass(cls, RuntimePolicy)):
        if (found := cls.from_config(config, tensors)) is not None:
            method, state = found
            yield CalibratedPolicy(Step(name_of(method), method), state)
            return
    warnings.warn(f"keys and values are not quantized here: kv_cache_scheme is {scheme}, expected static symmetric fp8", stacklevel=3)
