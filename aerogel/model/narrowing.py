"""Narrowing: coupled channels leave every block alike, and the configuration says how many are left.

Which setting says a width is tried out: the model's class is built on meta with another value, and the setting is taken where exactly the
parameters of coupled channels have other shapes then. So whatever opens the class with the new configuration opens what is left.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.experts import ExpertList
from aerogel.layers.narrowed import Widths, narrowed_shapes, remember
from aerogel.layers.slots import slots
from aerogel.layers.transposed import as_linears
from aerogel.model.experts import unfuse
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.model.structure.coupled import CoupledChannels, Kind, narrow
from aerogel.model.structure.filters import widths_after

Keep = Callable[[int], int]
"""A number of units -> how many of them stay."""
Settings = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
WORDS = {"feed_forwards": "channels of an FFN", "heads": "attention heads", "filters": "filters of convolutions"}
_FUSED = "_fused"
_INNER = ("inner", "intermediate", "ffn")


@dataclass(frozen=True)
class Change:
    """Settings with other values, of the configuration itself or of one inside of it."""

    path: str
    """Name of the configuration inside of the whole one; empty for that itself."""
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Narrowing:
    """Coupled channels that leave, by how many stay, and the settings that say so."""

    changes: tuple[Change, ...] = ()
    blocks: Mapping[str, tuple[tuple[CoupledChannels, int], ...]] = field(default_factory=dict)
    """Coupled channels of each block, with the number of units that stay."""
    shapes: Shapes = field(default_factory=dict)
    """Shapes afterwards of the parameters that have another, by full name."""
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Numbers that modules keep of their widths, as they are afterwards, by full name."""
    widths: Widths = field(default_factory=dict)
    """Widths of layers that no setting says, which the model is to remember."""
    left: tuple[str, ...] = ()
    """Layers that read coupled channels and stay as they are, because no setting says their width."""


def narrowing_of(network: Network, kind: Kind, keep: Keep, ignore: Sequence[str] = ()) -> Narrowing:
    """Return what it takes to keep so many units everywhere; found once for each question.

    Raises AerogelError where no setting of the configuration says how many units there are.
    """
    units = {one.units for each in network.coupled.values() for one in each if one.kind == kind}
    question = (kind, tuple(sorted((count, keep(count)) for count in units)), tuple(ignore))
    if question not in network.narrowings:
        network.narrowings[question] = _Search(network, kind, keep, ignore).found()
    found: Narrowing = network.narrowings[question]
    return found


def narrowing_of_filters(network: Network, keep: Keep, ignore: Sequence[str] = ()) -> Narrowing:
    """Return what it takes to keep so many units of the filters of every block, whose widths the model is to remember.

    Raises AerogelError where there are no filters that can leave.
    """
    filters = {name: [one for one in each if one.kind == "filters"] for name, each in network.coupled.items()}
    if not any(filters.values()):
        raise AerogelError(f"this {network.family.name} model has no {WORDS['filters']} that can leave a block; leave this step out")
    blocks: dict[str, tuple[tuple[CoupledChannels, int], ...]] = {}
    shapes: Shapes = {}
    widths: dict[str, dict[str, int]] = {}
    for name, each in filters.items():
        block = network.module.get_submodule(name)
        taken = [(one, keep(one.units)) for one in each if not matches(f"{name}.{one.reader}", ignore)]
        taken = [(one, stays) for one, stays in taken if stays < one.units]
        if taken:
            blocks[name] = tuple(taken)
        for one, stays in taken:
            for part, own in widths_after(block, one, stays).items():
                full = f"{name}.{part}"
                widths[full] = {**widths.get(full, {}), **own}
    for full, own in widths.items():
        shapes |= {f"{full}.{key}": shape for key, shape in narrowed_shapes(network.module.get_submodule(full), own).items()}
    return Narrowing((), blocks, shapes, widths, widths)


