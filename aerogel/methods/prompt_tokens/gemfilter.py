"""GemFilter: an early block of a decoder chooses the tokens of a long prompt, which the whole decoder then reads alone (arXiv:2409.17422).

The rule of the public code, on the tokens of each row; there the last tokens may go, here they stay: the prediction is made behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from aerogel.methods.base import Before
from aerogel.methods.prompt_tokens.policy import Prompt, PromptPolicy, blocks_at, keeping
from aerogel.methods.tokens.policy import Budget, counts, last_token
from aerogel.model.network import Network
from aerogel.model.rotary import rotary_of
from aerogel.numerics.prompt_selection import mean_pool
from aerogel.numerics.token_selection import best
from aerogel.options import Count, Share
from aerogel.runtime.tokens.stage import Rule, Selection, Stage


@dataclass(frozen=True)
class Gemfilter(PromptPolicy):
    """Reads a long prompt up to one block, and then the tokens alone that its last query there meets, as a prompt of their own.

    It acts on the forward that fills an empty cache.
    """

    keep: Budget = 1024
    """Tokens of a prompt that are read again, the last ones among them: a number, or a share."""
    at: Share = 0.41
    """Depth of the block that chooses, as a share of the decoder's blocks."""
    kernel: Count = 5
    """Neighbours over which scores are averaged; odd."""
    local: Count = 8
    """Last tokens of a prompt, which always stay; at least 2, since the calibration compares predictions at them."""

    @property
    def last(self) -> int:
        """Number of last tokens of a prompt that always stay."""
        return self.local

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look at the options, and at the positions of the model."""
        if self.local < 2:
            yield f"local is {self.local}, expected at least 2: the calibration compares predictions at the last tokens"
        if self.kernel % 2 == 0:
            yield f"kernel is {self.kernel}, expected an odd number"
        rotary = rotary_of(network.config)
        if rotary.has_axes or rotary.kind in (None, "dynamic", "longrope"):
            kind = f"by rotary embeddings of type {rotary.kind}" if rotary.kind else "by no rotary embedding"
            said = "of several axes" if rotary.has_axes else kind
            yield f"positions are renumbered, and those of this model are {said}: choose prompt_pruning, which leaves them as they are"
        yield from super().problems(network, before)

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule, which acts before the first block."""
        return {0: partial(self.choose, blocks_at([self.at], depth)[0])}

    def choose(self, block: int, stage: Stage) -> Selection | None:
        """Keep the tokens whose keys have the largest products with the last query, and the last tokens."""
        prompt = Prompt.of(stage)
        may_go_BK = prompt.within(0, self.local) & (prompt.length_B >= self.min_length)[:, None]
        count_B = (counts(self.keep, prompt.length_B) - self.local).clamp(min=0)
        if stage.before or bool((count_B >= may_go_BK.sum(1)).all()):
            return None
        product_BK = stage.ahead(block).products(last_token(stage)).sum(1)[:, 0].masked_fill(~stage.real_BK, 0)
        selection = keeping(stage, best(mean_pool(product_BK, self.kernel), may_go_BK, count_B), may_go_BK)
        return None if selection is None else selection._replace(renumber=True)
