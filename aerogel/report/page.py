"""The report: one self-contained HTML file from the record of a run, without the model and without torch."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup, escape

from aerogel.errors import AerogelError
from aerogel.io.record import files
from aerogel.io.record.measures import ImageQualityResult, ImageSimilarityResult, Sample, Side
from aerogel.io.record.schema import Provenance, Record, pattern
from aerogel.io.text_files import replace_text
from aerogel.report import compare, coverage, inputs, phrases, reuse, skips, temporal
from aerogel.report.layers import error_map, towers, zeros, zeros_map
from aerogel.report.neighbours import beside
from aerogel.report.parts import parts_bars
from aerogel.report.svg import PALETTE, document
from aerogel.report.tradeoff import HEIGHT, IMAGES, SIZE, SPEED, Axis, Point, Role, tradeoff

HERE = Path(__file__).parent
WIDE, PANEL, NARROW = 956.0, 447.0, 328.0
"""Widths that figures are drawn for: a desktop's page, half of it and a phone's."""
LISTED = 400
"""Most layers that are listed one by one."""

GLOSSARY = (
    ("Perplexity", "The exponential of the mean negative log-likelihood per token on held-out text. Lower is better."),
    (
        "KL divergence",
        "Divergence of the compressed model's next-token probabilities from the original's, in nats per token. Zero means identical.",
    ),
    ("Same next token", "Share of tokens for which both models have the same most likely next token (top-1 agreement)."),
    ("Bits per weight", "Bits stored for all weights, scales and embeddings included, divided by the number of weights."),
    (
        "Relative error",
        "Squared norm of the error in a layer's output, or in its weight, divided by the squared norm of the output or the weight.",
    ),
    ("Prefill, decode", "Processing the prompt, all tokens at once; generating the answer, one token after another."),
    ("Fallback", "A layer that could not be compressed as the recipe says and was compressed by a simpler method."),
)


OF_IMAGES = (
    (
        "Fréchet distance",
        "Distance between the feature distributions of generated and real images, by the feature network in brackets. Lower is better.",
    ),
    ("Precision, recall", "Share of generated images within the manifold of the real ones, and of real ones within that of the generated."),
    (
        "Inception score",
        "Confidence and diversity of the predicted classes, at most the number of classes. Higher is better.",
    ),
    ("SSIM, PSNR", "Similarity of two images by local structure (1 is identical) and by pixels (in decibels; higher is closer)."),
)
"""Terms of reports on images."""

OF_TIME = (
    (
        "Temporal feature",
        "The time embedding as a block of the denoiser receives it. It depends on the time step only, so it can be compared step by step.",
    ),
    (
        "Nearer to another step",
        "A temporal feature nearer to the original's feature of another step: the block acts as if at an earlier or later step.",
    ),
)
"""Terms of reports on temporal features."""


class Figure(NamedTuple):
    """A figure for a desktop and for a phone."""

    wide: Markup
    narrow: Markup


def write(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the report on an output folder, to report.html in it unless told otherwise, and return its path.

    Raises AerogelError when the folder holds no readable record.
    """
    target = Path(path) if path else Path(folder) / "report.html"
    return replace_text(target, render(folder))


def render(folder: str | Path) -> str:
    """Return the report on an output folder, with runs of the same model in sibling folders in its images."""
    run = files.read(folder)
    return page(run, beside(folder, run))


