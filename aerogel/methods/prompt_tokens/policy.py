"""Base of policies that drop positions of long prompts, and what their rules share.

B rows, N positions of a forward, K of them that are left, R positions that ask.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.methods.tokens.policy import DroppingPolicy, last_token
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.options import Count, Share
from aerogel.runtime.predictions import Predictions, predicted
from aerogel.runtime.token_types import PADDING, Vocabulary
from aerogel.runtime.tokens.shortening import Selection, Stage


class _OfEnd(Predictions):
    """Predictions at the last tokens of each row only: elsewhere there may be none."""

    def __init__(self, network: Network, calls: Sequence[Call], last: int) -> None:
        self._last = last
        super().__init__(network, calls, Vocabulary.of(network))

    def judged(self, call: Call) -> Tensor:
        real_BN = self.vocabulary.kinds(call.kwargs) != PADDING
        after_BN = real_BN.sum(1, keepdim=True) - real_BN.cumsum(1)
        return predicted(call, self.vocabulary) & (after_BN < self._last)


@dataclass(frozen=True)
class PromptPolicy(DroppingPolicy):
    """Drops positions of long prompts; the first and the last ones of each row stay."""

    drops_text: ClassVar[bool] = True

    min_length: Count = field(default=4096, kw_only=True)
    """Tokens from which on a prompt is pruned; shorter ones are computed as without the policy, bit for bit."""

    @property
    @abstractmethod
    def last(self) -> int:
        """Number of last tokens of a prompt that always stay."""

    def predictions(self, network: Network, calls: Sequence[Call]) -> Predictions:
        """Return the predictions at the last tokens, which always stay."""
        return _OfEnd(network, calls, self.last)

    def droppable(self, kind_BN: Tensor) -> Tensor:
        """Return everything in rows that are long enough; what stays for other reasons is the rule's matter."""
        real_BN = kind_BN != PADDING
        return real_BN & (real_BN.sum(1, keepdim=True) >= self.min_length)

    def unsuitable(self, network: Network, calls: Sequence[Call]) -> Iterator[str]:
        """Look for a row that is long enough."""
        vocabulary = Vocabulary.of(network)
        kinds = [vocabulary.kinds(call.kwargs) for call in calls if "input_ids" in call.kwargs]
        longest = max((int((kind_BN != PADDING).sum(1).max()) for kind_BN in kinds), default=0)
        if longest < self.min_length:
            yield (
                f"the longest row of the calibration data has {longest} tokens, and prompts are pruned from {self.min_length} on; "
                f"give longer ones (--length {self.min_length}), or a smaller min_length"
            )


@dataclass(frozen=True)
class Prompt:
    """Positions before a block as tokens of their prompts."""

    index_BK: Tensor
    """Numbers of the tokens in their rows, padding not counted; -1 for what is no token."""
    length_B: Tensor
    """Tokens of the prompts; an answer behind one has numbers from there on."""

    @classmethod
    def of(cls, stage: Stage) -> Prompt:
        """Number the positions that a rule sees."""
        real_BN = stage.kind_BN != PADDING
        index_BK = stage.kept.rows(real_BN.cumsum(1) - 1)
        return cls(index_BK.masked_fill(~stage.real_BK, -1), stage.prompt_BN.sum(1))

    def within(self, first: int, last: int) -> Tensor:
        """Return where tokens are neither among the first nor among the last of their row (B, K)."""
        return (self.index_BK >= first) & (self.index_BK < self.length_B[:, None] - last)


def last_tokens(stage: Stage, count: int) -> Tensor:
    """Return the numbers of the last tokens of each row that are no padding (B, R); the first position again where there are fewer."""
    back_R = torch.arange(count - 1, -1, -1, device=stage.kind_BK.device)
    return (last_token(stage) - back_R).clamp(min=0)


def keeping(stage: Stage, keep_BK: Tensor, may_go_BK: Tensor) -> Selection | None:
    """Keep these and whatever may not go; None where that is everything."""
    keep_BK = keep_BK | ~may_go_BK
    return None if bool((keep_BK | ~stage.real_BK).all()) else Selection(keep_BK)


def blocks_at(at: Sequence[Share], depth: int) -> list[int]:
    """Return the numbers of the blocks at some depths, shares of all blocks; the first block is never among them."""
    return [max(1, min(depth - 1, round(depth * share))) for share in at]
