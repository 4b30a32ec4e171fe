"""Names of tensors on disk and in memory, as transformers itself converts them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from aerogel.layers.experts import ExpertLayout


@dataclass(frozen=True)
class Names:
    """Conversions between the names of a checkpoint and those of a module."""

    known: frozenset[str] = frozenset()
    """Names in memory, which stay as they are: patterns of renamings do not end where a name does."""
    renamings: tuple[Any, ...] = ()
    """transformers' WeightRenaming, in the order in which they are applied to a name on disk."""
    converters: tuple[Any, ...] = ()
    """transformers' WeightConverter: several tensors on disk make one in memory, or the other way round."""
    backwards: tuple[Any, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, module: nn.Module) -> Names:
        """Return the conversions of a module, whose weights may be on meta."""
        import transformers

        if not isinstance(module, transformers.PreTrainedModel):
            return cls()
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter

        found = get_model_conversion_mapping(module)
        renamings = tuple(one for one in found if not isinstance(one, WeightConverter))
        # Names of times long gone are read, never written; a prefix that only some checkpoints have is neither.
        current = [
            one for one in get_model_conversion_mapping(module, add_legacy=False) if not isinstance(one, WeightConverter | PrefixChange)
        ]
        backwards = tuple(one.reverse_transform() for one in reversed(current))
        return cls(frozenset(module.state_dict()), renamings, tuple(one for one in found if isinstance(one, WeightConverter)), backwards)

    def in_memory(self, name: str) -> str:
        """The name in memory of the tensor that a checkpoint calls `name`; of an expert that of its own projection."""
        if name in self.known:
            return name
        found = _renamed(name, self.renamings)
        # Codes and scales have names that patterns do not count on.
        return name if self._of_a_layer(name) and not (found in self.known or self._of_a_layer(found)) else found

    def on_disk(self, name: str) -> str:
        """The name that checkpoints have for a tensor; that in memory where there is no way back."""
        found = _renamed(name, self.backwards)
        return found if self.in_memory(found) == name else name

    def _of_a_layer(self, name: str) -> bool:
        """Return True for a tensor of a layer that has a weight."""
        return f"{name.rpartition('.')[0]}.weight" in self.known

    def experts(self, name: str) -> ExpertLayout:
        """The names on disk of the projections of the experts that are fused in the module called `name`."""
        gate_up, down = self._merged(f"{name}.gate_up_proj"), self._merged(f"{name}.down_proj")
        up = gate_up or self._merged(f"{name}.up_proj")
        layout = ExpertLayout(fused_on_disk=not down)
        if down:
            layout = replace(layout, down=down[0])
        if up:
            layout = replace(layout, gate=up[0], up=up[-1])
        return layout

    def _merged(self, name: str) -> list[str]:
        """Names of the single experts' weights that transformers merges into a fused parameter; none where it merges none."""
        from transformers.core_model_loading import MergeModulelist

        for converter in self.converters:
            (target, *others), sources = converter.target_patterns, converter.source_patterns
            merges = any(isinstance(operation, MergeModulelist) for operation in converter.operations)
            if merges and not others and re.search(rf"(^|\.){_plain(target).lstrip('.')}$", name):
                return [_plain(source).rpartition("*.")[2].removesuffix("$").removesuffix(".weight") for source in sources]
        return []


def _plain(pattern: str) -> str:
    return pattern.replace(r"\.", ".").lstrip("^")


def _renamed(name: str, renamings: tuple[Any, ...]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
