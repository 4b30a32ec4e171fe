"""Checks of a model's numbers before any work: weights that are not finite or that float16 does not hold, activations that overflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from aerogel.data import chats, denoising, text
from aerogel.data.chats import Chats
from aerogel.data.denoising import Denoising
from aerogel.data.needles import Needles
from aerogel.data.tokenized import Tokenized
from aerogel.engine.calibration import Samples, Shown
from aerogel.engine.teacher import residency_of
from aerogel.errors import AerogelError, reasons
from aerogel.evaluate.measure import require_embedded, tokenizer_of
from aerogel.layers.replacement import Replacement
from aerogel.layers.slots import slots
from aerogel.model.batches import Batches
from aerogel.model.calls import Call
from aerogel.model.denoisers import Denoisers
from aerogel.model.network import Network
from aerogel.model.overflow import Overflow, first_overflow
from aerogel.numerics.ranges import is_sound, narrows

TOKENS = 128
"""Tokens of a text that a model is tried on."""


def check_weights(network: Network) -> None:
    """Make sure that every weight is a number; raises AerogelError that names the first tensor that has NaN or infinity.

    Raises AerogelError too where a weight has a number that the dtype that is computed in does not hold.
    """
    checkpoint, limits = network.checkpoint, _limits(network.module)
    if checkpoint is not None:
        dtypes = {slot.name: slot.tensor.dtype for slot in slots(network.module) if isinstance(slot.tensor, nn.Parameter)}
        bad = checkpoint.nonfinite(limits=limits, dtypes=dtypes)
    else:
        floats = (slot for slot in slots(network.module) if slot.tensor.is_floating_point() and slot.tensor.element_size() > 1)
        bad = [slot.name for slot in floats if not is_sound(slot.tensor, slot.name in limits)]
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        where = f"{checkpoint.file(bad[0])}: " if checkpoint is not None else ""
        raise AerogelError(f"{where}{bad[0]}{more} holds NaN or infinity; such weights cannot be compressed, get a sound copy of the model")


def check_activations(network: Network, samples: Shown) -> None:
    """Make sure that a model that computes in float16 can do so, by one short call of the calibration.

    The other dtypes have the range of float32, where nothing is run. Raises AerogelError that names the layer whose numbers overflow.
    """
    if not computes_in_float16(network):
        return
    for call in _short_calls(network, samples):
        if (found := _overflow(network, call)) is not None:
            raise found.error


def check_answers(network: Network, calls: Sequence[Call]) -> None:
    """Make sure, with all weights resident, that nothing is infinite in one call of each shape: measures of whole models would be too.

    Raises AerogelError that names the layer whose numbers overflow.
    """
    for call in _of_each_shape(calls):
        if (found := first_overflow(network, call)) is not None:
            raise found.error


def overflowing(network: Network, samples: Shown | None) -> Iterator[str]:
    """Yield why a model cannot compute in float16, for a plan: it reads all weights, and runs the samples if there are any."""
    if not computes_in_float16(network):
        return
    if network.checkpoint is not None and any(narrows(stored, torch.float16) for stored in _stored(network)):
        yield from (wrong := list(reasons(lambda: check_weights(network))))
        if wrong:
            return
    if samples is not None:
        yield from reasons(lambda: check_activations(network, samples))


def computes_in_float16(network: Network) -> bool:
    """Return True where a part of a model computes in the one dtype that overflows at 65,504."""
    return any(parameter.dtype == torch.float16 for parameter in network.module.parameters())


def _stored(network: Network) -> set[torch.dtype]:
    assert network.checkpoint is not None
    return {dtype for name in network.checkpoint.names() if (dtype := network.checkpoint.dtype(name)).is_floating_point}


def _overflow(network: Network, call: Call) -> Overflow | None:
    """Run a call, or as much of it as fits into memory."""
    batches = Batches(network.placement)
    return batches.fit(lambda: first_overflow(network, next(batches.parts(0, call)).call(call), residency_of(network)))


def _short_calls(network: Network, samples: Shown) -> list[Call]:
    """The first sample of the calibration data, of text its first tokens; one given call of each shape.

    What is wrong with the data is said where the whole of it is read.
    """
    with suppress(AerogelError):
        if isinstance(samples, Denoising):
            return _denoising_calls(network, samples)
        if isinstance(samples, Chats):
            return chats.calls(chats.read(samples.source, samples.column, most=1), network.processor)
        if isinstance(samples, Needles):
            samples = Samples(samples.source)  # the text that numbers are hidden in
        if isinstance(samples, Samples | Tokenized):
            ids_L = samples.rows[0][:TOKENS] if isinstance(samples, Tokenized) else _first_tokens(network, samples)
            return text.calls(ids_L[None])
        return _of_each_shape(samples)
    return []


def _denoising_calls(network: Network, samples: Denoising) -> list[Call]:
    """The first step of an image; of several denoisers, which share the steps, two steps."""
    if not hasattr(network.processor, "scheduler"):
        return []
    with network.on_device():
        if isinstance(network.module, Denoisers):
            calls = denoising.record(network.processor, network.module, _few(samples))
            return _of_each_shape(calls)
        return [denoising.first_call(network.processor, network.module, samples)]


def _of_each_shape(calls: Sequence[Call]) -> list[Call]:
    return list({call.shape: call for call in reversed(calls)}.values())


def _few(samples: Denoising) -> Denoising:
    return replace(samples, count=1, batch=1, steps=2)


def _first_tokens(network: Network, samples: Samples) -> Tensor:
    tokenizer = tokenizer_of(network)
    first = text.opening(tokenizer)
    length = min(samples.length, TOKENS)
    ids_L = torch.cat([torch.tensor(first, dtype=torch.int64), text.tokens(tokenizer, samples.source, length, samples.column)])[:length]
    require_embedded(network, ids_L)
    return ids_L


def _limits(module: nn.Module) -> set[str]:
    """Names of the buffers of a model's own code: clamps that were never set are infinite. Those of replaced layers are weights."""
    parts = ((name, part) for name, part in module.named_modules() if not isinstance(part, Replacement))
    return {f"{name}.{key}" if name else key for name, part in parts for key, _ in part.named_buffers(recurse=False)}
