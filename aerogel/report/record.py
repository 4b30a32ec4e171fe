"""The record of a run, aerogel.json, as the report reads it: everything but the model's name is optional, unknown keys are ignored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aerogel.errors import AerogelError
from aerogel.io.older import upgraded

FILE = "aerogel.json"
Kind = TypeVar("Kind", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Size(_Part):
    """What the weights take."""

    disk_bytes: int | None = None
    stored_bytes: int | None = None
    memory_bytes: int | None = None
    bits_per_weight: float | None = None
    parts: dict[str, int] = {}

    @property
    def bytes(self) -> int | None:
        """Bytes on disk where they were counted, else the bytes that the tensors would take there."""
        return self.disk_bytes or self.stored_bytes or self.memory_bytes


class Perplexity(_Part):
    """How surprised a network is by held-out text."""

    perplexity: float
    tokens: int | None = None
    source: str | None = None
    length: int | None = None
    stride: int | None = None
    fingerprint: str | None = None


class KlDivergence(_Part):
    """How close a network stays to its original."""

    kl: float
    top1: float
    tokens: int | None = None
    source: str | None = None


class Sample(_Part):
    """One prompt and what became of it."""

    prompt: str
    compressed: str
    original: str | None = None
    same: int | None = None
    tokens: int | None = None


class Generation(_Part):
    """Continuations of a few prompts."""

    samples: list[Sample] = []
    same_share: float | None = None


class Speed(_Part):
    """What a benchmark timed."""

    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    batch: int | None = None
    prompt: int | None = None
    new_tokens: int | None = None
    threads: int | None = None
    device: str | None = None


class Sampling(_Part):
    """What a benchmark timed of a pipeline that makes images."""

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


class Pair(_Part):
    """An image that both networks made from the same noise."""

    subject: str = ""
    original: Png
    compressed: Png


class _OfImages(_Part):
    """Figures of images; those that bear the name of their feature network, FIGURE[NETWORK], are kept beside the fields."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Any]

    count: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None

    @property
    def judged(self) -> dict[str, float]:
        """The figures by name."""
        return {name: value for name, value in self.__pydantic_extra__.items() if name.endswith("]") and isinstance(value, int | float)}


class ImageSimilarity(_OfImages):
    """How far images have moved from those of the original."""

    mse: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    pairs: list[Pair] = []


class ImageQuality(_OfImages):
    """How much images resemble real images."""

    reference: str | None = None


class Temporal(_Part):
    """How well a denoiser still knows the time step; lists of a layer at each step."""

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
    def _complete(self) -> Temporal:
        shapes = [[len(row) for row in rows] for rows in (self.errors, self.cosines, self.mismatches)]
        if any(shape != [len(self.steps)] * len(self.layers) for shape in shapes):
            raise ValueError("errors, cosines and mismatches must have a row for each layer and a number for each step")
        return self


class Inputs(_Part):
    """What 8 bits lose of each layer's inputs, by what shares a scale."""

    layers: list[str]
    one: list[float]
    step: list[float]
    channel: list[float]
    token: list[float]

    @model_validator(mode="after")
    def _complete(self) -> Inputs:
        if not self.layers or any(len(errors) != len(self.layers) for errors in (self.one, self.step, self.channel, self.token)):
            raise ValueError("one, step, channel and token must have a number for each layer")
        return self


class Skipped(_Part):
    """Which share of the pairs of token and expert was dropped."""

    prefill: float
    decode: float
    lost: float
    layers: list[tuple[float, float]] = Field(min_length=1)
    """Of text and of images, layer by layer."""
    lost_of_layers: list[float]
    """Share of tokens without any routed expert."""

    @model_validator(mode="after")
    def _complete(self) -> Skipped:
        if len(self.lost_of_layers) != len(self.layers):
            raise ValueError("lost_of_layers must have a number for each layer")
        return self


class ExactMatch(_Part):
    """What was replied to questions about images."""

    right: float
    count: int | None = None
    source: str | None = None
    kl: float | None = None
    top1: float | None = None
    skipped: Skipped | None = None


class Side(_Part):
    """All measures of one network."""

    size: Size | None = None
    perplexity: Perplexity | None = None
    kl_divergence: KlDivergence | None = None
    generation: Generation | None = None
    speed: Speed | None = None
    sampling: Sampling | None = None
    image_similarity: ImageSimilarity | None = None
    image_quality: ImageQuality | None = None
    temporal: Temporal | None = None
    inputs: Inputs | None = None
    exact_match: ExactMatch | None = None
    lm_eval: dict[str, dict[str, float]] = {}

    @property
    def judged(self) -> dict[str, float]:
        """Figures of images that bear the name of their feature network."""
        measured = [measure for measure in (self.image_similarity, self.image_quality) if measure is not None]
        return {name: value for measure in measured for name, value in measure.judged.items()}


class Metrics(_Part):
    """The original and what became of it."""

    original: Side = Side()
    compressed: Side = Side()


class Model(_Part):
    """What was compressed."""

    name: str
    family: str | None = None
    parameters: int | None = None
    dtype: str | None = None


