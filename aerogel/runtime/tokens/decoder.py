"""The row of decoder blocks of a language model, through which the positions of a text go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from aerogel.errors import AerogelError
from aerogel.model import kv_cache
from aerogel.model.network import Network
from aerogel.runtime.attention import require_torch_attention


@dataclass(frozen=True)
class Decoder:
    """Decoder blocks of a network, in order."""

    module: str
    """Full name of the module that runs them; empty for the network itself."""
    blocks: tuple[str, ...]
    """Full names."""
    attentions: tuple[str, ...]
    """Full names of the attentions that have a place in a cache, one a block."""
    places: tuple[int, ...]
    """Their places in the cache."""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def parts(self, network: Network) -> list[nn.Module]:
        """Return the blocks themselves."""
        return [network.module.get_submodule(name) for name in self.blocks]

    def final_norm(self, network: Network) -> nn.Module:
        """Return the norm behind the last block, or a module that gives its input back where there is none.

        It is the last child of the module around the blocks that has nothing but vectors.
        """
        children = network.module.get_submodule(self.module).children()
        norms = [part for part in children if (shapes := [weight.ndim for weight in part.parameters()]) and set(shapes) == {1}]
        return norms[-1] if norms else nn.Identity()


def decoder_of(network: Network) -> Decoder:
    """Find the decoder; raises AerogelError where there is none, or several, or where blocks attend in other ways."""
    require_torch_attention(network)
    places = kv_cache.places(network)
    found = [tower for tower in network.towers if any(name.startswith(tuple(f"{block}." for block in tower.blocks)) for name in places)]
    if len(found) != 1:
        raise AerogelError(
            f"tokens are dropped between the blocks of one decoder with a key-value cache, and this {network.family.name} model has "
            f"{len(found)} such rows of blocks; leave this step out"
        )
    blocks = tuple(found[0].blocks)
    attentions = [_innermost([name for name in places if name.startswith(f"{block}.")]) for block in blocks]
    if without := [block for block, names in zip(blocks, attentions, strict=True) if len(names) != 1]:
        raise AerogelError(f"{without[0]} has no attention with a place in a key-value cache, so tokens cannot be dropped before it")
    _require_whole_attention(network)
    names = tuple(names[0] for names in attentions)
    return Decoder(found[0].name.rpartition(".")[0], blocks, names, tuple(places[name] for name in names))


def _require_whole_attention(network: Network) -> None:
    """Raise AerogelError where the cache of some block is of another kind than one that grows with every token."""
    get = getattr(network.config, "get_text_config", None)
    layers = DynamicCache(config=get(decoder=True)).layers if get is not None else []
    if others := sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}):
        raise AerogelError(
            f"the cache of this {network.family.name} model has a {others[0]}; tokens are dropped where every block attends to all that "
            "came before: leave this step out"
        )


def _innermost(names: list[str]) -> list[str]:
    """Names without those of modules around others of them."""
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
