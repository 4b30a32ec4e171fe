"""Static expert pruning: experts leave for good, those of least saliency (REAP, arXiv:2510.13999) or by trial (NAEE, arXiv:2402.14800).

E experts, R of them stay, T tokens, K experts a token is routed to, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from aerogel.errors import AerogelError, reasons
from aerogel.layers.experts import ExpertList
from aerogel.methods.base import Before, Method, Requirement
from aerogel.model.calls import Call
from aerogel.model.experts import narrow, narrowed
from aerogel.model.network import Network
from aerogel.options import Count, Tokens
from aerogel.runtime.expert_skipping.routing import experts_of, router_of, shape_of
from aerogel.runtime.expert_skipping.seen import Arrived, arrivals, outputs_of_each

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class PruneExperts(Method):
    """Removes the same number of experts from every layer, and their rows from the routers."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "experts", "uncached"})
    reorders: ClassVar[Literal["nothing", "layers", "blocks"]] = "layers"

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of each layer's experts to remove; what stays is rounded up."""
    by: Literal["reap", "naee"] = "reap"
    """`reap`: mean of router weight times size of the output over the tokens an expert gets; `naee`: all subsets, by the layer's output."""
    tokens: Tokens = 2048
    """Tokens of each layer to judge by."""
    subsets: Count = 100_000
    """Subsets that `naee` may try in a layer."""

    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Remove experts; raises AerogelError for a share that leaves too few, grouped routers, or too many subsets to try."""
        staying = self._staying(network)
        chosen = [
            self._stay(network, layer, arrived, staying) for layer, arrived in enumerate(arrivals(network, calls, self.tokens))
        ]  # all are chosen before the first is removed: a layer's input would change
        for (name, experts), stay in zip(experts_of(network).items(), chosen, strict=True):
            assert isinstance(experts, ExpertList), "a model that is compressed has its experts one by one"
            router = router_of(network, name)  # it is known by having a row for each expert
            experts.keep(stay)
            narrow(router, stay)
        config = network.config.get_text_config()
        for key in _COUNTS:
            if hasattr(config, key):
                setattr(config, key, staying)

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Count the experts that stay."""
        yield from reasons(lambda: self._staying(network))

    def _staying(self, network: Network) -> int:
        """Return the number of experts that stay in each layer; raises AerogelError where the router or the search cannot work with it."""
        _, experts, top_k = vars(shape_of(network)).values()
        staying = math.ceil(experts * (1 - self.ratio) - 1e-9)
        if staying < top_k:
            raise AerogelError(f"ratio {self.ratio} leaves {staying} of {experts} experts, and tokens go to {top_k}; remove fewer")
        if getattr(network.config.get_text_config(), "n_group", None) not in (None, 1):
            raise AerogelError("this router chooses among groups of experts, which have to stay alike; leave prune_experts out")
        if self.by == "naee" and math.comb(experts, staying) > self.subsets:
            raise AerogelError(
                f"{math.comb(experts, staying):,} subsets of {staying} experts of {experts} are more than {self.subsets:,}; set by to reap"
            )
        return staying

    def _stay(self, network: Network, layer: int, arrived: Arrived, staying: int) -> list[int]:
        y_ETH = outputs_of_each(network, layer, arrived.x_TH).float()
        if self.by == "reap":
            return sorted(saliency(y_ETH, arrived).topk(staying).indices.tolist())
        return _best_subset(y_ETH, arrived, router_of(network, list(experts_of(network))[layer]), staying)


def saliency(y_ETH: Tensor, arrived: Arrived) -> Tensor:
    """Mean over an expert's own tokens of router weight times the norm of its output (E); zero where it has none."""
    norm_ET = y_ETH.norm(dim=-1)
    total_E, count_E = norm_ET.new_zeros(len(norm_ET)), norm_ET.new_zeros(len(norm_ET))
    token_TK = torch.arange(len(arrived.index_TK), device=norm_ET.device)[:, None].expand_as(arrived.index_TK)
    chosen_N = arrived.index_TK.flatten()
    total_E.index_add_(0, chosen_N, (arrived.share_TK * norm_ET[arrived.index_TK, token_TK]).flatten())
    count_E.index_add_(0, chosen_N, torch.ones_like(total_E[chosen_N]))
    return total_E / count_E.clamp(min=1)


def _best_subset(y_ETH: Tensor, arrived: Arrived, router: nn.Module, staying: int) -> list[int]:
    """The subset whose output is nearest to that of all, by Frobenius norm, each token routed among those that stay."""
    dense_TH = _mixed(y_ETH, arrived.index_TK, arrived.share_TK)
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for subset in combinations(range(len(y_ETH)), staying):
        with narrowed(router, subset):
            _, weight_TK, index_TK = router(arrived.x_TH)[:3]
        share_TK = weight_TK.float() / weight_TK.float().sum(-1, keepdim=True)
        error = float((_mixed(y_ETH[list(subset)], index_TK, share_TK) - dense_TH).norm())
        best = min(best, (error, subset))
    return list(best[1])


def _mixed(y_ETH: Tensor, index_TK: Tensor, share_TK: Tensor) -> Tensor:
    token_TK = torch.arange(len(index_TK), device=index_TK.device)[:, None].expand_as(index_TK)
    return (share_TK[..., None] * y_ETH[index_TK, token_TK]).sum(1)
