"""Base of policies that drop positions of long prompts, and what their rules share.

B rows, N positions of a forward, K of them that are left, R positions that ask.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aerogel.methods.base import Before
from aerogel.methods.tokens.policy import Budget, DroppingPolicy, counts, last_token
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.token_selection import best
from aerogel.options import Count, CountOrZero, Share
from aerogel.runtime.predictions import Predictions, predicted
from aerogel.runtime.token_types import PADDING, Vocabulary
from aerogel.runtime.tokens.eviction import Eviction, FinalPositions
from aerogel.runtime.tokens.stage import Positions, Rule, Selection, Stage, prompt_of

KVPolicy = Literal["per_group", "final"]


class _OfEnd(Predictions):
    """Predictions at the last tokens of each row only, or at the answer behind its prompt: elsewhere there may be none."""

    def __init__(self, network: Network, calls: Sequence[Call], last: int) -> None:
        self._last = last
        super().__init__(network, calls, Vocabulary.of(network))

    def judged(self, call: Call) -> Tensor:
        if call.kwargs.get("labels") is not None:  # what is asked for behind a prompt always stays
            return predicted(call, self.vocabulary)
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
        read = [call.kwargs for call in calls if "input_ids" in call.kwargs]
        longest = max((int(prompt_of(vocabulary.kinds(inputs), inputs.get("labels")).sum(1).max()) for inputs in read), default=0)
        if longest < self.min_length:
            yield (
                f"the longest prompt of the calibration data has {longest} tokens, and prompts are pruned from {self.min_length} on; "
                f"give longer ones (--length {self.min_length}), or a smaller min_length"
            )


@dataclass(frozen=True)
class BlockPolicy(PromptPolicy):
    """Drops blocks of a long prompt in stages, those with the lowest scores; rules differ in how they score."""

    keep: tuple[Budget, ...] = (0.5, 0.25, 0.125)
    """Tokens of a prompt that stay after each stage, the first and the last ones among them: numbers, or shares."""
    at: tuple[Share, ...] = (0.33, 0.5, 0.67)
    """Depths of the stages, as shares of the decoder's blocks."""
    layers: tuple[CountOrZero, ...] = ()
    """Numbers of the decoder blocks before which tokens are dropped, instead of depths."""
    block: Count = 64
    """Tokens that stay or go together."""
    sink: CountOrZero = 4
    """First tokens of a prompt, which always stay."""
    local: Count = 64
    """Last tokens of a prompt, which always stay."""
    kv_policy: KVPolicy = "per_group"
    """Tokens of a prompt in the cache of each decoder block: those that it computed, or (`final`) those of the last block alone."""

    @abstractmethod
    def scores(self, stage: Stage, place_BK: Tensor, blocks: int) -> Tensor:
        """Return the scores of the blocks (B, G); `place_BK` are the places of positions in them, -1 for those that stay anyway."""

    @property
    def last(self) -> int:
        """Number of last tokens of a prompt that always stay."""
        return self.local

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the numbers of budgets and stages."""
        if len(self.keep) != len(self.layers or self.at):
            yield f"keep has {len(self.keep)} budgets for {len(self.layers or self.at)} stages; give one for each"
        yield from super().problems(network, before)

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return a rule for each stage; where several stages fall on one block of a short decoder, the last counts."""
        blocks = self.layers or blocks_at(self.at, depth)
        return {block: partial(self.choose, budget) for block, budget in zip(blocks, self.keep, strict=False)}

    def eviction(self) -> Eviction | None:
        """Return what cuts the cache of earlier decoder blocks."""
        return FinalPositions() if self.kv_policy == "final" else None

    def choose(self, budget: float, stage: Stage) -> Selection | None:
        """Keep the blocks with the highest scores, as many as fit into the budget beside the tokens that stay anyway."""
        prompt = Prompt.of(stage)
        # What is left over behind the last whole block stays with the last tokens.
        blocks_B = (prompt.length_B - self.sink - self.local).clamp(min=0) // self.block
        blocks_B = blocks_B.masked_fill(prompt.length_B < self.min_length, 0)
        place_BK = prompt.index_BK - self.sink
        in_block_BK = (prompt.index_BK >= self.sink) & (place_BK < blocks_B[:, None] * self.block)
        always_B = prompt.length_B - blocks_B * self.block
        count_B = (counts(budget, prompt.length_B) - always_B).clamp(min=0) // self.block
        if bool((count_B * self.block >= in_block_BK.sum(1)).all()):
            return None
        place_BK = place_BK.masked_fill(~in_block_BK, -1)
        group_BK = place_BK.clamp(min=0) // self.block
        score_BG = self.scores(stage, place_BK, int(blocks_B.max()))
        there_BG = torch.zeros_like(score_BG, dtype=torch.int64).scatter_add(1, group_BK, in_block_BK.long()) > 0
        chosen_BG = best(score_BG, there_BG, count_B)
        return keeping(stage, chosen_BG.gather(1, group_BK), in_block_BK)


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


def last_tokens(positions: Positions, count: int) -> Tensor:
    """Return the numbers of the last tokens of each row that are no padding (B, R); the first position again where there are fewer."""
    back_R = torch.arange(count - 1, -1, -1, device=positions.kind_BK.device)
    return (last_token(positions) - back_R).clamp(min=0)


def keeping(stage: Stage, keep_BK: Tensor, may_go_BK: Tensor) -> Selection | None:
    """Keep these and whatever may not go; None where that is everything."""
    keep_BK = keep_BK | ~may_go_BK
    return None if bool((keep_BK | ~stage.real_BK).all()) else Selection(keep_BK)


def blocks_at(at: Sequence[Share], depth: int) -> list[int]:
    """Return the numbers of the blocks at some depths, shares of all blocks; the first block is never among them."""
    return [max(1, min(depth - 1, round(depth * share))) for share in at]
