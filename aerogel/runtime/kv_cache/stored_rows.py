"""Base of cache layers that store keys and values in a form of their own: rows are picked, repeated and reordered in one way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from aerogel.errors import AerogelError


class StoredRowsLayer(DynamicLayer):
    """A layer whose keys and values are no tensors (B, H, T, D)."""

    is_compileable = False
    form: ClassVar[str]
    """Name of such a cache, for errors."""

    @abstractmethod
    def select(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of everything that is stored."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of other beams in place."""
        self.select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.select(lambda x: x[indices, ...])

    def offload(self) -> None:
        """Raise AerogelError: what is stored stays where it is."""
        raise AerogelError(f"{self.form} is not offloaded to the host; choose the dynamic cache without offloading")

    prefetch = offload
