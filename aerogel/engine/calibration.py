"""What a network is shown while it is compressed: calls, and the facts about them that go into the output."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from aerogel.data import chats, denoising, text
from aerogel.data.chats import Chats
from aerogel.data.denoising import Denoising
from aerogel.errors import AerogelError
from aerogel.methods.base import CalibrationSize
from aerogel.model.calls import Call, tensors_in
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories

TOKENS_OF_A_CALL = 4096
"""Sequences are batched up to this many tokens, so that activations stay small and matrix products stay efficient."""


@dataclass(frozen=True)
class Samples:
    """Which text a language model is calibrated on."""

    source: str | Path = "sotu"
    """Name of shipped text, or a .txt, .jsonl or datasets folder."""
    count: int = 128
    """Sequences."""
    length: int = 512
    """Tokens of a sequence."""

    @property
    def batch(self) -> int:
        """Sequences in one call."""
        return min(self.count, max(1, TOKENS_OF_A_CALL // self.length))


Shown = Samples | Chats | Denoising | Sequence[Call]
"""What a network can be shown: text, chats about images, its own images in the making, or calls that were recorded."""
_TOKENS_OF_AN_IMAGE = 256
_TOKENS_OF_A_CHAT = 512


@dataclass(frozen=True)
class Calibration:
    """The calls of a run and where they come from."""

    calls: Sequence[Call]
    facts: dict[str, Any] = field(default_factory=dict)
    """source, count and length when known, and the fingerprint."""


@dataclass(frozen=True)
class CalibrationRequest:
    """What somebody said about calibration before it is known whether the network reads text or makes images; None is the default."""

    source: str | None = None
    """Text by name or path, or a .jsonl of chats about images; for images, a file with a prompt on each line."""
    count: int | None = None
    """Sequences, or images."""
    length: int | None = None
    """Tokens of a sequence."""
    steps: int | None = None
    """Steps of the sampler."""
    guidance: float | None = None
    """Guidance scale."""

    def shown(self, network: Network) -> Shown:
        """What this means for a network; raises AerogelError for what is of the other kind."""
        is_diffusion = network.family.modality in ("image", "video")
        unfit = {"length": self.length} if is_diffusion else {"steps": self.steps, "guidance": self.guidance}
        if wrong := [name for name, value in unfit.items() if value is not None]:
            kind = "makes images" if is_diffusion else "reads text"
            raise AerogelError(f"{wrong[0]} means nothing to a network that {kind} ({network.family.name}); leave it out")
        if is_diffusion:
            prompts = None if self.source is None else _prompts(Path(self.source))
            return Denoising(**_said(count=self.count, steps=self.steps, guidance=self.guidance, prompts=prompts))
        if network.family.modality == "image-text" and self.source is not None and chats.are_at(self.source):
            if self.length is not None:
                raise AerogelError("length means nothing to chats, which are read whole; leave it out")
            return Chats(**_said(source=self.source, count=self.count))
        return Samples(**_said(source=self.source, count=self.count, length=self.length))


def _said(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _prompts(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise AerogelError(f"{path} is no file; give a text file with a prompt on each line")
    prompts = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    if not prompts:
        raise AerogelError(f"{path} holds no prompt; expected one on each line")
    return prompts


CalibrationInput = Shown | CalibrationRequest


def shown(network: Network, samples: CalibrationInput | None) -> Shown:
    """What a network is shown; when nothing is said, text or its own images in the making."""
    samples = CalibrationRequest() if samples is None else samples
    return samples.shown(network) if isinstance(samples, CalibrationRequest) else samples


def reading(network: Network, samples: Shown) -> CalibrationSize:
    """How much there is to read."""
    if isinstance(samples, Denoising):
        # Under guidance a call has twice the images; an image counts as the tokens of a small one, its size is not known here.
        each = _TOKENS_OF_AN_IMAGE
        return CalibrationSize(2 * samples.count * samples.steps * each, 2 * samples.batch * each, each, samples.steps)
    if isinstance(samples, Chats):  # how long a chat is, is known only when it was read
        return CalibrationSize(samples.count * _TOKENS_OF_A_CHAT, samples.batch * _TOKENS_OF_A_CHAT, _TOKENS_OF_A_CHAT)
    if isinstance(samples, Samples):
        return CalibrationSize(samples.count * samples.length, samples.batch * samples.length, samples.length)
    tensors = [[tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.ndim] for call in samples]
    sizes = [max(map(_positions, given), default=0) for given in tensors]
    of_one = [size // max(map(len, given), default=1) for size, given in zip(sizes, tensors, strict=True)]
    return CalibrationSize(sum(sizes), max(sizes, default=0), max(of_one, default=0), _steps(network, samples))


def _steps(network: Network, calls: Sequence[Call]) -> int:
    if network.family.modality in ("image", "video"):
        with suppress(AerogelError):  # samples of one call at several steps are no generation: what needs one says so
            return len(Trajectories.of(network, calls).steps)
    return 1


def prepare(network: Network, samples: Shown, seed: int, head: bool) -> Calibration:
    """The calls to calibrate with; with `head` every token passes the network's head, else only the last one where that can be said.

    Raises AerogelError when no calls are given to a network that neither reads text nor came with its pipeline, or the text is too short.
    """
    if isinstance(samples, Denoising):
        return _recorded(network, samples, seed)
    if isinstance(samples, Chats):
        return _read(network, samples, seed)
    if not isinstance(samples, Samples):
        calls = list(samples)
        return Calibration(calls, {"source": "given calls", "count": len(calls), "fingerprint": _fingerprint(calls)})
    tokenizer = getattr(network.processor, "tokenizer", network.processor)
    if tokenizer is None:
        raise AerogelError(f"this {network.family.name} network has no tokenizer to calibrate it on text; give recorded calls as samples")
    tokens_NL = text.samples(tokenizer, samples.source, samples.count, samples.length, seed)
    facts = {"source": str(samples.source), "count": len(tokens_NL), "length": samples.length, "fingerprint": text.fingerprint(tokens_NL)}
    calls = text.calls(tokens_NL.to(network.device), samples.batch)
    # Logits of every token are the largest tensor of a forward, and nobody reads them.
    if not head and "logits_to_keep" in inspect.signature(network.module.forward).parameters:
        calls = [Call(call.args, {**call.kwargs, "logits_to_keep": 1}) for call in calls]
    return Calibration(calls, facts)


def _read(network: Network, wanted: Chats, seed: int) -> Calibration:
    found = chats.drawn(chats.read(wanted.source), wanted.count, seed)
    calls = chats.calls(found, network.processor, wanted.batch, network.device)
    return Calibration(calls, {"source": str(wanted.source), "count": len(found), "fingerprint": chats.fingerprint(found)})


def _recorded(network: Network, wanted: Denoising, seed: int) -> Calibration:
    if not hasattr(network.processor, "scheduler"):
        raise AerogelError(
            f"this {network.family.name} network came without its pipeline, so it cannot be watched making images; "
            "open the pipeline's folder, or give recorded calls as samples"
        )
    calls = denoising.record(network.processor, network.module, wanted, seed)
    facts = {"source": type(network.processor).__name__, "sampler": type(network.processor.scheduler).__name__, **asdict(wanted)}
    return Calibration(calls, facts | {"fingerprint": _fingerprint(calls)})


def _positions(tensor: torch.Tensor) -> int:
    return tensor.numel() // (tensor.shape[-1] if tensor.is_floating_point() and tensor.ndim > 1 else 1)


def _fingerprint(calls: Sequence[Call]) -> str:
    digest = hashlib.sha256()
    for call in calls:
        digest.update(call.shape.encode())
        for tensor in tensors_in((call.args, call.kwargs)):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
