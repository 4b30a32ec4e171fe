"""Cost of changed weights: a compressed copy of a model against the model itself, on held-out data.

N positions or samples, V vocabulary, C classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from aerogel.data.chats import Chats
from aerogel.data.denoising import Denoising
from aerogel.data.needles import Needles
from aerogel.data.tokenized import Tokenized
from aerogel.engine.calibration import Calibration, Samples, Shown, prepare
from aerogel.engine.search.held_out import halves
from aerogel.errors import AerogelError
from aerogel.model.calls import Call, tensors_in
from aerogel.model.network import Network
from aerogel.numerics.metrics import top1_agreement
from aerogel.runtime.predictions import divergence, logits_at, predicted
from aerogel.runtime.token_types import Vocabulary


def copy_of(network: Network) -> Network:
    """Return a copy of a model that can be compressed; its blocks are where they were found in the model."""
    made = replace(network, module=copy.deepcopy(network.module), processor=None, pruned=set(), sparsities={}, notes=[], teacher=None)
    made.__dict__["towers"] = network.towers
    return made


class CopyJudge(Protocol):
    """Says how far a copy of a model is from it; less of the figure that it is ranked by is better."""

    figure: str
    """Key of that figure."""
    conditions: dict[str, Any]
    """Held-out data that is read, and the figures of the model itself on it."""

    def measure(self, copy: Network) -> dict[str, Any]:
        """Return the figures of a copy; raises AerogelError where it gives what is no number."""


def judge_of(network: Network, calls: Sequence[Call]) -> CopyJudge:
    """Return the judge that suits what a model reads: tokens whose next ones it predicts, or anything else."""
    tokens = all(isinstance(call.kwargs.get("input_ids"), Tensor) for call in calls)
    return PredictionJudge(network, calls) if tokens and network.head else OutputJudge(network, calls)


def split(network: Network, wanted: Shown, seed: int) -> tuple[Calibration, Sequence[Call]]:
    """Return what to calibrate on, the same as `compress` reads with this seed, and as much held out to judge by.

    Of text and chats the two share no sequence, images are made of other noise, and calls are halved as they were given. Raises
    AerogelError where there is too little for both.
    """
    if isinstance(wanted, Denoising):
        return prepare(network, wanted, seed, head=False), prepare(network, wanted, seed + 1, head=False).calls
    if isinstance(wanted, Tokenized):
        half = _half(len(wanted.rows), "sequence")
        first, second = (replace(wanted, rows=rows) for rows in (wanted.rows[:half], wanted.rows[half:]))
        return prepare(network, first, seed, head=False), prepare(network, second, seed, head=True).calls
    if isinstance(wanted, Samples | Chats | Needles):
        _, held_out, facts = halves(network, wanted, seed)
        return prepare(network, replace(wanted, count=facts["count"]), seed, head=False), held_out.calls
    half = _half(len(wanted), "call")
    return prepare(network, wanted[:half], seed, head=False), wanted[half:]


def _half(count: int, what: str) -> int:
    if count < 2:
        raise AerogelError(f"{count} {what}: one half is calibrated on and the other judges; give more")
    return count // 2


class PredictionJudge:
    """Compares next-token predictions; the model runs beside each copy, so that no logits of all calls are kept."""

    figure = "kl"

    def __init__(self, network: Network, calls: Sequence[Call]) -> None:
        """Raises AerogelError where there is nothing to predict."""
        self._network, self._calls, self._vocabulary = network, calls, Vocabulary.of(network)
        self._tokens = sum(int(predicted(call, self._vocabulary).sum()) for call in calls)
        if not self._tokens:
            raise AerogelError("the held-out data has no token to predict; give longer text, or chats with answers")
        rows = sum(len(call.kwargs["input_ids"]) for call in calls)
        nats = sum(_nats(logits_NV, ids_N) for logits_NV, ids_N in self._read(network)) / self._tokens
        self.conditions = {"judged": "predictions", "count": rows, "tokens": self._tokens, "perplexity": _perplexity(nats)}

    def measure(self, copy: Network) -> dict[str, Any]:
        """Return KL in nats per token, the share of tokens for which both rank the same one first, and perplexity."""
        kl = same = nats = 0.0
        for (whole_NV, ids_N), (other_NV, _) in zip(self._read(self._network), self._read(copy), strict=True):
            kl += divergence(whole_NV, other_NV)
            same += top1_agreement(whole_NV, other_NV) * len(ids_N) if len(ids_N) else 0.0
            nats += _nats(other_NV, ids_N)
        return {"kl": kl / self._tokens, "top1": same / self._tokens, "perplexity": _perplexity(nats / self._tokens)}

    def _read(self, network: Network) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what a model predicts of each call and what came, (N, V) and (N)."""
        for call in self._calls:
            call = Call(call.args, {name: value for name, value in call.kwargs.items() if name != "logits_to_keep"})
            at_BS = predicted(call, self._vocabulary)
            ids_BS = call.kwargs["input_ids"]
            next_BS = torch.cat([ids_BS[:, 1:], ids_BS[:, :1]], 1)
            logits_NV = logits_at(network, call, at_BS)
            yield logits_NV, next_BS[at_BS].to(logits_NV.device)


def _nats(logits_NV: Tensor, ids_N: Tensor) -> float:
    return float(cross_entropy(logits_NV, ids_N, reduction="sum").double()) if len(ids_N) else 0.0


def _perplexity(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


class OutputJudge:
    """Compares outputs: of a denoiser at each step, of a classifier its scores."""

    figure = "error"

    def __init__(self, network: Network, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._wanted = [_output(network, call) for call in calls]
        self._power = sum(float(wanted.square().sum()) for wanted in self._wanted)
        if not math.isfinite(self._power) or self._power == 0:
            raise AerogelError("the model gives nothing but zeros on the held-out data, or NaN or infinity; get a sound copy of it")
        self._classes = all(wanted.ndim == 2 for wanted in self._wanted)
        samples = sum(len(wanted) for wanted in self._wanted)
        self.conditions = {"judged": "classes" if self._classes else "outputs", "count": samples, "calls": len(calls)}

    def measure(self, copy: Network) -> dict[str, Any]:
        """Return the relative squared error of the output, and of scores (N, C) the share of samples with the same first class."""
        lost, same, samples = 0.0, 0, 0
        for call, wanted in zip(self._calls, self._wanted, strict=True):
            given = _output(copy, call)
            lost += float((given - wanted).square().sum())
            same += int((given.argmax(-1) == wanted.argmax(-1)).sum()) if self._classes else 0
            samples += len(wanted)
        if not math.isfinite(lost):
            raise AerogelError("what it gives on the held-out data holds NaN or infinity")
        return {"error": lost / self._power} | ({"top1": same / samples} if self._classes else {})


def _output(network: Network, call: Call) -> Tensor:
    """The first tensor that a model gives, in float64 on the host."""
    return tensors_in(network.run(call))[0].detach().double().cpu()
