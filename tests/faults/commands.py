"""Every command, on each kind of folder that it takes, and what its outcome means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.judged import Command

Words = tuple[object, ...]
GPTQ: Words = ("--recipe", "gptq-w4a16", "--scheme", "W4A16_G32")
SHORT: Words = ("--samples", 2, "--length", 8)
SAVED: Words = ("--no-evaluate", "--quiet", "--output")
PERPLEXITY: Words = ("--measure", "perplexity", "--set", "perplexity.length=16", "--json", "--quiet")
_RTN: Words = ("--recipe", "rtn-w4a16", "--scheme", "W4A16_G32")
_SIMILARITY: Words = ("--measure", "image_similarity", "--set", "image_similarity.count=1", "--set", "image_similarity.steps=2")
_DRAWN: Words = ("--steps", 2, "--samples", 1, "--quiet")


def nothing(told: str, output: Path) -> object:
    """Return the same for every outcome: of times, and of what is repeated from a record that is free text."""
    return None


def weights(told: str, output: Path) -> object:
    """Return what a folder of weights means: the tensors, how they are quantized, and which policies are beside them."""
    configs = [json.loads(path.read_text()).get("quantization_config") for path in sorted(output.rglob("config.json"))]
    record = json.loads((output / "aerogel.json").read_text()) if (output / "aerogel.json").exists() else {}
    return _digests(output, "*.safetensors"), configs, record.get("policies")


def exported(told: str, output: Path) -> object:
    """Return what an exported folder means."""
    return weights(told, output) if any(output.rglob("config.json")) else _digests(output, "*")


def _digests(folder: Path, pattern: str) -> dict[str, str]:
    files = (path for path in folder.rglob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def scores(told: str, output: Path) -> object:
    """Return measured numbers but for those of time and memory."""
    return [{name: _untimed(facts) for name, facts in side.items()} for side in json.loads(told).values()]


def _untimed(facts: Any) -> Any:
    if not isinstance(facts, dict):
        return facts
    measured = ("seconds", "per_second", "memory_bytes", "disk_bytes")
    return {key: _untimed(value) for key, value in facts.items() if not key.endswith(measured)}


def planned(told: str, output: Path) -> object:
    """Return a plan without its estimates of time and memory."""
    return {key: value for key, value in json.loads(told).items() if key not in ("seconds", "peak_memory_bytes")}


def dropped(told: str, output: Path) -> object:
    """Return what a search over policies that drop tokens found, without its times."""
    return [(row["policy"], row["kept"], row["kl"], row["right"]) for row in json.loads(told)["rows"]]


def on(*words: object) -> Callable[[Path, Path], Words]:
    """Return the words of a command: IN, SOUND, TEXT, RECIPE and CHATS stand for parts of the input, OUT for a place for an output."""

    def filled(given: Path, output: Path) -> Words:
        places = {"IN": given / "in", "SOUND": given / "sound", "TEXT": given / "text.txt", "OUT": output}
        places |= {"RECIPE": given / "own.yaml", "CHATS": given / "chats.json"}
        return tuple(places.get(word, word) if isinstance(word, str) else word for word in words)

    return filled


LANGUAGE = (
    Command("show", on("show", "IN", "--json")),
    Command("evaluate", on("evaluate", "IN", "--data", "TEXT", *PERPLEXITY), scores),
    Command("evaluate size", on("evaluate", "IN", "--measure", "size", "--json"), nothing),
    Command(
        "evaluate against",
        on("evaluate", "SOUND", "--against", "IN", "--data", "TEXT", "--measure", "kl_divergence", "--json", "-q"),
        scores,
    ),
    Command("bench", on("bench", "IN", "--prompt", 4, "--new-tokens", 2, "--rounds", 1, "-q"), nothing),
)
"""Commands on any folder with a language model."""
CALIBRATING = (
    Command("plan", on("plan", "IN", *_RTN, "--json"), planned),
    Command("compress", on("compress", "IN", *_RTN, *SAVED, "OUT"), weights),
    Command("compress calibrated", on("compress", "IN", *GPTQ, "--data", "TEXT", *SHORT, *SAVED, "OUT"), weights),
)
"""Commands on one that is not quantized yet, or in a layout that is opened as floats."""
WRITTEN = (
    Command("show --recipe", on("show", "--recipe", "IN"), nothing),
    Command("report", on("report", "IN", "-o", "OUT"), nothing),
    Command("push", on("push", "IN", "owner/name", "-q"), nothing),
)
"""Commands on a folder that `compress` wrote."""
DIFFUSION = (
    Command("show", on("show", "IN", "--json")),
    Command("plan", on("plan", "IN", "--recipe", "rtn-w8a8", "--scheme", "W8A16_CHANNEL", "--json"), planned),
    Command("compress", on("compress", "IN", "--recipe", "RECIPE", *_DRAWN, *SAVED, "OUT"), weights),
    Command("evaluate", on("evaluate", "IN", "--measure", "size", "--json"), nothing),
    Command("evaluate against", on("evaluate", "IN", "--against", "SOUND", *_SIMILARITY, "--json", "-q"), scores),
    Command("bench", on("bench", "IN", "--steps", 2, "--rounds", 1, "-q"), nothing),
)
"""Commands on a pipeline; the recipe caches features."""
SEARCHED = Command("search", on("search", "IN", "--only", "fora", "--budget", 1.01, *_DRAWN), nothing)
_SKIP: Words = ("--task", "skip", "--only", "reduced_topk", "--budget", "50%")
SKIPPED = Command("search --task skip", on("search", "IN", *_SKIP, "--data", "TEXT", *SHORT, "-q"), nothing)

_PRUNE: Words = ("--task", "sparsity", "--only", "magnitude", "--budget", "50%")
PRUNED = Command("search --task sparsity", on("search", "IN", *_PRUNE, "--data", "TEXT", *SHORT, "-q"), nothing)
_REMOVE: Words = ("--task", "structured", "--only", "shortgpt", "--set", "shortgpt.protect_last=0", "--budget", "1.01x")
REMOVED = Command("search --task structured", on("search", "IN", *_REMOVE, "--data", "TEXT", *SHORT, "-q"), nothing)

_DROP: Words = ("--task", "tokens", "--only", "divprune", "--budget", "50%")
DROPPED = Command("search --task tokens", on("search", "IN", *_DROP, "--data", "CHATS", "--samples", 2, "--json"), dropped)
CHATTED = (
    DROPPED,
    Command("compress chats", on("compress", "IN", *GPTQ, "--data", "CHATS", "--samples", 2, *SAVED, "OUT"), weights),
    Command("evaluate chats", on("evaluate", "IN", "--measure", "exact_match", "--data", "CHATS", "--json", "-q"), scores),
)
"""Commands that read chats about images."""


def exports(*formats: str) -> tuple[Command, ...]:
    """Return the commands that export to these formats."""
    return tuple(Command(f"export {name}", on("export", "IN", "-f", name, "-o", "OUT"), exported) for name in formats)


TRACED = Command("export onnx", on("export", "IN", "-f", "onnx", "-o", "OUT"), exported, seconds=60)
"""Torch's tracer alone takes more than the usual limit."""


def merged(command: Command) -> Command:
    """Return a command that merges the adapter which it is given."""
    return Command(command.name, lambda given, output: (*command.words(given, output), "--merge-adapter"), command.meaning)


def reports_on(*names: str) -> tuple[Command, ...]:
    """Return the commands that write the reports on searches."""
    return tuple(Command(f"report {name}", partial(_report, name), lambda told, output: output.read_text()) for name in names)


def _report(name: str, given: Path, output: Path) -> Words:
    return "report", given / name, "-o", output


def _resumed(given: Path, output: Path) -> Words:
    return "compress", given / "sound", *GPTQ, "--data", given / "text.txt", *SHORT, *SAVED, given / "out", "--resume"


RESUMED = Command("compress --resume", _resumed, lambda told, output: weights(told, output.parent / "given" / "out"))
