"""The comparison: every figure of the original and of the compressed model on one line, and how it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from aerogel.io.record.measures import Side
from aerogel.report import phrases

Number = float | None


class Row(NamedTuple):
    """One line of the comparison, ready to print."""

    name: str
    before: str
    after: str
    change: str


class _Compared(NamedTuple):
    name: str
    measure: str
    field: str
    show: Callable[[Number], str]
    compare: Callable[[Number, Number], str]


def value(side: Side, measure: str, field: str) -> Number:
    """One number of a side, or None when it was not measured."""
    found = getattr(side, measure)
    return None if found is None else getattr(found, field)


def quality(after: Side) -> tuple[str, Callable[[Side], Number]]:
    """Return the quality on the axis of the trade-off (lower is better) and a function that reads it: perplexity or a Fréchet distance."""
    frechet = next((name for name in after.of_features if name.startswith("frechet[")), None)
    if after.perplexity or frechet is None:
        return "Perplexity", lambda side: value(side, "perplexity", "perplexity")
    return f"Fréchet distance [{frechet.partition('[')[2]}", lambda side: side.of_features.get(frechet)


def rows(before: Side, after: Side) -> Iterator[Row]:
    """The lines for which the compressed side was measured."""
    for line in _COMPARED:
        theirs, ours = (value(side, line.measure, line.field) for side in (before, after))
        if ours is not None:
            yield Row(line.name, line.show(theirs), line.show(ours), line.compare(theirs, ours))
    for name, ours in after.of_features.items():
        figure, _, network = name.partition("[")
        theirs, (what, show, compare) = before.of_features.get(name), _OF_FEATURES.get(figure, (figure, phrases.digits, phrases.change))
        yield Row(f"{what} [{network}", show(theirs), show(ours), compare(theirs, ours))
    for task, scores in after.lm_eval.items():
        for metric, score in scores.items():
            score_before = before.lm_eval.get(task, {}).get(metric)
            yield Row(f"{task}, {metric}", phrases.digits(score_before), phrases.digits(score), phrases.change(score_before, score))


def _smaller(before: Number, after: Number) -> str:
    return phrases.versus(before, after, "smaller", "larger")


def _faster(before: Number, after: Number) -> str:
    return phrases.versus(after, before, "faster", "slower")


def _sooner(before: Number, after: Number) -> str:
    return phrases.versus(before, after, "faster", "slower")


def _nothing(before: Number, after: Number) -> str:
    return ""


def _four(number: Number) -> str:
    return phrases.digits(number, 4)


_COMPARED = (
    _Compared("Weights on disk", "size", "bytes", phrases.size, _smaller),
    _Compared("Bits per weight", "size", "bits_per_weight", phrases.digits, _nothing),
    _Compared("Perplexity", "perplexity", "perplexity", _four, phrases.change),
    _Compared("Perplexity by decoding through the KV cache", "decode_perplexity", "perplexity", _four, phrases.change),
    _Compared("KV cache per token", "decode_perplexity", "cache_bytes_per_token", phrases.size, _smaller),
    _Compared("KL divergence from the original, nats per token", "kl_divergence", "kl", phrases.digits, _nothing),
    _Compared("Same next token", "kl_divergence", "top1", phrases.percent, _nothing),
    _Compared("Exact match with the expected answers", "exact_match", "right", phrases.percent, phrases.change),
    _Compared("KL on the expected answers, nats per token", "exact_match", "kl", phrases.digits, _nothing),
    _Compared("Recall of a number in a long prompt", "needle_recall", "recall", phrases.percent, phrases.change),
    _Compared("PSNR against the original's images, dB", "image_similarity", "psnr", phrases.digits, _nothing),
    _Compared("SSIM with the original's images", "image_similarity", "ssim", phrases.digits, _nothing),
    _Compared("Mean squared error of pixels (0 to 1)", "image_similarity", "mse", phrases.digits, _nothing),
    _Compared("Relative squared error of temporal features", "temporal", "error", phrases.percent, _nothing),
    _Compared("Temporal features nearer to another step", "temporal", "mismatch", phrases.percent, _nothing),
    _Compared("Decode, tokens per second", "speed", "decode_tokens_per_second", phrases.digits, _faster),
    _Compared("Prefill, tokens per second", "speed", "prefill_tokens_per_second", phrases.digits, _faster),
    _Compared("Time to the first token, seconds", "speed", "first_token_seconds", phrases.digits, _sooner),
    _Compared("Peak memory while running", "speed", "peak_memory_bytes", phrases.size, _smaller),
    _Compared("Images per minute", "sampling", "images_per_minute", phrases.digits, _faster),
    _Compared("Denoiser forward, ms", "sampling", "denoiser_milliseconds", phrases.digits, _sooner),
    _Compared("Peak memory while sampling", "sampling", "peak_memory_bytes", phrases.size, _smaller),
)

_OF_FEATURES: dict[str, tuple[str, Callable[[Number], str], Callable[[Number, Number], str]]] = {
    "perceptual": ("Perceptual distance", phrases.digits, _nothing),
    "frechet": ("Fréchet distance", _four, phrases.change),
    "spatial_frechet": ("Spatial Fréchet distance", _four, phrases.change),
    "inception_score": ("Inception score", _four, phrases.change),
    "precision": ("Precision", phrases.percent, phrases.change),
    "recall": ("Recall", phrases.percent, phrases.change),
    "accuracy": ("Accuracy of the class that was asked for", phrases.percent, phrases.change),
}
"""Names of figures that depend on a feature network, how they are shown and compared."""
