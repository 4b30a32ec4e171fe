"""ToMe: the vision tower merges in every block the tokens whose keys are most alike (arXiv:2210.09461)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from aerogel.errors import AerogelError
from aerogel.methods.base import Requirement
from aerogel.methods.tokens.policy import Budget, TokenPolicy, first_with_images
from aerogel.methods.tower_tokens.policy import TowerState
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.options import CountOrZero
from aerogel.runtime.policy_state import PolicyState
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.images import dropping_marked, image_path_of, mixed_videos, patch_grid
from aerogel.runtime.tokens.shortening import Shortening
from aerogel.runtime.tokens.stage import Rule
from aerogel.runtime.tokens.tower_merging import MergingBlock, TowerMerging, merging_blocks


@dataclass(frozen=True, eq=False, kw_only=True)
class TomeState(TowerState):
    """The blocks that merge, beside the path of the features."""

    patches: int
    """Patches of an image."""
    attentions: tuple[str, ...]
    """Full names of the attentions of the blocks that merge."""
    norms: tuple[str, ...]
    """Full names of the modules before which they merge."""


@dataclass(frozen=True)
class Tome(TokenPolicy):
    """Matches tokens at even places with those at odd ones; the best pairs become one token, the mean over their patches.

    Merged tokens attend and are attended to in proportion to their patches, and have the place of the token that they were merged into.
    """

    state: ClassVar[type[PolicyState]] = TomeState
    requires: ClassVar[frozenset[Requirement]] = TokenPolicy.requires | {"patch_grid"}

    keep: Budget | None = None
    """Tokens of an image that stay, a number or a share, with as many pairs in each block as that takes; instead of pairs."""
    pairs: CountOrZero | tuple[CountOrZero, ...] = 16
    """Pairs that each block merges, one number or one for each."""
    as_lightcompress: bool = False
    """Forget sizes after each block, and attend to all tokens alike, as LightCompress does."""

    def unsuitable(self, network: Network, calls: Sequence[Call]) -> Iterator[str]:
        """Look for videos whose features are averaged behind the projector."""
        yield from super().unsuitable(network, calls)
        yield from mixed_videos(network, calls)

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule of the first block, which drops what was merged into others."""
        return {0: dropping_marked}

    def fitted(self, network: Network, calls: Sequence[Call]) -> TomeState:
        """Find the blocks of the tower up to the one whose output the decoder gets."""
        shown = first_with_images(network, calls)
        path = image_path_of(network, shown)
        blocks = merging_blocks(network, shown, path.attentions)
        attentions, norms = zip(*((block.attention, block.norm) for block in blocks), strict=True)
        patches = patch_grid(network) ** 2
        depth = decoder_of(network).depth
        return TomeState(blocks=depth, patches=patches, attentions=attentions, norms=norms, **path.saved())

    def counts(self, patches: int, blocks: int) -> tuple[int, ...]:
        """Return the pairs of each block."""
        if self.keep is not None:
            total = patches - min(patches, self.keep if isinstance(self.keep, int) else round(self.keep * patches))
            return tuple(total // blocks + (number < total % blocks) for number in range(blocks))
        pairs = self.pairs if isinstance(self.pairs, tuple) else (self.pairs,) * blocks
        if len(pairs) != blocks:
            raise AerogelError(f"tome: pairs has {len(pairs)} numbers, and {blocks} blocks of the vision tower merge; give one for each")
        return pairs

    @contextmanager
    def acting(self, network: Network, state: Any) -> Iterator[Shortening]:
        """Merge in the tower and drop before the first block."""
        blocks = [MergingBlock(*pair) for pair in zip(state.attentions, state.norms, strict=True)]
        merging = TowerMerging(self.counts(state.patches, len(blocks)), state.class_token, not self.as_lightcompress)
        with merging.on(network, blocks, state.projector), super().acting(network, state) as shortening:
            yield shortening
