"""Figures of our measures in a record, one class a measure; a measure from elsewhere is kept as it is."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasChoices, Field, model_validator

from aerogel.io.record.part import OpenPart, Part


class SizeResult(OpenPart):
    """Bytes of the weights."""

    disk_bytes: int | None = None
    stored_bytes: int | None = None
    memory_bytes: int | None = None
    bits_per_weight: float | None = None
    parts: dict[str, int] = Field(default_factory=dict)
    """Stored bytes by kind of module."""

    @property
    def bytes(self) -> int | None:
        """Bytes on disk where they were counted, else the bytes that the tensors would take there."""
        return self.disk_bytes or self.stored_bytes or self.memory_bytes


class PerplexityResult(OpenPart):
    """Perplexity on held-out text."""

    perplexity: float
    tokens: int | None = None
    source: str | None = None
    length: int | None = None
    stride: int | None = None
    fingerprint: str | None = None
    """Of the tokens."""


class DecodePerplexityResult(PerplexityResult):
    """Perplexity on held-out text that is read token by token from the key-value cache."""

    cache_bytes_per_token: float | None = None
    """Bytes of all layers."""


class KlDivergenceResult(OpenPart):
    """Next-token probabilities against those of the original."""

    kl: float
    """Nats per token."""
    top1: float
    """Share of tokens with the same most likely next token."""
    tokens: int | None = None
    source: str | None = None


class Sample(OpenPart):
    """One prompt and its continuations."""

    prompt: str
    text: str = Field(validation_alias=AliasChoices("text", "compressed"))
    """Continuation by the model that was measured; `compressed` in earlier releases, whatever the model was."""
    original: str | None = None
    same: int | None = None
    """Tokens before the first difference."""
    tokens: int | None = None


class GenerationResult(OpenPart):
    """Continuations of a few prompts."""

    samples: list[Sample] = Field(default_factory=list)
    same_share: float | None = None


class SpeedResult(OpenPart):
    """Speed of a language model."""

    prefill_tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    batch: int | None = None
    prompt: int | None = None
    new_tokens: int | None = None
    threads: int | None = None
    device: str | None = None


class NeedleRecallResult(OpenPart):
    """Numbers found again in long prompts."""

    recall: float
    depths: list[float] = Field(min_length=1)
    recall_by_depth: list[float]
    length: int | None = None
    keys: int | None = None
    count: int | None = None

    @model_validator(mode="after")
    def _complete(self) -> NeedleRecallResult:
        if len(self.recall_by_depth) != len(self.depths):
            raise ValueError("recall_by_depth must have a number for each depth")
        return self


class SamplingResult(OpenPart):
    """Speed of a pipeline that generates images."""

    images_per_minute: float | None = None
    denoiser_milliseconds: float | None = None
    peak_memory_bytes: int | None = None
    batch: int | None = None
    steps: int | None = None
    guidance: float | None = None
    threads: int | None = None
    device: str | None = None


Png = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+=*$")]
"""A PNG file in base64."""


class ImagePair(OpenPart):
    """Images that both models generated from the same noise."""

    subject: str = ""
    original: Png
    compressed: Png


class ImageResult(OpenPart):
    """Figures of generated images; those of a feature network, FIGURE[NETWORK], are kept beside the fields."""

    count: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None

    @property
    def of_features(self) -> dict[str, float]:
        """The figures that have the name of their feature network, by name."""
        return {name: value for name, value in self.__pydantic_extra__.items() if name.endswith("]") and isinstance(value, int | float)}


class ImageSimilarityResult(ImageResult):
    """Images against those of the original from the same noise."""

    mse: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    pairs: list[ImagePair] = Field(default_factory=list)


class ImageQualityResult(ImageResult):
    """Images against real images."""

    reference: str | None = None


class TemporalResult(OpenPart):
    """Temporal features of a denoiser against those of the original; lists of a layer at each step."""

    sampler: str | None = None
    steps: list[float] = Field(min_length=1)
    layers: list[str] = Field(min_length=1)
    errors: list[list[float]]
    cosines: list[list[float]]
    mismatches: list[list[bool]]
    error: float
    cosine: float
    least_cosine: float
    mismatch: float

    @model_validator(mode="after")
    def _complete(self) -> TemporalResult:
        shapes = [[len(row) for row in rows] for rows in (self.errors, self.cosines, self.mismatches)]
        if any(shape != [len(self.steps)] * len(self.layers) for shape in shapes):
            raise ValueError("errors, cosines and mismatches must have a row for each layer and a number for each step")
        return self


class InputsResult(OpenPart):
    """Relative squared error of each layer's inputs in 8 bits, by the granularity of the scale."""

    layers: list[str]
    one: list[float]
    step: list[float]
    channel: list[float]
    token: list[float]

    @model_validator(mode="after")
    def _complete(self) -> InputsResult:
        if not self.layers or any(len(errors) != len(self.layers) for errors in (self.one, self.step, self.channel, self.token)):
            raise ValueError("one, step, channel and token must have a number for each layer")
        return self


class SkippedExperts(OpenPart):
    """Shares of token-expert assignments that were dropped."""

    prefill: float
    decode: float
    dropped_tokens: float
    """Share of tokens that lost all of their routed experts."""
    layers: list[tuple[float, float]] = Field(min_length=1)
    """Of text and of images, layer by layer."""
    dropped_tokens_by_layer: list[float]

    @model_validator(mode="after")
    def _complete(self) -> SkippedExperts:
        if len(self.dropped_tokens_by_layer) != len(self.layers):
            raise ValueError("dropped_tokens_by_layer must have a number for each layer")
        return self


class ExactMatchResult(OpenPart):
    """Answers to questions against the expected ones."""

    right: float
    """Share of answers that match word for word."""
    count: int | None = None
    source: str | None = None
    kl: float | None = None
    top1: float | None = None
    skipped: SkippedExperts | None = None


class Side(OpenPart):
    """All measures of one model; {measure: figures} of measures that are not declared here."""

    __pydantic_extra__: dict[str, dict[str, Any]] = Field(init=False)

    size: SizeResult | None = None
    perplexity: PerplexityResult | None = None
    decode_perplexity: DecodePerplexityResult | None = None
    kl_divergence: KlDivergenceResult | None = None
    generation: GenerationResult | None = None
    speed: SpeedResult | None = None
    sampling: SamplingResult | None = None
    image_similarity: ImageSimilarityResult | None = None
    image_quality: ImageQualityResult | None = None
    temporal: TemporalResult | None = None
    inputs: InputsResult | None = None
    exact_match: ExactMatchResult | None = None
    needle_recall: NeedleRecallResult | None = None
    lm_eval: dict[str, dict[str, float]] = Field(default_factory=dict)

    @property
    def of_features(self) -> dict[str, float]:
        """Figures of images that have the name of their feature network."""
        measured = [measure for measure in (self.image_similarity, self.image_quality) if measure is not None]
        return {name: value for measure in measured for name, value in measure.of_features.items()}


class Metrics(Part):
    """Measures of the original and of the compressed model."""

    original: Side = Side()
    compressed: Side = Side()
