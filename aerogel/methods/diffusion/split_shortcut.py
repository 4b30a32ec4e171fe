"""Shortcut splitting: what comes down a skip connection and what comes up have ranges of their own (Q-Diffusion, arXiv:2302.04304)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from aerogel.errors import AerogelError
from aerogel.layers.conv import Layer
from aerogel.layers.split import Split
from aerogel.methods.base import Method, Requirement
from aerogel.model.calls import Call
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.model.seams import seams


@dataclass(frozen=True)
class SplitShortcut(Method):
    """Splits layers that read concatenated channels, so that later steps quantize each part separately."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "concatenations", "uncached"})

    ignore: tuple[str, ...] = ()
    """Layers to leave whole: globs on full dotted names, `re:` patterns or class names."""

    @torch.no_grad()
    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Find the layers in one forward and split them; raises AerogelError when there is none."""
        ignore, layers = network.expand_patterns(self.ignore), network.module.get_submodule
        found = {name: widths for name, widths in seams(network, calls[0]).items() if not matches(name, ignore, layers(name))}
        if not found:
            raise AerogelError(f"no float layer of this {network.family.name} model reads concatenated channels; leave split_shortcut out")
        for name, widths in found.items():
            layer = layers(name)
            assert isinstance(layer, Layer), "only these are found"
            network.module.set_submodule(name, Split(layer, widths))
