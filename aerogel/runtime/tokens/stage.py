"""Positions of a forward that reach a decoder block, and what a rule decides about them.

B rows, N positions of a forward, K of them that are left, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.data.chats import IGNORED
from aerogel.runtime.token_types import PADDING, VISION
from aerogel.runtime.tokens.kept import Kept
from aerogel.runtime.tokens.scores import QueryKey
from aerogel.runtime.tokens.vision_tower import TowerPass


class Selection(NamedTuple):
    """Decision of a rule."""

    keep_BK: Tensor
    """True where a position stays."""
    hidden_BKC: Tensor | None = None
    """Hidden states in place of the block's input, where positions are merged; rows that do not stay are not read."""
    renumber: bool = False
    """True where the positions that stay become consecutive and end where they ended: rotary embeddings, which know distances alone, take
    them for a prompt of their own, and later tokens follow the last one."""


@dataclass(frozen=True)
class Positions:
    """Positions that are left at a block."""

    block: int
    """Number of the block."""
    kind_BK: Tensor
    """Types of the tokens (see token_types)."""
    kept: Kept
    """Places of the positions in the forward."""
    kind_BN: Tensor
    """Types of all tokens of the forward."""
    inputs: Mapping[str, Any]
    """Arguments of the model's own forward, by name."""
    memory: dict[str, Any]
    """Findings of this forward that later rules of it read, by name."""

    @property
    def real_BK(self) -> Tensor:  # noqa: N802
        """True where a position is one of the forward and no padding."""
        real_BK = self.kind_BK != PADDING
        return real_BK if self.kept.real_BK is None else real_BK & self.kept.real_BK

    @property
    def prompt_BN(self) -> Tensor:  # noqa: N802
        """True where a position of the forward is of the prompt: no padding, and before the answer where `labels` say where one begins."""
        return prompt_of(self.kind_BN, self.inputs.get("labels"))

    @property
    def prompt_BK(self) -> Tensor:  # noqa: N802
        """True where a position is of the prompt."""
        return self.real_BK & self.kept.rows(self.prompt_BN)

    @property
    def vision_total_B(self) -> Tensor:  # noqa: N802
        """Positions of images and videos of each row of the forward."""
        return (self.kind_BN == VISION).sum(1)

    @property
    def vision_BK(self) -> Tensor:  # noqa: N802
        """True where a position is of an image or a video."""
        return self.real_BK & (self.kind_BK == VISION)


@dataclass(frozen=True, kw_only=True)
class Stage(Positions):
    """Positions before a block, as a rule sees them."""

    hidden_BKC: Tensor
    watched: Mapping[int, QueryKey]
    """Queries and keys of earlier blocks that the rule asked for, by the block's number."""
    probe: Callable[[], QueryKey]
    """Computes queries and keys of the block that would read the positions, for these positions alone."""
    ahead: Callable[[int], QueryKey]
    """Computes those of a later block, by its number, in a pass of these positions through the blocks up to it."""
    deeper: Callable[[], Tensor | None]
    """Puts the features of deeper layers of the vision tower side by side, for these positions; None where the model has none."""
    before: int
    """Positions that came before the forward."""
    final_norm: Callable[[Tensor], Tensor]
    """Norm behind the decoder's last block."""
    video_BN: Tensor
    """True where a position of the forward stands for a video by an id of its own."""
    separator_BN: Tensor
    """True where an image token of the forward is no feature but a separator; its type is that of special tokens."""
    tower: TowerPass | None = None
    """Grid and attention of the vision tower's last forward, where the policy asks for them; that of videos, where there are some."""


def prompt_of(kind_BN: Tensor, labels_BN: Tensor | None) -> Tensor:
    """Return where a token is of the prompt: no padding, and before the answer where labels say where one begins."""
    real_BN = kind_BN != PADDING
    if labels_BN is None:
        return real_BN
    before_BN = real_BN & ((labels_BN != IGNORED).cumsum(1) == 0)
    return torch.where(before_BN.any(1, keepdim=True), before_BN, real_BN)


Rule = Callable[[Stage], Selection | None]
"""Chooses what stays before a block; None where everything does."""
Observe = Callable[[Positions, QueryKey], None]
"""Sees the queries and keys of a block before the last rule's, as the block computes them."""