def page(run: Record, others: Sequence[Record] = ()) -> str:
    """Return the report on a run; `others` are shown beside it in the trade-off images."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"percent": phrases.percent, "dotted": dotted}
    template = environment.from_string((HERE / "template.html").read_text("utf-8"))
    css = PALETTE + (HERE / "style.css").read_text("utf-8")
    return template.render(css=Markup(css), none=phrases.NONE, **_context(run, others))  # noqa: S704  # our own files


def write_plot(folder: str | Path, path: str | Path) -> Path:
    """Write the trade-off images on an output folder side by side as one SVG file, for a README or a page, and return its path.

    Raises AerogelError when the folder holds no readable record, or one without quality.
    """
    run = files.read(folder)
    drawn = images(run, beside(folder, run), PANEL)
    if not drawn:
        raise AerogelError(
            f"{folder} has no trade-off to draw: its quality was not measured; run aerogel evaluate on it, --against the original"
        )
    return replace_text(path, document(drawn, PANEL, HEIGHT))


def images(run: Record, others: Sequence[Record] = (), width: float = NARROW) -> list[Markup]:
    """Return quality against size and against speed, as far as they were measured."""
    title, of = compare.quality(run.metrics.compressed)
    drawn = []
    for axis in (SIZE, SPEED, IMAGES):
        points = list(_points(run, others, axis, of))
        if any(point.role == "this" for point in points):
            drawn.append(tradeoff(points, axis, title, width=width))
    return drawn


def _context(run: Record, others: Sequence[Record]) -> dict[str, Any]:
    before, after = run.metrics.original, run.metrics.compressed
    half = PANEL if after.speed or after.sampling else WIDE
    fallen = [entry for entry in run.journal if entry.fallback]
    lines = sorted((entry for entry in run.journal if entry.error is not None), key=lambda entry: -(entry.error or 0))
    return {
        "run": run,
        "date": (run.provenance.date or "")[:10],
        "version": run.provenance.versions.get("aerogel"),
        "headline": phrases.headline(run),
        "lead": _lead(run),
        "images": [Figure(*both) for both in zip(images(run, others, half), images(run, others), strict=True)],
        "image_note": _image_note(others),
        "missing": list(_missing(run)),
        "rows": list(compare.rows(before, after)),
        "conditions": _conditions(after),
        "bytes": _bytes(before, after),
        "pairs": after.image_similarity.pairs if after.image_similarity else [],
        "pairs_note": _generated(after.image_similarity),
        "samples": [_sample(sample) for sample in (after.generation.samples if after.generation else [])],
        "maps": {
            tower: Figure(error_map(table, WIDE), error_map(table, NARROW, tall=True)) for tower, table in towers(run.journal).items()
        },
        "zeros": _zeros(run),
        "time": _time(after),
        "inputs": {"sentence": inputs.sentence(after.inputs), "rows": list(inputs.rows(after.inputs))} if after.inputs else None,
        "coverage": _coverage(run),
        "zeros_note": coverage.zeros(run.coverage) if run.coverage else None,
        "caches": list(_caches(run)),
        "skipped": _skipped(after),
        "fallback_note": _fallback_note(run, len({entry.name for entry in fallen})),
        "fallen": fallen,
        "lines": lines[:LISTED],
        "lines_title": f"All {len(lines):,} layers" if len(lines) <= LISTED else f"The {LISTED} largest errors of {len(lines):,}",
        "kept": list(_kept(run)) if run.plan.share_reached != 0 else [],  # a recipe of policies quantizes nothing
        "kept_note": _kept_note(run),
        "recipe": yaml.safe_dump({"steps": run.recipe.steps}, sort_keys=False, allow_unicode=True, width=60).rstrip(),
        "provenance": list(provenance(run.provenance, run.timings)),
        "glossary": (
            *(OF_IMAGES if after.image_similarity or after.image_quality else ()),
            *(OF_TIME if after.temporal else ()),
            *GLOSSARY,
        ),
    }


def _lead(run: Record) -> str:
    facts = [f"Recipe {run.label}"]
    if run.model.parameters:
        facts.append(f"{phrases.number(run.model.parameters)} parameters")
    if run.plan.share_reached:
        facts.append(f"{phrases.percent(run.plan.share_reached)} of them compressed")
    if run.timings:
        facts.append(f"made in {phrases.seconds(sum(run.timings.values()) - run.timings.get('evaluate', 0))}")
    return ", ".join(facts) + "."


def _image_note(others: Sequence[Record]) -> str:
    note = "Outlined: the original. Filled: this run. The axis of quality does not start at zero."
    return f"{note} Small: other runs of the same model in sibling folders, measured on the same data." if others else note


def _missing(run: Record) -> Iterator[str]:
    after = run.metrics.compressed
    if not (after.perplexity or after.image_similarity or after.image_quality or after.exact_match):
        yield "Quality was not measured: run aerogel evaluate on the folder, --against the original; of images, with --measure images."
    if not (after.speed or after.sampling):
        yield "Speed was not measured: run aerogel bench on the folder, --against the original."


def _points(run: Record, others: Sequence[Record], axis: Axis, quality: Callable[[Side], float | None]) -> Iterator[Point]:
    sides: list[tuple[str, Role, Side]] = [("original", "original", run.metrics.original), (run.label, "this", run.metrics.compressed)]
    sides += [(other.label, "other", other.metrics.compressed) for other in others]
    for name, role, side in sides:
        x, y = compare.value(side, axis.measure, axis.field), quality(side)
        if x and y:
            yield Point(name, x * axis.scale, y, role)


def _conditions(after: Side) -> str:
    said = []
    if text := after.perplexity:
        said.append(f"Perplexity on {text.tokens or 0:,} tokens of {text.source or 'held-out text'}")
        if text.length and text.stride:
            said[-1] += f", windows of {text.length:,} that move by {text.stride:,}"
    if read := after.decode_perplexity:
        said.append(f"Perplexity by decoding on {read.tokens or 0:,} tokens, each read from the key-value cache")
    if after.image_similarity:
        said.append(f"Compared with the original's images: {_generated(after.image_similarity)}")
    if real := after.image_quality:
        said.append(f"Compared with real images ({real.reference or 'unnamed'}): {_generated(real)}")
    if exact_match := after.exact_match:
        said.append(f"Answers to {exact_match.count or 0:,} questions of {Path(exact_match.source or 'unnamed').name}")
    if time := after.temporal:
        said.append(f"Temporal features at the {len(time.steps)} steps of {time.sampler or 'the sampler'}")
    if speed := after.speed:
        known = (("batch", speed.batch), ("prompt", speed.prompt), ("new tokens", speed.new_tokens), ("threads", speed.threads))
        said.append(", ".join([f"Speed on {speed.device or 'cpu'}", *(f"{name} {value}" for name, value in known if value)]))
    if drawn := after.sampling:
        asked = (("batch", drawn.batch), ("steps", drawn.steps), ("guidance", drawn.guidance), ("threads", drawn.threads))
        facts = [f"{name} {value:g}" for name, value in asked if value is not None]
        said.append(", ".join([f"Sampling on {drawn.device or 'cpu'}", *facts]))
    return "".join(f"{sentence}. " for sentence in said).strip()


def _generated(images: ImageSimilarityResult | ImageQualityResult | None) -> str:
    if images is None:
        return ""
    facts = [f"{images.count:,} images" if images.count else "Images"]
    facts += [f"in {images.steps} steps"] if images.steps else []
    facts += [f"with guidance {images.guidance:g}"] if images.guidance is not None else []
    facts += [f"from seed {images.seed}"] if images.seed is not None else []
    return " ".join(facts)


def _bytes(before: Side, after: Side) -> Figure | None:
    networks = {name: side.size.parts for name, side in (("Original", before), ("Compressed", after)) if side.size and side.size.parts}
    return Figure(parts_bars(networks, WIDE), parts_bars(networks, NARROW)) if networks else None


def _time(after: Side) -> dict[str, Any] | None:
    found = after.temporal
    if found is None:
        return None
    figure = Figure(temporal.time_maps(found, WIDE), temporal.time_maps(found, NARROW, stacked=True))
    return {"figure": figure, "sentence": temporal.sentence(found), "rows": list(temporal.rows(found))}


def _caches(run: Record) -> Iterator[dict[str, Any]]:
    for policy in run.policies:
        if found := reuse.reuse_of(policy):
            drawn = Figure(reuse.reuse_map(found, WIDE), reuse.reuse_map(found, NARROW))
            yield {"policy": found.policy, "figure": drawn, "sentence": reuse.sentence(found)}


def _skipped(after: Side) -> dict[str, Any] | None:
    found = after.exact_match.skipped if after.exact_match else None
    if found is None:
        return None
    return {"figure": Figure(skips.skip_map(found, WIDE), skips.skip_map(found, NARROW)), "sentence": skips.sentence(found)}


def _zeros(run: Record) -> dict[str, Figure]:
    """Zeros of each pruned layer: as it is stored where that was counted, else as the last step that noted them left it."""
    noted = {entry.name: entry for entry in run.journal if entry.sparsity is not None}
    stored = run.coverage.zeros if run.coverage else {}
    shares = {name: stored.get(name, entry.sparsity or 0.0) for name, entry in noted.items()}
    asked = {entry.name: entry.allocated for entry in run.journal if entry.allocated is not None}
    tables = zeros(shares, {name: entry.block for name, entry in noted.items()}, asked)
    return {tower: Figure(zeros_map(table, WIDE), zeros_map(table, NARROW, tall=True)) for tower, table in tables.items()}


def _coverage(run: Record) -> dict[str, Any] | None:
    found = run.coverage
    if found is None or not found.any:
        return None
    return {
        "shares": list(coverage.shares(found)),
        "left": list(coverage.unquantized(found)),
        "attentions": coverage.grouped(found.attentions),
        "count": len(found.attentions),
    }


def _sample(sample: Sample) -> dict[str, Any]:
    if sample.original is None:
        return {"prompt": sample.prompt, "original": None, "compressed": sample.text, "same": ""}
    marked = mark_difference(sample.original, sample.text)
    return {"prompt": sample.prompt, "original": sample.original, "compressed": marked, "same": phrases.same_tokens(sample)}


def mark_difference(original: str, changed: str) -> Markup:
    """Return `changed`, escaped, with the words in <mark> that are not in `original` at their place."""
    ours, theirs = (re.findall(r"\s+|\S+", text) for text in (changed, original))
    pieces = []
    for what, _, _, start, end in difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        words = escape("".join(ours[start:end]))
        pieces.append(words if what == "equal" or not words.strip() else Markup("<mark>{}</mark>").format(words))
    return Markup("").join(pieces)


def dotted(name: str) -> Markup:
    """Return a dotted name, escaped, that may break after its dots."""
    return Markup(".<wbr>").join(name.split("."))


def _kept(run: Record) -> Iterator[dict[str, Any]]:
    """Yield modules that are not quantized, those of the same kind and reason together, the largest first."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for entry in run.kept:
        groups[pattern(entry.name), entry.reason].append(entry.parameters)
    for (name, reason), counts in sorted(groups.items(), key=lambda item: -sum(item[1])):
        yield {"name": name, "count": f"{len(counts):,}", "parameters": phrases.number(sum(counts)), "reason": reason}


