"""Calibration data of a run: the calls, and the facts about them that are saved with the output."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from aerogel.data import chats, denoising, given, needles, prompts, sources, text
from aerogel.data.chats import Chats
from aerogel.data.denoising import Denoising, first_call
from aerogel.data.needles import NeedlePrompt, Needles
from aerogel.data.tokenized import TOKENS_OF_A_CALL, Tokenized
from aerogel.errors import AerogelError
from aerogel.evaluate.measure import positions, require_embedded, require_room, vocabulary_size
from aerogel.methods.base import CalibrationSize
from aerogel.model.calls import Call, tensors_in
from aerogel.model.denoisers import Denoisers
from aerogel.model.network import Network
from aerogel.model.placement import AUTO
from aerogel.model.trajectories import Trajectories
from aerogel.numerics.packing import raw_bytes
from aerogel.options import Count, Guidance, Pixels, Tokens, checked


@dataclass(frozen=True)
class Samples:
    """Text that a language model is calibrated on."""

    source: str | Path | Iterable[Any] = "sotu"
    """Name of shipped text, a file, a folder or a dataset of the hub, or documents given in Python."""
    count: int = 128
    """Sequences."""
    length: int = 512
    """Tokens of a sequence."""
    batch_size: int | None = None
    """Sequences in one call; None: as many as have TOKENS_OF_A_CALL tokens."""
    column: str | None = None
    """Column of the records with the text or chat; None finds it by its name."""

    @property
    def batch(self) -> int:
        """Sequences in one call."""
        return min(self.count, self.batch_size or max(1, TOKENS_OF_A_CALL // self.length))


Shown = Samples | Chats | Needles | Tokenized | Denoising | Sequence[Call]
"""Kinds of calibration data: text, chats with images, needle prompts, tokens, generations of the model itself, or recorded calls."""
GIVEN_CALLS = "given calls"
"""Name in a run's record of calls that were given in Python."""
_TOKENS_OF_AN_IMAGE = 256
_TOKENS_OF_A_CHAT = 512
_ANSWER = 32
"""Positions that are left for the answer where the length of needle prompts is not said."""


@dataclass(frozen=True)
class Calibration:
    """Calls of a run and their source."""

    calls: Sequence[Call]
    facts: dict[str, Any] = field(default_factory=dict)
    """Source, count and length if known, and the fingerprint."""


_VIDEOS = {"count": 8, "batch": 1}
"""Generations of a video model by default: each has the tokens of dozens of images."""


