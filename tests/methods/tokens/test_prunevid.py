"""PruneVid on networks: clips of a prompt by their grid, images whole."""

from __future__ import annotations

from aerogel.methods.tokens.prunevid import Prunevid
from aerogel.numerics.video_tokens import prunevid
from tests.methods.tokens.clip_calls import require_rule

MATRIX = {"options": {"frames": 2, "least": 0}}


def test_clips_are_reduced_by_the_rule() -> None:
    """Random frames have no static places; of eight tokens four stay."""
    whole = Prunevid(threshold=1.0, merged=1.0)
    require_rule(Prunevid(least=7), whole, (16, 24), lambda x_FPC, _: prunevid(x_FPC, 0.25, 0.8, 0.5, 7))
