"""Requirements of engines on a quantized folder in any layout: no partly quantized set, no quantized head, skipped layers by clear names.

vLLM and SGLang skip every layer whose name contains one of the names to skip, and load the layers of a fused set as one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from aerogel.export.exporter import Master
from aerogel.io.engines import FUSED_NAMES

_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.")
_WEIGHT = ".weight"
_HEAD = "lm_head"


def on_disk(master: Master, name: str) -> str:
    """Return the name on disk of a tensor that the master may not have, beside those of its module."""
    return master.checkpoint.new_on_disk(name) or master.names.on_disk(name)


def quantized(master: Master) -> list[str]:
    """Return the names on disk of the quantized linear layers."""
    return [_layer_on_disk(master, name) for name in master.linears]


def unquantized(master: Master) -> list[str]:
    """Return the names on disk of the modules whose weights are float matrices; experts are one module under the name of their list.

    The head is among them also where it is tied to the embeddings and has no weight on disk: vLLM would take it for quantized.
    """
    found = []
    for name in master.floats:
        dimensions = len(master.checkpoint.shape(name))
        if name.endswith(_WEIGHT) and dimensions > 1:
            found.append(_layer_on_disk(master, name.removesuffix(_WEIGHT)))
        elif dimensions > 2 and (fused := on_disk(master, name).rpartition(".")[0]).endswith("experts"):
            found.append(fused)
    names = list(dict.fromkeys(experts_of(name) or name for name in found))
    head = [] if denoises(master) or any(_last(name) == _HEAD for name in (*names, *master.linears)) else [_HEAD]
    return names + head


def experts_of(name: str) -> str | None:
    """Return the name of the list of experts that a layer is in; None where it is in none."""
    found = _EXPERT.match(name)
    return None if found is None else found[1]


def violations(master: Master) -> list[str]:
    """Return the reasons why engines misread the folder's layers in any layout that names the skipped layers."""
    layers, skipped = quantized(master), unquantized(master)
    return [
        *(f"{name} is quantized, and readers of this format expect it in 16 bits" for name in layers if _last(name) == _HEAD),
        *mixed(layers, skipped),
        *_fused_experts(master),
        *ambiguous(master),
    ]


def ambiguous(master: Master) -> list[str]:
    """Return the skipped layers whose names readers find in those of quantized ones."""
    found = []
    layers = quantized(master)
    for name in unquantized(master):
        if clash := next((layer for layer in layers if name in layer), None):
            found.append(f"{name} is not quantized, and readers would skip {clash} too, whose name contains it; quantize both or neither")
    return found


def mixed(layers: Sequence[str], skipped: Sequence[str]) -> Iterator[str]:
    """Yield the fused sets that are quantized in part, from the names on disk of the quantized layers and of those skipped."""
    outside = set(skipped)
    for names in FUSED_NAMES:
        for layer in layers:
            home, _, last = layer.rpartition(".")
            if last in names and (others := [f"{home}.{name}" for name in names if f"{home}.{name}" in outside]):
                yield f"{layer} is quantized and {others[0]} is not, and engines load them as one tensor; quantize both or neither"
                break
    for home in dict.fromkeys(filter(None, map(experts_of, layers))):
        if home in outside:
            yield f"some experts of {home} are quantized and others are not, and engines load them as one tensor"


def unequal(master: Master) -> Iterator[str]:
    """Yield the fused sets whose quantized layers have several schemes."""
    by_name = dict(zip(quantized(master), master.linears.values(), strict=True))
    for name, assigned in by_name.items():
        home, _, last = name.rpartition(".")
        for others in (names[names.index(last) + 1 :] for names in FUSED_NAMES if last in names):
            for other in (f"{home}.{each}" for each in others):
                if other in by_name and by_name[other] != assigned:
                    yield f"{name} has {assigned.scheme} and {other} {by_name[other].scheme}, and engines load them as one tensor"


def _fused_experts(master: Master) -> Iterator[str]:
    """Yield the lists of experts that checkpoints of the model hold in one tensor, where no layout has names for single ones."""
    for home in dict.fromkeys(filter(None, map(experts_of, master.linears))):
        if master.names.experts(home).fused_on_disk:
            yield f"the experts of {home} are one tensor in checkpoints of this model, and engines do not read single quantized ones"
            return


def denoises(master: Master) -> bool:
    """Return True for a denoiser, False for a language model."""
    return master.family.modality in ("image", "video")


def _layer_on_disk(master: Master, name: str) -> str:
    return on_disk(master, f"{name}{_WEIGHT}").removesuffix(_WEIGHT)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
