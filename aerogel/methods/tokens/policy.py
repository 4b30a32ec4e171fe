"""Bases of policies that drop tokens before decoder blocks: rules for some of the blocks, and what they cost on the calibration data.

B rows, K positions before a block, F frames, P places of a frame, C channels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.base import Before, CalibrationSize, CostEstimate, Requirement, RuntimePolicy, name_of
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.token_selection import best
from aerogel.options import Share
from aerogel.runtime.policy_state import PolicyState
from aerogel.runtime.predictions import Predictions, predicted
from aerogel.runtime.token_types import TEXT, VISION, Vocabulary
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.eviction import Eviction
from aerogel.runtime.tokens.shortening import Shortening
from aerogel.runtime.tokens.stage import Observe, Positions, Rule, Selection, Stage
from aerogel.runtime.tokens.vision_tower import VisionTower

Budget = Annotated[int, Field(ge=1, le=1_000_000)] | Share
"""Tokens of a row that stay: a number, or a share (with a decimal point)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenState(PolicyState):
    """The decoder that a rule fits, and what the rule costs on the calibration data."""

    blocks: int
    """Decoder blocks."""
    kept: float = math.nan
    """Share of the tokens that may be dropped, separators of an image among them, that is computed, on average over the blocks."""
    kl: float = math.nan
    """KL divergence from the model with all tokens, in nats an answer token."""
    answer_tokens: int = 0
    """Answer tokens that it was measured on."""


class _OfText(Predictions):
    """Predictions at tokens of text only: at those of an image there are none where it is dropped."""

    def judged(self, call: Call) -> Tensor:
        return predicted(call, self.vocabulary) & (self.vocabulary.kinds(call.kwargs) == TEXT)


