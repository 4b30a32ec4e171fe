"""Base of policies that choose image tokens by what the vision tower attends to, whatever the question is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.tokens.policy import TokenPolicy, TokenState, first_with_images
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.policy_state import PolicyState
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.images import Chosen, Image, ImagePath, choosing, dropping_marked, image_path_of, mixed_videos
from aerogel.runtime.tokens.shortening import Shortening
from aerogel.runtime.tokens.stage import Rule


@dataclass(frozen=True, eq=False, kw_only=True)
class TowerState(TokenState):
    """The path of features through the model, beside what every such policy has."""

    attention: str
    """Full name of the attention of the vision tower that is read."""
    projector: str
    """Full name of the module that gives rows of the decoder's width."""
    class_token: bool
    """True where the first position of the tower stands for the whole image."""
    tokenwise: bool
    """True where the projector gives a row for each row that it reads."""


@dataclass(frozen=True)
class TowerPolicy(TokenPolicy):
    """Chooses among the tokens of each image, crop or frame before the decoder."""

    state: ClassVar[type[PolicyState]] = TowerState

    @abstractmethod
    def choose(self, image: Image) -> Chosen | None:
        """Choose among the tokens of one image; None keeps all."""

    def unsuitable(self, network: Network, calls: Sequence[Call]) -> Iterator[str]:
        """Look for videos whose features are averaged behind the projector."""
        yield from super().unsuitable(network, calls)
        yield from mixed_videos(network, calls)

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule of the first block, which drops what was not chosen."""
        return {0: dropping_marked}

    def fitted(self, network: Network, calls: Sequence[Call]) -> TowerState:
        """Find the path of the features; raises AerogelError where there is none that can be read."""
        path = image_path_of(network, first_with_images(network, calls))
        return TowerState(blocks=decoder_of(network).depth, **path.saved())

    @contextmanager
    def acting(self, network: Network, state: Any) -> Iterator[Shortening]:
        """Choose at the projector and drop before the first block."""
        path = ImagePath(state.attention, state.projector, state.class_token, state.tokenwise)
        if absent := [name for name in (path.attention, path.projector) if name not in dict(network.module.named_modules())]:
            raise AerogelError(f"the policy was calibrated for a model with {absent[0]}, which this one lacks: calibrate it again")
        with choosing(network, path, self.choose), super().acting(network, state) as shortening:
            yield shortening


def count_of(budget: float, score_P: Tensor) -> int:
    """Return how many tokens of one image a budget keeps: a number, or a share, rounded."""
    return min(len(score_P), budget if isinstance(budget, int) else round(budget * len(score_P)))
