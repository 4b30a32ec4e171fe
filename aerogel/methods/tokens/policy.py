"""Bases of policies that drop tokens before decoder blocks: rules for some of the blocks, and what they cost on the calibration data.

B rows, K positions before a block, F frames, P places of a frame, C channels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.base import Before, CalibrationSize, CostEstimate, Requirement, RuntimePolicy, name_of
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.token_selection import best
from aerogel.numerics.video_tokens import Reduced
from aerogel.options import CountOrZero, Share
from aerogel.runtime.policy_state import PolicyState
from aerogel.runtime.predictions import Predictions, predicted
from aerogel.runtime.token_types import TEXT, VISION, Vocabulary
from aerogel.runtime.tokens.clips import GRID, ClipAttention, attention_of, clips_of
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.eviction import Eviction
from aerogel.runtime.tokens.images import image_path_of
from aerogel.runtime.tokens.shortening import Rule, Selection, Shortening, Stage
from aerogel.runtime.tokens.vision_tower import VisionTower

Budget = Annotated[int, Field(ge=1, le=1_000_000)] | Share
"""Tokens of a row that stay: a number, or a share (with a decimal point)."""
CLIPS = "clips"
"""Name by which later rules of a forward find where its clips are (B, N)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenState(PolicyState):
    """The decoder that a rule fits, and what the rule costs on the calibration data."""

    blocks: int
    """Decoder blocks."""
    kept: float = math.nan
    """Share of the tokens that may be dropped that is computed, on average over the blocks."""
    kl: float = math.nan
    """KL divergence from the model with all tokens, in nats an answer token."""
    answer_tokens: int = 0
    """Answer tokens that it was measured on."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ClipState(TokenState):
    """The attention of the vision tower that is read, beside what every such policy has."""

    attention: str = ""
    """Full name of the attention; empty where none is read."""
    class_token: bool = False
    """True where the first position of the tower stands for the whole image."""


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

    @classmethod
    def strength(cls, share: float) -> dict[str, Any]:
        """Return the options by which about this share of the tokens is left in the end; empty where no option says so."""
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
        return Shortening(network, decoder, rules, self.watched(decoder.depth), self.drops_text, self.eviction(), tower).on()

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
            return rule(stage) if bool((self.droppable(stage.kind_BK) & stage.real_BK).any()) else None

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


@dataclass(frozen=True)
class ClipPolicy(TokenPolicy):
    """Drops and merges tokens of clips before the first block; images in the same prompt stay whole."""

    state: ClassVar[type[PolicyState]] = ClipState

    frames: CountOrZero = field(default=0, kw_only=True)
    """Frames of equal size that the image tokens of each prompt are, for models whose inputs hold no grid of a video; 0: there is one."""

    @property
    def reads_attention(self) -> bool:
        """True where the rule reads attention in the vision tower."""
        return False

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for the vision tower, which is given the grids of videos."""
        try:
            VisionTower.of(network, decoder_of(network))
        except AerogelError as error:
            yield str(error)
        yield from super().problems(network, before)

    def fitted(self, network: Network, calls: Sequence[Call]) -> ClipState:
        """Find the attention that is read; raises AerogelError where there is none that can be."""
        blocks = decoder_of(network).depth
        if not self.reads_attention:
            return ClipState(blocks=blocks)
        path = image_path_of(network, first_with_images(network, calls))
        return ClipState(blocks=blocks, attention=path.attention, class_token=path.class_token)

    def watched_tower(self, network: Network, state: TokenState) -> VisionTower | None:
        """Return the tower."""
        assert isinstance(state, ClipState)
        return VisionTower.of(network, decoder_of(network), state.attention, state.class_token)

    @abstractmethod
    def reduce(self, x_FPC: Tensor, attention: ClipAttention | None) -> Reduced:
        """Return what stays of a clip, given its embeddings and, where the policy reads it, the attention in the vision tower."""

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule."""
        return {0: self.reduce_clips}

    def reduce_clips(self, stage: Stage) -> Selection | None:
        """Reduce clip by clip, and remember where clips are."""
        keep_BK, hidden_BKC = torch.ones_like(stage.vision_BK), stage.hidden_BKC.clone()
        clip_BK = torch.zeros_like(keep_BK)
        clips = clips_of(stage, self.frames)
        attention = attention_of(stage, clips) if clips and self.reads_attention else [None] * len(clips)
        for clip, seen in zip(clips, attention, strict=True):
            clip_BK[clip.row, clip.at_FP] = True
            reduced = self.reduce(stage.hidden_BKC[clip.row, clip.at_FP], seen)
            keep_BK[clip.row, clip.at_FP] = reduced.keep_FP
            hidden_BKC[clip.row, clip.at_FP] = reduced.x_FPC
        stage.memory[CLIPS] = clip_BK
        return None if bool(keep_BK.all()) else Selection(keep_BK, hidden_BKC)

    def unsuitable(self, network: Network, calls: Sequence[Call]) -> Iterator[str]:
        """Look for clips."""
        if not self.frames and not any(call.kwargs.get(GRID) is not None for call in calls):
            yield (
                f"the calibration data has no clip with a grid ({GRID}); give chats with videos by --data, or say by the option frames how "
                "many frames the image tokens of a prompt are"
            )
        yield from super().unsuitable(network, calls)


def first_with_images(network: Network, calls: Sequence[Call]) -> Call:
    """Return the first call with tokens of an image or a video."""
    vocabulary = Vocabulary.of(network)
    return next(call for call in calls if bool((vocabulary.kinds(call.kwargs) == VISION).any()))


def counts(budget: float, whole_B: Tensor) -> Tensor:
    """Return how many tokens of each row a budget keeps: a number, or a share of `whole_B`, rounded."""
    if isinstance(budget, int):
        return whole_B.clamp(max=budget)
    return (whole_B.double() * budget).round().long()


def keeping_best(stage: Stage, score_BK: Tensor, budget: float) -> Selection | None:
    """Keep the image tokens of each row with the highest scores, so many or such a share of all that the row has, and all other tokens."""
    count_B = counts(budget, stage.vision_total_B)
    if bool((count_B >= stage.vision_BK.sum(1)).all()):
        return None
    return Selection(best(score_BK, stage.vision_BK, count_B) | ~stage.vision_BK)


def last_token(stage: Stage) -> Tensor:
    """Return the number of the last token of each row that is no padding (B, 1)."""
    number_K = torch.arange(stage.kind_BK.shape[1], device=stage.kind_BK.device)
    return (number_K * stage.real_BK).argmax(1, keepdim=True)
