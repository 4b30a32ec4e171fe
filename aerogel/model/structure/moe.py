"""MoE layers: where the routed experts of a network are, what routes to them, and which attention comes before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from aerogel.errors import AerogelError
from aerogel.layers.experts import ExpertList

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")


def routed_experts(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that run routed experts, fused or one by one, by full name in the order of the modules."""
    return {name: part for name, part in module.named_modules() if isinstance(part, ExpertList) or _is_fused(part)}


def router_of(module: nn.Module, experts: str) -> nn.Module:
    """Return what routes to the experts with this full name; raises AerogelError where no module beside them has a row for each."""
    count = count_of(module.get_submodule(experts))
    for _, part in _beside(module, experts):
        if any(weight.ndim == 2 and len(weight) == count for weight in part.parameters(recurse=False)):
            return part
    raise AerogelError(f"no router is known beside {experts}: no module there has one output for each of the {count} experts")


def gates_of(module: nn.Module, blocks: Sequence[str]) -> frozenset[str]:
    """Return full names of the linear layers beside experts that weigh experts, routed or shared: small, and decisive for all else."""
    found = set()
    for experts, part in routed_experts(module).items():
        found |= {name for name, beside in _beside(module, experts) if _gives(beside, 1, count_of(part))}
    inside = tuple(f"{name}." for name in blocks)
    for name, part in module.named_modules():
        # Models with code of their own list their experts: alike elements, with a gate right beside the list.
        if type(part) is nn.ModuleList and name.startswith(inside) and len(part) > 1 and len({type(element) for element in part}) == 1:
            home = name.rpartition(".")[0]
            siblings = [(f"{home}.{key}", child) for key, child in module.get_submodule(home).named_children()]
            gates = {sibling for sibling, child in siblings if _gives(child, len(part))}
            # Beside a list with a gate, a layer with one output weighs the shared expert.
            found |= gates | ({sibling for sibling, child in siblings if _gives(child, 1)} if gates else set())
    return frozenset(found)


def _gives(part: nn.Module, *counts: int) -> bool:
    return isinstance(part, nn.Linear) and part.out_features in counts


def attention_before(module: nn.Module, block: str, experts: str) -> nn.Module:
    """Return the attention of the block that has these experts; raises AerogelError where it has none."""
    for name, part in module.get_submodule(block).named_modules(prefix=block):
        if type(part).__name__.endswith("Attention") and not experts.startswith(f"{name}."):
            return part
    raise AerogelError(f"{block} has experts but no attention, whose probabilities the rule needs; leave that part of the rule out")


def top_k_of(module: nn.Module, experts: str, config: object) -> int:
    """Return to how many experts a token goes; raises AerogelError where neither router nor configuration says it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    places = [(text, name) for name in _TOP_K] + [(router_of(module, experts), "top_k")]
    for owner, name in places:
        if isinstance(value := getattr(owner, name, None), int):
            return value
    raise AerogelError(f"neither the configuration nor the router of {experts} says to how many experts a token goes ({_TOP_K[0]})")


def count_of(experts: nn.Module) -> int:
    """Return the number of experts of a module; as the index of an expert it means none."""
    return len(experts) if isinstance(experts, ExpertList) else experts.num_experts  # type: ignore[return-value]


def _is_fused(part: nn.Module) -> bool:
    """Return True for fused experts that transformers can run by another implementation."""
    return hasattr(part, "is_transposed") and hasattr(part, "num_experts") and hasattr(part, "down_proj")


def _beside(module: nn.Module, experts: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the MoE layer that has these experts, the experts themselves left out."""
    home = experts.rpartition(".")[0]
    for name, part in module.get_submodule(home).named_modules(prefix=home):
        if name != home and not f"{name}.".startswith(f"{experts}."):
            yield name, part
