"""Perplexity on held-out text, by a sliding window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.nn.functional import cross_entropy

from aerogel.data import text
from aerogel.evaluate.measure import EveryTokenMeasure, predictions, require_finite
from aerogel.model.network import Network

ROWS = 256
"""Rows of logits turned into log-probabilities at once."""


@dataclass(frozen=True)
class Perplexity(EveryTokenMeasure):
    """Perplexity on text that was not used for calibration: lower is better.

    exp(-1/n sum log p(token i | the tokens before it in its window)) over n = T - 1 scored tokens: the window of `length` tokens
    moves by `stride`, and each time only the tokens that no window before it scored count. The sum is kept in float64.
    """

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return perplexity, nats_per_token, the scored tokens and what was read; raises AerogelError where logits are not finite."""
        self.require_every_token(network)
        stream_T, total, count = self.stream(network), 0.0, 0
        with self.reading(network):
            for window in self.windows(network, stream_T):
                predicted_RV = predictions(network, window)
                require_finite(predicted_RV, network, "perplexity")
                rows = zip(predicted_RV.split(ROWS), window.labels.split(ROWS), strict=True)
                total += sum(float(cross_entropy(logits_RV.float(), labels_R, reduction="sum").double()) for logits_RV, labels_R in rows)
                count += window.labels.numel()
        nats = total / count
        return {
            "perplexity": math.exp(nats) if nats < 700 else math.inf,
            "nats_per_token": nats,
            "tokens": count,
            "source": self.name,
            "length": self.length,
            "stride": self.stride,
            "fingerprint": text.fingerprint(stream_T),
        }
