"""Key-value cache in 8-bit floats (e4m3) with static scales, as vLLM, SGLang and TensorRT-LLM serve it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.kv_cache.policy import KVCachePolicy, KVCacheState
from aerogel.model.calls import Call
from aerogel.model.kv_cache import watch_cache, with_cache
from aerogel.model.network import Network
from aerogel.numerics.kv_cache import static_scale
from aerogel.runtime.kv_cache.stores import Fp8Store, Store

_GRANULARITIES: tuple[Literal["tensor", "attn_head"], ...] = ("tensor", "attn_head")
_PARTS = ("k_scale", "v_scale")


@dataclass(frozen=True)
class KVCacheFP8(KVCachePolicy):
    """Stores keys and values in float8_e4m3fn, with scales from the largest numbers of the calibration data.

    The scales are written beside the weights (`k_scale`, `v_scale`) and `kv_cache_scheme` names them, so that engines quantize their cache
    alike.
    """

    granularity: Literal["tensor", "attn_head"] = "tensor"
    """One scale for the keys of an attention and one for its values, or one for each head of either."""

    def remarks(self, network: Network) -> Iterator[str]:
        """Say that engines do not know which attentions are left out."""
        if self.keep or self.ignore:
            yield "engines quantize the cache of every attention unless told otherwise (vLLM: --kv-cache-dtype-skip-layers)"

    def measured(self, network: Network, modules: Mapping[str, int], calls: Sequence[Call]) -> dict[str, Tensor]:
        """Find the largest keys and values over all calls: scales of shape (1,), or (heads, 1, 1)."""
        largest: dict[str, Tensor] = {}

        def see(name: str, keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
            for part, x in zip((f"{name}.{part}" for part in _PARTS), (keys_BHTD, values_BHTD), strict=True):
                most = x.abs().amax(dim=(0, 2, 3)).float()
                most = most[:, None, None] if self.granularity == "attn_head" else most.amax()[None]
                largest[part] = torch.maximum(largest.get(part, most), most)

        with watch_cache(network, modules, lambda name: partial(see, name)):
            for call in calls:
                network.run(with_cache(call))
        return {part: static_scale(most) for part, most in largest.items()}

    def stores(self, scales: Mapping[str, Tensor]) -> tuple[Store, Store]:
        """Return stores in float8."""
        keys, values = (scales[part] for part in _PARTS)
        return Fp8Store(keys), Fp8Store(values)

    @property
    def config_entries(self) -> dict[str, Any]:
        """Return `kv_cache_scheme` as compressed-tensors writes it."""
        scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": self.granularity, "dynamic": False}
        return {"kv_cache_scheme": scheme}

    def config_tensors(self, state: KVCacheState) -> dict[str, Tensor]:
        """Return the scales."""
        return dict(state.scales)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[KVCacheFP8, KVCacheState] | None:
        """Return the policy of a `kv_cache_scheme` and its scales."""
        scheme = config.get("kv_cache_scheme") or {}
        kind = scheme.get("num_bits"), scheme.get("type"), scheme.get("dynamic", False), scheme.get("symmetric", True)
        granularity = next((one for one in _GRANULARITIES if one == (scheme.get("strategy") or "tensor")), None)
        if kind != (8, "float", False, True) or granularity is None:
            return None
        names = sorted({name.rpartition(".")[0] for name in tensors}, key=_by_number)
        if lacking := [f"{name}.{part}" for name in names for part in _PARTS if f"{name}.{part}" not in tensors]:
            raise AerogelError(
                f"kv_cache_scheme in config.json needs {lacking[0]}, which the checkpoint lacks; get all files of the model again"
            )
        return cls(granularity=granularity), KVCacheState(tuple(names), scales=dict(tensors))


def _by_number(name: str) -> list[tuple[int, str]]:
    """Order of names with numbers in them."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