class _Search:
    """Search for the settings that say the widths of coupled channels."""

    def __init__(self, network: Network, kind: Kind, keep: Keep, ignore: Sequence[str]) -> None:
        self._network, self._kind, self._keep, self._ignore = network, kind, keep, ignore
        self._coupled = {
            f"{block}.{one.reader}": (block, one) for block, each in network.coupled.items() for one in each if one.kind == kind
        }
        self._shapes = _shapes(network.module)
        self._taken: dict[str, int] = {}
        self._why = ""

    def found(self) -> Narrowing:
        """Try settings until all coupled channels are covered."""
        words = WORDS[self._kind]
        if not self._coupled:
            raise AerogelError(f"this {self._network.family.name} model has no {words} that can leave a block; leave this step out")
        kept = {units: self._keep(units) for units in {one.units for _, one in self._coupled.values()}}
        if all(units == stays for units, stays in kept.items()):
            return Narrowing()
        base = self._rebuilt(())
        changes = [change for change in self._candidates() if base is not None and self._takes(change)]
        if not changes:
            (block, one), *_ = self._coupled.values()
            raise AerogelError(
                f"{block}.{one.reader} reads {one.units} {words}, and no setting of this {self._network.family.name} model's configuration "
                f"says how many{self._why}: nobody could open what is left; leave this step out"
            )
        narrow = self._rebuilt(changes)
        assert base is not None, "there are changes"
        if narrow is None or not self._fits(_shapes(narrow), self._taken):
            raise AerogelError(f"the settings {_named(changes)} do not say the number of {words} one by one; leave this step out")
        return Narrowing(
            tuple(changes),
            self._of_blocks(),
            {name: shape for name, shape in _shapes(narrow).items() if shape != self._shapes[name]},
            _numbers_apart(base, narrow),
            left=tuple(name for name in self._coupled if name not in self._taken and not matches(name, self._ignore)),
        )

    def _candidates(self) -> Iterator[Change]:
        return self._of_channels() if self._kind == "feed_forwards" else self._of_heads()

    def _of_channels(self) -> Iterator[Change]:
        """Settings that have the number of channels of an FFN for a value, or lists of such numbers."""
        kept = {one.units: self._keep(one.units) for _, one in self._coupled.values()}
        for path, config in _configurations(self._network.config):
            for key, value in _values(config).items():
                if type(value) is int and kept.get(value, value) != value:
                    yield Change(path, {key: kept[value]})
                elif isinstance(value, list) and value and all(type(one) is int and one in kept for one in value):
                    yield Change(path, {key: [kept[one] for one in value]})
                elif value is None and any(part in key for part in _INNER):
                    yield from (Change(path, {key: stays}) for stays in kept.values())

    def _of_heads(self) -> Iterator[Change]:
        """The settings of transformers, with the width of a head written out where it would follow from their number."""
        for path, config in _configurations(self._network.config):
            heads, keys = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
            groups = heads if keys is None else keys
            if type(heads) is not int or type(groups) is not int or heads % groups:
                continue
            stays = self._keep(groups)
            values = {"num_attention_heads": heads // groups * stays} | ({} if keys is None else {"num_key_value_heads": stays})
            yield Change(path, values)
            width = getattr(config, "hidden_size", None)
            if getattr(config, "head_dim", None) is None and width is not None:
                yield Change(path, {**values, "head_dim": width // heads})

    def _takes(self, change: Change) -> bool:
        """Return True for a change by which coupled channels, none of them taken yet, are narrower, and nothing else is."""
        narrow = self._rebuilt([change])
        taken = {} if narrow is None else self._taken_in(_shapes(narrow))
        if narrow is None or not taken or taken.keys() & self._taken.keys() or not self._fits(_shapes(narrow), taken):
            return False
        ignored = [name for name in taken if matches(name, self._ignore)]
        if ignored and len(ignored) < len(taken):
            other = next(name for name in taken if name not in ignored)
            raise AerogelError(
                f"{_named([change])} says the width of {ignored[0]}, which is ignored, and of {other}; ignore both or neither"
            )
        if not ignored:
            self._taken |= taken
        return not ignored

    def _taken_in(self, shapes: Shapes) -> dict[str, int]:
        """The units that stay of each reader that is narrower in these shapes."""
        found: dict[str, int] = {}
        for name, (_, one) in self._coupled.items():
            before, after = self._shapes.get(f"{name}.weight"), shapes.get(f"{name}.weight")
            if before is not None and after is not None and after[1] < before[1] and after[1] % one.width == 0:
                found[name] = after[1] // one.width
        return found

    def _fits(self, shapes: Shapes, taken: Mapping[str, int]) -> bool:
        """Return True where these are the shapes that are left when so many units stay."""
        expected = dict(self._shapes)
        for name, stays in taken.items():
            block, one = self._coupled[name]
            expected[f"{name}.weight"] = (expected[f"{name}.weight"][0], stays * one.width)
            for parameter in one.rows:
                full = f"{block}.{parameter}"
                expected[full] = (len(one.rows_of(parameter, torch.arange(stays))), *expected[full][1:])
        return shapes == expected

    def _of_blocks(self) -> dict[str, tuple[tuple[CoupledChannels, int], ...]]:
        found: dict[str, tuple[tuple[CoupledChannels, int], ...]] = {}
        for name, stays in self._taken.items():
            block, one = self._coupled[name]
            found[block] = (*found.get(block, ()), (one, stays))
        return found

    def _rebuilt(self, changes: Sequence[Change]) -> nn.Module | None:
        """The model's class built on meta with changed settings, its experts one by one; None where that does not work."""
        module: Any = self._network.module
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = changed(module.config, changes)
                if hasattr(config, "validate"):
                    config.validate()
                made: nn.Module = type(module).from_config(config) if isinstance(config, Mapping) else type(module)(config)
            unfuse(made, *([] if self._network.names is None else [self._network.names.experts]))
            as_linears(made)
        except Exception as error:  # noqa: BLE001  whatever the code of a model raises for settings that do not go together
            self._why = f" ({' '.join(str(error).split())})"
            return None
        return made


def changed(config: Any, changes: Sequence[Change], memo: dict[int, Any] | None = None) -> Any:
    """Return a copy of a configuration with changed settings; `memo` is that of copy.deepcopy."""
    if isinstance(config, Mapping):  # of diffusers
        return {**config, **{key: value for change in changes for key, value in change.values.items()}}
    made = copy.deepcopy(config, memo)
    for change in changes:
        part = getattr(made, change.path) if change.path else made
        for key, value in change.values.items():
            setattr(part, key, value)
    return made


def _named(changes: Sequence[Change]) -> str:
    return ", ".join(f"{change.path}.{key}" if change.path else key for change in changes for key in change.values)


def _configurations(config: Any) -> Iterator[tuple[str, Any]]:
    """A configuration and those inside of it."""
    yield "", config
    if not isinstance(config, Mapping) and config is not None:
        yield from ((key, value) for key, value in vars(config).items() if hasattr(value, "to_dict") and hasattr(value, "model_type"))


def _values(config: Any) -> Settings:
    return dict(config) if isinstance(config, Mapping) else dict(vars(config)) if config is not None else {}


def _shapes(module: nn.Module) -> Shapes:
    """Shapes of all parameters and buffers by full name."""
    stored = {slot.name: tuple(slot.tensor.shape) for slot in slots(module)}
    return stored | {name: tuple(buffer.shape) for name, buffer in module.named_buffers(remove_duplicate=False)}


def _numbers(module: nn.Module) -> dict[str, dict[str, int]]:
    """Whole numbers among the attributes of each module, by full name; those of fused experts too."""
    return {name: {key: value for key, value in vars(part).items() if type(value) is int} for name, part in _parts(module).items()}


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    parts = dict(module.named_modules())
    fused = {f"{name}.{_FUSED}": part._fused[0] for name, part in parts.items() if isinstance(part, ExpertList)}
    return parts | fused


def _numbers_apart(before: nn.Module, after: nn.Module) -> dict[str, dict[str, int]]:
    old = _numbers(before)
    apart = {name: {key: value for key, value in own.items() if old[name].get(key) != value} for name, own in _numbers(after).items()}
    return {name: own for name, own in apart.items() if own}


class Narrower:
    """Narrows a network block by block: a block that is done has its new widths, the others still run with theirs."""

    def __init__(self, network: Network, narrowing: Narrowing) -> None:
        self._network, self._narrowing = network, narrowing
        self._config: Any = getattr(network.module, "config", None)
        memo: dict[int, Any] = {}
        self._made = {id(self._config): changed(self._config, narrowing.changes, memo)}
        for path, part in _configurations(self._config):
            if path:
                self._made[id(part)] = copy.deepcopy(part, memo)  # what the copy of the whole has in this place

    @torch.no_grad()
    def keep(self, block: str, one: CoupledChannels, unit_K: Tensor, weight_OK: Tensor | None = None) -> None:
        """Keep these units of coupled channels of a block, in order; the reader keeps their columns, or has the weight that is given."""
        narrow(self._network.module.get_submodule(block), one, unit_K, weight_OK)

    def finish_block(self, block: str) -> None:
        """Let the modules of a block know their new widths, and the settings that say so."""
        self._tell({name: part for name, part in _parts(self._network.module).items() if name == block or name.startswith(f"{block}.")})

    def finish(self) -> None:
        """Let all modules know; what was found of the network's structure is found anew."""
        self._tell(_parts(self._network.module))
        if self._narrowing.widths:
            remember(self._network.module, self._narrowing.widths)
        if isinstance(self._config, Mapping) and self._narrowing.changes:
            values = {key: value for change in self._narrowing.changes for key, value in change.values.items()}
            self._network.module.register_to_config(**values)  # type: ignore[operator]
        self._network.forget_structure()

    def _tell(self, parts: Mapping[str, nn.Module]) -> None:
        for name, part in parts.items():
            vars(part).update(self._narrowing.attributes.get(name, {}))
            config = vars(part).get("config")
            if (new := self._made.get(id(config))) is not None and new is not config:
                vars(part)["config"] = new
            elif hasattr(config, "model_type") and not any(config is one for one in self._made.values()):
                self._made[id(config)] = self._also_changed(config)
                vars(part)["config"] = self._made[id(config)]

    def _also_changed(self, config: Any) -> Any:
        """Return a copy, with the new settings, of a configuration that a module has for its own."""
        made = copy.deepcopy(config)
        for change in self._narrowing.changes:
            if type(config) is type(getattr(self._config, change.path) if change.path else self._config):
                for key, value in change.values.items():
                    setattr(made, key, value)
        return made
