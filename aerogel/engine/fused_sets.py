"""Fused sets in the plan: engines that load a set as one tensor need one scheme and one outer scale for its layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from aerogel.layers.conv import Layer
from aerogel.layers.experts import ExpertList
from aerogel.layers.linear import QuantLinear
from aerogel.model.block import Block
from aerogel.model.network import Network
from aerogel.model.walk import blocks_of
from aerogel.numerics.scheme import Scheme

_Schemes = Mapping[str, Scheme]
_UNQUANTIZED = "no scheme"


def mixed_sets(network: Network, schemes: _Schemes) -> Iterator[str]:
    """Yield a line for each kind of fused set whose layers do not all have one scheme; `schemes` has those of the quantized layers.

    Denoisers are left out: what opens them loads layer by layer. So are layers that no method quantizes, such as routers.
    """
    if network.family.modality in ("image", "video"):
        return
    found: dict[tuple[str, ...], list[str]] = {}
    for block in blocks_of(network):
        if block.name and _differ(block, block.linears(("Linear",)), schemes):
            for home, names in _sets(block):
                if _differ(block, names, schemes):
                    told = _told(block, home, names, schemes)
                    found.setdefault((re.sub(r"\d+", "*", block.full_name(home)), *told), []).append(block.full_name(home))
    for (_, layers, given), homes in found.items():
        more = f" and {len(homes) - 1} more like it" if len(homes) > 1 else ""
        yield (
            f"{layers} of {homes[0]}{more} have {given}: engines that load them as one tensor (vLLM) refuse or misread this; "
            "give them one scheme"
        )


def unknown_sets(network: Network, schemes: _Schemes) -> Iterator[str]:
    """Yield a line where layers get outer scales in blocks whose fused sets are not known: then each layer has one of its own."""
    if network.family.modality in ("image", "video") or not any(map(_has_outer, schemes.values())):
        return
    unseen = (block for block in blocks_of(network) if block.name and block.name not in network.fused_sets)
    blind = [block.name for block in unseen if any(_has_outer(schemes.get(block.full_name(name))) for name in block.linears(("Linear",)))]
    if blind:
        more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        yield (
            f"the fused sets of {blind[0]}{more} are not known, as made-up inputs do not run them: each layer gets a global scale "
            "of its own, and engines that load several as one tensor (vLLM) misread them"
        )


def _has_outer(scheme: Scheme | None) -> bool:
    return scheme is not None and scheme.weights.scale_format == "e4m3"


def _sets(block: Block) -> Iterator[tuple[str, Sequence[str]]]:
    """The fused sets of a block by names in it, each with the module that it is in: all layers of an expert list are one."""
    lists = [name for name, part in block.module.named_modules() if isinstance(part, ExpertList)]
    for home in lists:
        inside = block.module.get_submodule(home).named_modules(prefix=home)
        yield home, [name for name, part in inside if isinstance(part, Layer | QuantLinear)]
    for names in block.network.fused_sets.get(block.name, ()):
        if not any(names[0].startswith(f"{home}.") for home in lists):
            yield names[0].rpartition(".")[0], [name for name in names if not block.network.never_quantizes(block.full_name(name))]


def _differ(block: Block, names: Sequence[str] | Mapping[str, nn.Module], schemes: _Schemes) -> bool:
    """Return True where these layers have more than one scheme, none being one of them."""
    got = [schemes.get(block.full_name(name)) for name in names]
    return len({None if scheme is None else (scheme.weights, scheme.inputs) for scheme in got}) > 1


def _told(block: Block, home: str, names: Sequence[str], schemes: _Schemes) -> tuple[str, str]:
    """The layers of a set and their schemes, in words; of experts each once."""
    given = [str(schemes.get(block.full_name(name), _UNQUANTIZED)) for name in names]
    if isinstance(block.module.get_submodule(home), ExpertList):
        return "the experts", ", ".join(dict.fromkeys(given))
    return ", ".join(name.rpartition(".")[2] for name in names), ", ".join(given)
