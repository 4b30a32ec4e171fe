"""Removal of decoder layers: they leave the row of blocks, and the configuration and the places in the cache say so."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from aerogel.errors import AerogelError
from aerogel.model.kv_cache import places
from aerogel.model.network import Network
from aerogel.model.structure.towers import Tower

_COUNT = "num_hidden_layers"


@dataclass(frozen=True)
class DecoderLayers:
    """The row of layers of a language model that its configuration counts."""

    tower: Tower
    lists: tuple[str, ...]
    """Settings that have an entry for each layer."""

    def remove(self, network: Network, gone: Collection[str]) -> None:
        """Take these layers out; the others move up, in the cache, in the configuration and in what the network knows of its blocks."""
        config = _settings(network)
        staying = [place for place, name in enumerate(self.tower.blocks) if name not in gone]
        row: Any = network.module.get_submodule(self.tower.name)
        for now, before in enumerate(staying):
            for part in row[before].modules():
                if isinstance(getattr(part, "layer_idx", None), int):
                    part.layer_idx += now - before
        for place in reversed(range(len(self.tower.blocks))):
            if place not in staying:
                del row[place]
        for key in self.lists:
            values = getattr(config, key)
            setattr(config, key, type(values)(values[place] for place in staying))
        setattr(config, _COUNT, len(staying))
        names = {self.tower.blocks[before]: self.tower.blocks[now] for now, before in enumerate(staying)}
        network.rename_blocks(self.tower, names)


def decoder_layers(network: Network) -> DecoderLayers:
    """Find them; raises AerogelError where there is no such row, or several, or where the configuration could not tell what is left."""
    cached = places(network)
    rows = [tower for tower in network.towers if any(name.startswith(f"{block}.") for block in tower.blocks for name in cached)]
    if len(rows) != 1:
        raise AerogelError(
            f"layers are removed from the one row of decoder layers with a key-value cache, and this {network.family.name} model has "
            f"{len(rows)} such rows; leave this step out"
        )
    (tower,) = rows
    config, depth = _settings(network), len(tower.blocks)
    parts = list(network.module.get_submodule(tower.name).children())
    if getattr(config, _COUNT, None) != depth or len(parts) != depth:
        raise AerogelError(
            f"{tower.name} has {len(parts)} layers, and {_COUNT} in the configuration is {getattr(config, _COUNT, None)}; "
            "without a count that fits nobody could open what is left: leave this step out"
        )
    values = {key: value for key, value in vars(config).items() if "layer" in key and isinstance(value, list | tuple) and value}
    lists = tuple(key for key, value in values.items() if len(value) == depth)
    if numbered := [key for key, value in values.items() if len(value) != depth and all(isinstance(one, int) for one in value)]:
        raise AerogelError(f"{numbered[0]} in the configuration names layers by their numbers, which would change; leave this step out")
    if getattr(config, "num_kv_shared_layers", None):
        raise AerogelError("the last layers of this model read keys and values of others, which their numbers decide; leave this step out")
    _require_alike(tower, parts, {key: values[key] for key in lists})
    return DecoderLayers(tower, lists)


def _require_alike(tower: Tower, parts: list[nn.Module], lists: Mapping[str, Any]) -> None:
    """Raise AerogelError where layers of other shapes stand at places that only the number of a layer tells."""
    kinds: dict[tuple[Any, ...], Any] = {}
    for place, part in enumerate(parts):
        shapes = {name: tuple(tensor.shape) for name, tensor in part.named_parameters()}
        first = kinds.setdefault(tuple(str(values[place]) for values in lists.values()), shapes)
        if first != shapes:
            raise AerogelError(
                f"{tower.blocks[place]} has other weights than layers before it, and no list in the configuration tells them apart; "
                "leave this step out"
            )


def _settings(network: Network) -> Any:
    """The configuration that counts the layers of the decoder."""
    get = getattr(network.config, "get_text_config", None)
    return get(decoder=True) if get is not None else network.config