def _fallback_note(run: Record, fallen: int) -> str:
    layers = len({entry.name for entry in run.journal if entry.step_size is None})
    return f"{fallen or 'None'} of {layers:,} layers fell back to a simpler method{' (outlined)' if fallen else ''}."


def _kept_note(run: Record) -> str:
    reached = run.plan.share_reached
    return "Layers and embeddings that are as in the original" + (
        f": {phrases.percent(1 - reached)} of all weights." if reached is not None else "."
    )


def provenance(given: Provenance, timings: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield what is needed to repeat a run, in words."""
    if given.date is not None:
        yield "Date", given.date.replace("T", " ").replace("+00:00", " UTC")
    if given.seed is not None:
        yield "Seed", str(given.seed)
    if given.dequantized is not None:
        yield "Source", given.dequantized
    if text := given.calibration:
        size = f", {text['count']} × {text['length']} tokens" if "count" in text and "length" in text else ""
        yield "Calibration", f"{text.get('source', 'given by the caller')}{size}"
        if "fingerprint" in text:
            yield "Calibration fingerprint", str(text["fingerprint"])
        if "padding" in text:
            yield "Padding", f"{text['padding']:.1%} of the tokens of calibration calls, counted in statistics like the others"
        if "memory" in text:
            yield "Device memory", str(text["memory"])
        if "processes" in text:
            yield "Processes", str(text["processes"])
    yield from ((name, _joined(facts)) for name, facts in (("Machine", given.machine), ("Versions", given.versions)) if facts)
    if timings:
        yield "Time", ", ".join(f"{name} {phrases.seconds(value)}" for name, value in timings.items())


def _joined(facts: Mapping[str, str | int]) -> str:
    return ", ".join(
        f"{name.removesuffix('_bytes')} {phrases.size(float(value)) if name.endswith('_bytes') else value}" for name, value in facts.items()
    )