class Recipe(_Part):
    """How, with every option resolved."""

    name: str | None = None
    steps: list[dict[str, Any]] = []


class Line(_Part):
    """What happened to one linear."""

    name: str
    block: str = ""
    method: str | None = None
    scheme: str | None = None
    error: float | None = None
    """Relative squared error of its output."""
    fallback: str | None = None
    step_size: float | None = None
    """The learned step size of an operand; a line with one is of no linear."""

    @property
    def kind(self) -> str:
        """The linear's place in its block, the same in every block and for every expert."""
        inside = self.name.removeprefix(f"{self.block}.") if self.block else self.name
        return pattern(inside)


class Kept(_Part):
    """One module that was left in float."""

    name: str
    parameters: int = 0
    reason: str = "no reason recorded"


class Coverage(_Part):
    """Which layers have weights and inputs in codes, and which attentions round their operands."""

    layers: int
    weights: dict[str, int] = {}
    """Layers by format."""
    inputs: dict[str, int] = {}
    float_weights: list[str] = []
    float_inputs: list[str] = []
    attentions: list[str] = []

    @property
    def any(self) -> bool:
        """Whether anything is in codes."""
        return bool(self.weights or self.inputs or self.attentions)


class Reuse(_Part):
    """Which units of a denoiser run at which steps; at the others they give what they gave before."""

    policy: str = ""
    steps: list[float] = Field(min_length=1)
    units: list[str] = Field(min_length=1)
    computed: list[str]
    """A line of 1 (runs) and 0 for each step."""
    sampler: str = ""
    error: float | None = None
    """Mean squared error of final images of noise that it was not made on."""

    @model_validator(mode="after")
    def _rectangular(self) -> Reuse:
        if len(self.computed) != len(self.steps) or any(len(row) != len(self.units) or set(row) - set("01") for row in self.computed):
            raise ValueError(f"a table of {len(self.steps)} steps and {len(self.units)} units was expected")
        return self

    @property
    def share(self) -> float:
        """Share of the slots (steps x units) that are reused."""
        return sum(row.count("0") for row in self.computed) / (len(self.steps) * len(self.units))


class Policy(_Part):
    """A runtime policy and what was measured for it."""

    step: dict[str, Any]
    state: dict[str, Any] = {}

    @property
    def reuse(self) -> Reuse | None:
        """Its schedule, if it has one."""
        if "computed" not in self.state:
            return None
        return Reuse.model_validate({"policy": next(iter(self.step), ""), **self.state})


class Run(_Part):
    """One run: the content of aerogel.json."""

    model: Model
    recipe: Recipe = Recipe()
    provenance: dict[str, Any] = {}
    metrics: Metrics = Metrics()
    journal: list[Line] = []
    kept: list[Kept] = []
    coverage: Coverage | None = None
    policies: list[Policy] = []
    plan: dict[str, Any] = {}
    timings: dict[str, float] = {}
    folder: str = Field(default="", exclude=True)
    """Name of the folder it was read from."""

    @property
    def label(self) -> str:
        """What to call the run in an image."""
        return self.recipe.name or self.folder or "this run"


def pattern(name: str) -> str:
    """A dotted name with its numbers replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def read(folder: str | Path) -> Run:
    """Read the record in an output folder; raises AerogelError that names the file and the field when it is absent or broken."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise AerogelError(f"{folder} has no {FILE}, so there is nothing to report; give a folder that `aerogel compress` wrote")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise AerogelError(f"{path} is not JSON ({error}); it was changed after `aerogel compress` wrote it") from error
    return parse(content, path).model_copy(update={"folder": Path(folder).resolve().name})


def parse(content: dict[str, Any], path: str | Path = FILE) -> Run:
    """Check a record that was read already; raises AerogelError that names the field."""
    return checked(Run, upgraded(content) if isinstance(content, dict) else content, path, "aerogel compress")


def checked(kind: type[Kind], content: dict[str, Any], path: str | Path, command: str) -> Kind:
    """The same for any kind of record; `command` wrote it."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise AerogelError(f"{path}: {place}: {first['msg'].lower()}; it was changed after `{command}` wrote it") from error


def beside(folder: str | Path, run: Run) -> list[Run]:
    """Other runs in sibling folders that compressed the same model and were judged in the same way; unreadable ones are passed over."""
    found = []
    for path in sorted(Path(folder).resolve().parent.glob(f"*/{FILE}")):
        if path.parent == Path(folder).resolve():
            continue
        try:
            other = read(path.parent)
        except AerogelError:
            continue
        if other.model.name == run.model.name and _judged(other) == _judged(run):
            found.append(other)
    return found


def _judged(run: Run) -> tuple[object, ...]:
    """On which text, or by which images against which images."""
    text, images = run.metrics.compressed.perplexity, run.metrics.compressed.image_quality
    read = (text.fingerprint, text.length) if text else ()
    seen = (images.count, images.steps, images.guidance, images.seed, images.reference) if images else ()
    return (*read, *seen)