@dataclass(frozen=True)
class CalibrationRequest:
    """Calibration options given by the user, before the modality of the model is known; None is the default."""

    source: str | Iterable[Any] | None = None
    """Text by name or path or given in Python, chats with images, or needle prompts by name; for diffusion models, prompts: one per line of
    a file, or records."""
    count: Count | None = None
    """Sequences, or images."""
    length: Tokens | None = None
    """Tokens of a sequence."""
    steps: Count | None = None
    """Steps of the sampler."""
    guidance: Guidance | None = None
    """Guidance scale."""
    prompts: tuple[str, ...] | None = None
    """Prompts of a diffusion model, instead of a file with them."""
    height: Pixels | None = None
    """Pixels of an image or a video."""
    width: Pixels | None = None
    """Pixels of an image or a video."""
    num_frames: Count | None = None
    """Frames of a video."""
    column: str | None = None
    """Column of the records with the text, chat or prompt; None finds it by its name."""

    def __post_init__(self) -> None:
        """Check every number; raises AerogelError that names the first wrong one, its value and what is expected."""
        for name in ("count", "length", "steps", "guidance", "height", "width", "num_frames"):
            checked(CalibrationRequest, name, getattr(self, name), "samples" if name == "count" else name)

    def shown(self, network: Network) -> Shown:
        """Return the calibration data for this model; raises AerogelError for an option of the other modality."""
        is_diffusion = network.family.modality in ("image", "video")
        generated = {name: getattr(self, name) for name in ("steps", "guidance", "height", "width", "num_frames")}
        unfit = {"length": self.length} if is_diffusion else {**generated, "prompts": self.prompts}
        if wrong := [name for name, value in unfit.items() if value is not None]:
            kind = "diffusion" if is_diffusion else "language"
            raise AerogelError(f"{wrong[0]} does not apply to a {kind} model ({network.family.name}); remove it")
        if needles.is_named(self.source):
            return self._needles(str(self.source), network)
        if is_diffusion:
            if self.source is None and self.column is not None:
                raise AerogelError(f"column is {self.column!r}, but no file with prompts is given as data that could have it; remove it")
            found = self.prompts if self.source is None else prompts.read(self.source, self.column)
            usual = _VIDEOS if network.family.modality == "video" else {}
            return Denoising(**usual | _said(count=self.count, prompts=found, **generated))
        if isinstance(self.source, str | Path) and network.family.modality == "image-text" and chats.are_at(self.source):
            if self.length is not None:
                raise AerogelError("length does not apply to chats, which are read completely; remove it")
            return Chats(**_said(source=self.source, count=self.count, column=self.column))
        source = self.source if sources.is_named(self.source) or self.source is None else given.parse(self.source, self.column)
        if isinstance(source, Tokenized):
            return self._tokens(source, network)
        length = self.length or min(Samples.length, positions(network) or Samples.length)
        return Samples(**_said(source=source, count=self.count, length=length, column=self.column))

    def _needles(self, name: str, network: Network) -> Needles:
        """The prompts that a name asks for; raises AerogelError for what does not apply to them, and for a diffusion model."""
        if network.family.modality in ("image", "video"):
            raise AerogelError(f"{name} are long prompts of text, and {network.family.name} is a diffusion model; give a file with prompts")
        if self.column is not None:
            raise AerogelError(f"column is {self.column!r}, and {name} are prompts that are made here; remove it")
        room = positions(network)
        length = self.length or (Needles.length if room is None else max(1, min(Needles.length, room - _ANSWER)))
        return Needles(**_said(keys=needles.keys_of(name), count=self.count, length=length))

    def _tokens(self, found: Tokenized, network: Network) -> Tokenized:
        """The first sequences of tokens; raises AerogelError for options of text, and for ids and lengths that the model has not."""
        if self.length is not None:
            raise AerogelError("length does not apply to tokens, which are read as they are; remove it")
        found = replace(found, rows=found.rows[: self.count])
        found.check(vocabulary_size(network), positions(network))
        return found


def _said(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


CalibrationInput = Shown | CalibrationRequest | str | Path | torch.Tensor | Mapping[str, Any] | Iterable[Any]
"""Calibration data as users give it: what `Shown` has, the name of a source, or text or tokens in Python."""


def shown(network: Network, samples: CalibrationInput | None) -> Shown:
    """Return the calibration data for a model; the default is text, or generations of a diffusion model."""
    found = _request_of(samples)
    if isinstance(found, CalibrationRequest):
        found = found.shown(network)
    if isinstance(found, Sequence):
        found = _in_its_dtype(network, found)
        network.discover(found)  # a module of the user's own is known by the user's calls only
    elif isinstance(found, Denoising) and _is_single_pipeline(network) and network.needs_example:
        with suppress(Exception):  # what the pipeline lacks is said when its calls are recorded
            network.discover([first_call(network.processor, network.module, found)])
    return found


def _request_of(samples: CalibrationInput | None) -> Shown | CalibrationRequest:
    """The calibration data as one of the kinds that say how it is read."""
    if samples is None:
        return CalibrationRequest()
    if isinstance(samples, Samples | Chats | Needles | Tokenized | Denoising | CalibrationRequest):
        return samples
    if isinstance(samples, Sequence) and not isinstance(samples, str) and all(isinstance(call, Call) for call in samples):
        return cast(Sequence[Call], samples)
    return CalibrationRequest(source=str(samples) if isinstance(samples, Path) else samples)


def _in_its_dtype(network: Network, calls: Sequence[Call]) -> Sequence[Call]:
    """Return calls with floats in the dtype of a transformers model that was opened here, as `BatchFeature.to(dtype)` makes them.

    Image and audio processors make float32, and whether the model computes in that depends on its folder and on the processor.
    """
    dtype = getattr(network.module, "dtype", None)
    if network.source is None or network.family.modality in ("image", "video") or not isinstance(dtype, torch.dtype):
        return calls
    return [call.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor) for call in calls]


