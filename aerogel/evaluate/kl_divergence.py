"""Agreement with the original, token by token, on held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from aerogel.data import text
from aerogel.errors import AerogelError
from aerogel.evaluate.measure import EveryTokenMeasure, original_of, predictions, require_finite
from aerogel.model.network import Network
from aerogel.numerics.metrics import kl_divergence, top1_agreement
from aerogel.options import Tokens

ROWS = 256
"""Rows of logits compared at once."""


@dataclass(frozen=True)
class KlDivergence(EveryTokenMeasure):
    """KL divergence of the next-token distributions from the original's (lower is better), and top-1 agreement (higher is better).

    KL(original || network) = sum over the vocabulary of p (log p - log q), in nats, and the share of tokens for which both rank the
    same token first; means over the scored tokens of the same sliding windows that perplexity reads.
    """

    compares: ClassVar[bool] = True

    tokens: Tokens = 4096
    """Tokens read from the start of the source; 0 reads all. Both models read them."""

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return kl (nats per token), top1 (share), the scored tokens and what was read."""
        original = original_of(self, against)
        self.require_every_token(network, original)
        stream_T, total, same, count = self.stream(network), 0.0, 0.0, 0
        with self.reading(network, original):
            for window in self.windows(network, stream_T):
                theirs_RV, ours_RV = predictions(original, window), predictions(network, window)
                for one, logits_RV in ((original, theirs_RV), (network, ours_RV)):
                    require_finite(logits_RV, one, "kl_divergence")
                if theirs_RV.shape != ours_RV.shape:
                    raise AerogelError(
                        f"the original has {theirs_RV.shape[1]} tokens and the model {ours_RV.shape[1]}; compare equal vocabularies"
                    )
                for p_RV, q_RV in zip(theirs_RV.split(ROWS), ours_RV.split(ROWS), strict=True):
                    total += kl_divergence(p_RV, q_RV) * len(q_RV)
                    same += top1_agreement(p_RV, q_RV) * len(q_RV)
                count += len(ours_RV)
        return {
            "kl": total / count,
            "top1": same / count,
            "tokens": count,
            "source": self.name,
            "fingerprint": text.fingerprint(stream_T),
        }
