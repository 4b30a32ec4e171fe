"""PyramidDrop: image tokens are dropped in stages, by the attention of the prompt's last token (arXiv:2410.17247)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from aerogel.methods.base import Before
from aerogel.methods.tokens.policy import Budget, TokenPolicy, keeping_best, last_token
from aerogel.model.network import Network
from aerogel.options import CountOrZero, Share
from aerogel.runtime.tokens.stage import Rule, Selection, Stage


@dataclass(frozen=True)
class PyramidDrop(TokenPolicy):
    """Drops image tokens before several blocks; each time queries and keys of the block that follows say which."""

    keep: tuple[Budget, ...] = (0.5, 0.25, 0.125)
    """Image tokens of a row that stay after each stage: numbers, or shares of all."""
    at: tuple[Share, ...] = (0.25, 0.5, 0.75)
    """Depths of the stages, as shares of the decoder's blocks."""
    layers: tuple[CountOrZero, ...] = ()
    """Numbers of the blocks instead of depths."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the numbers of budgets and stages."""
        if len(self.keep) != len(self.layers or self.at):
            yield f"keep has {len(self.keep)} budgets for {len(self.layers or self.at)} stages; give one for each"
        yield from super().problems(network, before)

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return a rule for each stage; where several stages fall on one block of a short decoder, the last counts."""
        blocks = self.layers or [min(depth - 1, round(depth * share)) for share in self.at]
        return {block: _Stage(budget) for block, budget in zip(blocks, self.keep, strict=False)}


@dataclass(frozen=True)
class _Stage:
    """One stage."""

    budget: float

    def __call__(self, stage: Stage) -> Selection | None:
        """Keep what the last token of the prompt attends to most."""
        probability_BHRK = stage.probe().attention(last_token(stage))
        return keeping_best(stage, probability_BHRK.mean(1)[:, 0], self.budget)