def _is_single_pipeline(network: Network) -> bool:
    return hasattr(network.processor, "components") and not isinstance(network.module, Denoisers)


def with_batch_size(samples: Shown, batch_size: int | Literal["auto"], processes: int = 1) -> Shown:
    """Return the calibration data with so many sequences, chats or images in a call; `auto` leaves it as it is.

    Sequences and chats are then so many in a call that each of the processes has one. Raises AerogelError for a number below 1, and for
    recorded calls, which have the size that they have.
    """
    if batch_size == AUTO:
        return samples if processes == 1 else _with_calls(samples, processes)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise AerogelError(f"batch_size is {batch_size!r}; give auto, or how many sequences one call has, at least 1")
    if isinstance(samples, Samples | Needles | Tokenized):
        return replace(samples, batch_size=batch_size)
    if isinstance(samples, Chats | Denoising):
        return replace(samples, batch=batch_size)
    raise AerogelError("batch_size does not apply to recorded calls, which have the size they were given with; leave it at auto")


def _with_calls(samples: Shown, count: int) -> Shown:
    """Return sequences or chats with as few in a call as it takes for so many calls."""
    if isinstance(samples, Tokenized):
        return samples.in_calls(count)
    if isinstance(samples, Samples | Needles) and samples.batch_size is None:
        return replace(samples, batch_size=min(samples.batch, max(1, samples.count // count)))
    return replace(samples, batch=min(samples.batch, max(1, samples.count // count))) if isinstance(samples, Chats) else samples


def reading(network: Network, samples: Shown) -> CalibrationSize:
    """Return the size of the calibration data."""
    if isinstance(samples, Denoising):
        # Under guidance a call has twice the images; an image counts as the tokens of a small one, its size is not known here.
        each = _TOKENS_OF_AN_IMAGE
        return CalibrationSize(2 * samples.count * samples.steps * each, 2 * samples.batch * each, each, samples.steps)
    if isinstance(samples, Chats):  # the length of a chat is known only after tokenization
        return CalibrationSize(samples.count * _TOKENS_OF_A_CHAT, samples.batch * _TOKENS_OF_A_CHAT, _TOKENS_OF_A_CHAT)
    if isinstance(samples, Tokenized):
        batches, longest = samples.batches(), samples.longest
        tokens, most = sum(batch_NL.numel() for batch_NL in batches), max(batch_NL.numel() for batch_NL in batches)
        return CalibrationSize(tokens, most, longest, length=longest)
    if isinstance(samples, Samples | Needles):
        return CalibrationSize(samples.count * samples.length, samples.batch * samples.length, samples.length, length=samples.length)
    tensors = [[tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.ndim] for call in samples]
    sizes = [max(map(_positions, given), default=0) for given in tensors]
    of_one = [size // max(map(len, given), default=1) for size, given in zip(sizes, tensors, strict=True)]
    return CalibrationSize(sum(sizes), max(sizes, default=0), max(of_one, default=0), _steps(network, samples))


def _steps(network: Network, calls: Sequence[Call]) -> int:
    if network.family.modality in ("image", "video"):
        with suppress(AerogelError):  # single calls at several steps are not a generation; a method that needs one reports it
            return len(Trajectories.of(network, calls).steps)
    return 1


def prepare(network: Network, samples: Shown, seed: int, head: bool) -> Calibration:
    """Return the calibration calls; with `head` the LM head is applied to every token, else to the last one if the model supports that.

    Raises AerogelError if the model has neither a tokenizer nor a pipeline and no calls are given, or if the text is too short.
    """
    if isinstance(samples, Denoising):
        return _recorded(network, samples, seed)
    if isinstance(samples, Chats):
        return _read(network, samples, seed)
    if isinstance(samples, Needles):
        asked = hidden(network, samples, seed)
        tokenizer = getattr(network.processor, "tokenizer", network.processor)
        return Calibration(needles.calls(asked, tokenizer, samples.batch), facts_of(samples, asked))
    if isinstance(samples, Samples | Tokenized):
        calls, facts = _of_tokens(samples) if isinstance(samples, Tokenized) else _of_text(network, samples, seed)
        # Logits of every token are the largest tensor of a forward, and nobody reads them.
        if not head and "logits_to_keep" in inspect.signature(network.module.forward).parameters:
            calls = [Call(call.args, {**call.kwargs, "logits_to_keep": 1}) for call in calls]
        return Calibration(calls, facts)
    calls = list(samples)
    return Calibration(calls, {"source": GIVEN_CALLS, "count": len(calls), **_padding(calls), "fingerprint": _fingerprint(calls)})


def _of_text(network: Network, samples: Samples, seed: int) -> tuple[list[Call], dict[str, Any]]:
    tokenizer = getattr(network.processor, "tokenizer", network.processor)
    if tokenizer is None:
        raise AerogelError(f"this {network.family.name} model has no tokenizer for calibration text; give recorded calls as samples")
    source, column = samples.source, {} if samples.column is None else {"column": samples.column}
    tokens_NL = text.samples(tokenizer, source, samples.count, samples.length, seed, samples.column)
    require_embedded(network, tokens_NL)
    facts = {"source": sources.name_of(source), **column, "count": len(tokens_NL), "length": samples.length}
    return text.calls(tokens_NL, samples.batch), facts | {"fingerprint": text.fingerprint(tokens_NL)}


def hidden(network: Network, wanted: Needles, seed: int) -> list[NeedlePrompt]:
    """Return needle prompts; raises AerogelError for a model without a tokenizer, and for prompts that do not fit it."""
    tokenizer = getattr(network.processor, "tokenizer", network.processor)
    if tokenizer is None:
        raise AerogelError(f"this {network.family.name} model has no tokenizer for {wanted.name}; load it from a folder with one")
    asked = wanted.drawn(tokenizer, seed)
    require_room(network, torch.stack([one.ids_L for one in asked]), needles.reply_tokens(tokenizer, asked), wanted.name)
    return asked


def facts_of(wanted: Needles, asked: Sequence[NeedlePrompt]) -> dict[str, Any]:
    """Return what a run's record says about needle prompts."""
    ids_NL = torch.stack([one.ids_L for one in asked])
    return {"source": wanted.name, "count": len(asked), "length": wanted.length, "fingerprint": text.fingerprint(ids_NL)}


def _of_tokens(samples: Tokenized) -> tuple[list[Call], dict[str, Any]]:
    calls = samples.calls()
    digest = _fingerprint([Call((row_L,)) for row_L in samples.rows])
    return calls, {"source": sources.GIVEN, "count": samples.count, "fingerprint": digest}


def _padding(calls: Sequence[Call]) -> dict[str, float]:
    """The share of padding among the tokens of calls, where there is any, by the masks that tokenizers give; statistics count it."""
    masks = [mask for call in calls if (mask := _mask(call)) is not None]
    tokens = sum(mask.numel() for mask in masks)
    padding = tokens - sum(int(mask.count_nonzero()) for mask in masks)
    return {"padding": padding / tokens} if padding else {}


def _mask(call: Call) -> torch.Tensor | None:
    mask, ids = call.kwargs.get("attention_mask"), call.kwargs.get("input_ids")
    found = isinstance(mask, torch.Tensor) and isinstance(ids, torch.Tensor) and mask.shape == ids.shape
    return mask if found else None


def _read(network: Network, wanted: Chats, seed: int) -> Calibration:
    found = chats.drawn(chats.read(wanted.source, wanted.column), wanted.count, seed)
    calls = chats.calls(found, network.processor, wanted.batch)
    column = {} if wanted.column is None else {"column": wanted.column}
    return Calibration(
        calls, {"source": str(wanted.source), **column, "count": len(found), **_padding(calls), "fingerprint": chats.fingerprint(found)}
    )


def _recorded(network: Network, wanted: Denoising, seed: int) -> Calibration:
    if not hasattr(network.processor, "scheduler"):
        raise AerogelError(
            f"this {network.family.name} model came without its pipeline, so no generations can be recorded; "
            "open the folder of the pipeline, or give recorded calls as samples"
        )
    with network.on_device():
        denoising.check(network.processor, wanted)
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
            digest.update(raw_bytes(tensor).cpu().numpy().data)
    return f"sha256:{digest.hexdigest()}"