@dataclass(frozen=True)
class DroppingPolicy(RuntimePolicy[TokenState]):
    """Drops tokens while a prompt is read; what is dropped is not computed by later blocks and not kept in their cache."""

    state: ClassVar[type[PolicyState]] = TokenState
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "decoder"})
    skips_modules: ClassVar[bool] = True
    drops_positions: ClassVar[bool] = True
    drops_text: ClassVar[bool] = False
    """True where tokens of text are dropped too: measures that need the logits of every token refuse the model while the policy is on."""
    search_space: ClassVar[tuple[str, tuple[float, ...]] | None] = None
    """Option that a search brings to a budget, and values of it in order of what they save, the least first; None: `strength` says it."""

    @classmethod
    def strength(cls, share: float) -> dict[str, Any]:
        """Return the options by which about this share of the tokens is left in the end; empty where no option is such a share."""
        keep = cls.__dataclass_fields__.get("keep")
        if keep is None or keep.default == ():
            return {}
        stages = len(keep.default) if isinstance(keep.default, tuple) else 0
        return {"keep": tuple(round(share ** (number / stages), 4) for number in range(1, stages + 1)) if stages else share}

    @abstractmethod
    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rules of a decoder of so many blocks, by the number of the block that each acts before."""

    def eviction(self) -> Eviction | None:
        """Return what evicts tokens from the cache beside; nothing unless a policy says so."""
        return None

    def watched(self, depth: int) -> tuple[int, ...]:
        """Return the blocks whose queries and keys the rules read; none unless a policy says so."""
        return ()

    def observer(self) -> Observe | None:
        """Return what sees the queries and keys of every block before the last rule; nothing unless a policy says so."""
        return None

    @abstractmethod
    def predictions(self, network: Network, calls: Sequence[Call]) -> Predictions:
        """Return the predictions that are compared: none of them at a token that may be dropped."""

    @abstractmethod
    def droppable(self, kind_BN: Tensor) -> Tensor:
        """Return the tokens among which the rules choose, by their types."""

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Once with all tokens and once with those that are kept."""
        return CostEstimate(model_tokens=2.0 * size.tokens)

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the numbers of the blocks with the depth of the decoder."""
        depth = decoder_of(network).depth
        if late := [block for block in (*self.rules(depth), *self.watched(depth)) if block >= depth]:
            yield f"it acts before block {max(late)}, and the decoder has blocks 0 to {depth - 1}"

    def fitted(self, network: Network, calls: Sequence[Call]) -> TokenState:
        """Find what the rules need of the model, before anything is measured."""
        return TokenState(blocks=decoder_of(network).depth)

    def acting(self, network: Network, state: TokenState) -> AbstractContextManager[Shortening]:
        """Let the rules act for a while."""
        decoder = decoder_of(network)
        rules = {block: self._where_droppable(rule) for block, rule in self.rules(decoder.depth).items()}
        tower = self.watched_tower(network, state)
        return Shortening(
            network, decoder, rules, self.watched(decoder.depth), self.drops_text, self.eviction(), tower, self.observer()
        ).on()

    def watched_tower(self, network: Network, state: TokenState) -> VisionTower | None:
        """Return the vision tower whose grids or attention the rules read; none unless a policy says so."""
        return None

    @torch.no_grad()
    def calibrate(self, network: Network, calls: Sequence[Call]) -> TokenState:
        """Measure what dropping costs on the calls."""
        vocabulary, state = Vocabulary.of(network), self.fitted(network, calls)
        whole = self.predictions(network, calls)
        with self.acting(network, state) as shortening:
            kl = whole.moved().kl
        dense = sum(int(self.droppable(vocabulary.kinds(call.kwargs)).sum()) for call in calls) * state.blocks
        return replace(state, kept=1 - shortening.dropped / max(1, dense), kl=kl, answer_tokens=whole.tokens)

    @contextmanager
    def on(self, network: Network, state: TokenState) -> Iterator[None]:
        """Drop by the rules; raises AerogelError when the state is of a decoder with another number of blocks."""
        depth = decoder_of(network).depth
        if depth != state.blocks:
            raise AerogelError(
                f"{name_of(self)} was calibrated for a decoder of {state.blocks} blocks, and this model's has {depth}: "
                "calibrate the policy again"
            )
        with self.acting(network, state):
            yield

    def _where_droppable(self, rule: Rule) -> Rule:
        """A rule that is asked only where it may drop something."""

        def asked(stage: Stage) -> Selection | None:
            may_go_BK = stage.kept.rows(self.droppable(stage.kind_BN))  # by the whole rows: what is left of one may be short
            return rule(stage) if bool((may_go_BK & stage.real_BK).any()) else None

        return asked


@dataclass(frozen=True)
class TokenPolicy(DroppingPolicy):
    """Drops tokens of images."""

    requires: ClassVar[frozenset[Requirement]] = DroppingPolicy.requires | {"images"}

    def predictions(self, network: Network, calls: Sequence[Call]) -> Predictions:
        """Return the predictions that are compared; those at tokens of text unless a policy says otherwise."""
        return _OfText(network, calls, Vocabulary.of(network))

    def droppable(self, kind_BN: Tensor) -> Tensor:
        """Return the tokens among which the rules choose, by their types."""
        return kind_BN == VISION

    def unsuitable(self, network: Network, calls: Sequence[Call]) -> Iterator[str]:
        """Look for tokens that may be dropped."""
        vocabulary = Vocabulary.of(network)
        kinds = [vocabulary.kinds(call.kwargs) for call in calls if "input_ids" in call.kwargs]
        if not any(bool(self.droppable(kind_BN).any()) for kind_BN in kinds):
            yield "the calibration data has no token of an image; give chats with images by --data"


def first_with_images(network: Network, calls: Sequence[Call]) -> Call:
    """Return the first call with tokens of an image or a video."""
    vocabulary = Vocabulary.of(network)
    return next(call for call in calls if bool((vocabulary.kinds(call.kwargs) == VISION).any()))


def counts(budget: float, whole_B: Tensor) -> Tensor:
    """Return how many tokens of each row a budget keeps: a number, or a share of `whole_B`, rounded."""
    if isinstance(budget, int):
        return whole_B.clamp(max=budget)
    return (whole_B.double() * budget).round().long()


def within_budget(stage: Stage, budget: float) -> Tensor | None:
    """Return how many image tokens of each row a budget keeps; None where every row keeps all that it has left."""
    count_B = counts(budget, stage.vision_total_B)
    return None if bool((count_B >= stage.vision_BK.sum(1)).all()) else count_B


def keeping_best(stage: Stage, score_BK: Tensor, budget: float) -> Selection | None:
    """Keep the image tokens of each row with the highest scores, so many or such a share of all that the row has, and all other tokens."""
    count_B = within_budget(stage, budget)
    return None if count_B is None else Selection(best(score_BK, stage.vision_BK, count_B) | ~stage.vision_BK)


def last_token(positions: Positions) -> Tensor:
    """Return the number of the last token of each row's prompt (B, 1)."""
    number_K = torch.arange(positions.kind_BK.shape[1], device=positions.kind_BK.device)
    return (number_K * positions.prompt_BK).argmax(1, keepdim=True)
