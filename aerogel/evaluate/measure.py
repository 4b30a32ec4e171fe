"""Base of a measure: a frozen dataclass of options that evaluates a model, and its original where it compares.

B windows in a batch, L tokens of a window, R scored tokens of a batch, V vocabulary, T tokens of the text; N images of C channels, H x W.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aerogel.data import denoising, given, needles, sources, text
from aerogel.data.denoising import Denoising, ImageBatch
from aerogel.data.tokenized import Tokenized
from aerogel.errors import AerogelError
from aerogel.layers.linear import cache_dequantized
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.options import Batch, Count, Guidance, Seed, Tokens
from aerogel.runtime.tokens.shortening import drops_text


@dataclass(frozen=True)
class Measure(ABC):
    """Says one thing about a network in facts that fit into JSON."""

    compares: ClassVar[bool] = False
    """True where it needs the original too."""
    asked: ClassVar[bool] = False
    """True where it runs only when asked for by name."""
    modalities: ClassVar[frozenset[str]] = frozenset({"text", "image-text", "image", "video"})
    """The kinds of network it can look at."""

    @classmethod
    def is_usual(cls, network: Network) -> bool:
        """Return True where it is taken of a network unless others are asked for."""
        return not cls.asked

    @classmethod
    def reads(cls, data: Any, column: str | None) -> dict[str, Any] | None:
        """Return the options by which it reads data, parsed, in place of its own; None where it reads no data of this kind."""
        return None

    @abstractmethod
    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return the facts by name; raises AerogelError when the network is not of a kind it can look at."""


class Window(NamedTuple):
    """Equally long pieces of text of which the last tokens are scored."""

    input_ids: Tensor
    """Token ids (B, L)."""
    scored: int
    """Number of tokens at the end of each piece that are predicted from those before them."""

    @property
    def labels(self) -> Tensor:
        """The scored tokens, piece after piece (R)."""
        return self.input_ids[:, -self.scored :].flatten()


@dataclass(frozen=True)
class TextMeasure(Measure):
    """A measure that reads text through a sliding window and scores every token once, except the very first."""

    modalities: ClassVar[frozenset[str]] = frozenset({"text", "image-text"})

    source: str = "sotu-held-out"
    """Name of shipped text, a file, a folder or a dataset of the hub."""
    tokens: Tokens = 8192
    """Tokens read from the start of the source; 0 reads all."""
    length: Tokens = 1024
    """Tokens per window; limited to the number of positions of the model."""
    stride: Tokens = 512
    """Tokens by which the window moves; after the first window every scored token has at least `length - stride` before it."""
    batch: Batch = 1
    """Windows in one forward; the memory that logits take grows with it."""
    hold: bool = True
    """Keep the dequantized weights while the text passes: much faster, for the memory of those weights."""
    column: str | None = None
    """Column of the source's records with the text or chat; found by its name where none is given."""

    @classmethod
    def reads(cls, data: Any, column: str | None) -> dict[str, Any] | None:
        """Return source and column."""
        return source_options(data, column)

    @contextmanager
    def reading(self, *networks: Network) -> Iterator[None]:
        """Get networks ready for many forwards in a row."""
        with ExitStack() as stack:
            for network in networks if self.hold else ():
                stack.enter_context(cache_dequantized(network.module))
            yield

    @property
    def name(self) -> str:
        """Name of the source in a record."""
        return sources.name_of(self.source)

    def stream(self, network: Network) -> Tensor:
        """Return the text that is read, tokens_T; raises AerogelError when it has fewer than two tokens."""
        source = given.parse(self.source, self.column)
        if isinstance(source, Tokenized):
            source.check(vocabulary_size(network), None)
        stream_T = text.tokens(tokenizer_of(network), source, self.tokens or None, self.column)
        if len(stream_T) < 2:
            raise AerogelError(f"text source {self.name!r} has {len(stream_T)} tokens and a measure needs at least 2; give more text")
        require_embedded(network, stream_T)
        return stream_T

    def windows(self, network: Network, stream_T: Tensor) -> Iterator[Window]:
        """Yield what the network reads; raises AerogelError when an option is out of range."""
        if self.length < 2 or self.stride < 1 or self.batch < 1 or self.tokens < 0:
            raise AerogelError(
                f"length {self.length}, stride {self.stride}, batch {self.batch}, tokens {self.tokens}: at least 2, 1, 1 and 0 are expected"
            )
        length = min(self.length, positions(network) or self.length)
        pieces = slide(stream_T, length, min(self.stride, length - 1), text.opening(tokenizer_of(network)))
        for (_, scored), group in groupby(pieces, key=lambda piece: (len(piece[0]), piece[1])):
            ids = [ids_L for ids_L, _ in group]
            for start in range(0, len(ids), self.batch):
                yield Window(network.placement.bring(torch.stack(ids[start : start + self.batch])), scored)


@dataclass(frozen=True)
class EveryTokenMeasure(TextMeasure):
    """A measure of text that needs the logits of every token of a forward."""

    @classmethod
    def is_usual(cls, network: Network) -> bool:
        """Return True unless a policy drops tokens of prompts."""
        return super().is_usual(network) and not drops_text(network)

    def require_every_token(self, *networks: Network) -> None:
        """Raise AerogelError where a policy is on that drops tokens of prompts: there are no logits at these."""
        if any(drops_text(network) for network in networks):
            raise AerogelError(
                f"{type(self).__module__.rpartition('.')[2]}: a policy that drops tokens of prompts is on, and there are no predictions at "
                "these; measure the model without it, or what it writes behind a prompt: generation, decode_perplexity"
            )


@dataclass(frozen=True)
class ImageMeasure(Measure):
    """A measure that lets a pipeline make images: the same noise, prompts and labels for every network."""

    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    asked: ClassVar[bool] = True

    features: str = "efficientnet-lite0"
    """Feature network: efficientnet-lite0, inception:WEIGHTS, or a classifier's folder; `@128` behind it keeps 128 directions."""
    count: Count = 64
    """Images; their noise differs, their prompts or labels take turns."""
    steps: Count = 20
    """Steps of the sampler."""
    guidance: Guidance | None = None
    """Guidance scale; None leaves the pipeline's own."""
    prompts: tuple[str, ...] = ()
    """Prompts for text-to-image pipelines."""
    batch: Batch = 8
    """Images made at once."""
    seed: Seed = 0
    """Seed of the noise."""

    def generated(self, network: Network) -> Iterator[ImageBatch]:
        """Let the network's pipeline make images; raises AerogelError when it has none or a pixel is not finite."""
        if min(self.count, self.steps, self.batch) < 1:
            raise AerogelError(f"count {self.count}, steps {self.steps}, batch {self.batch}: each is at least 1")
        wanted = Denoising(self.count, self.steps, self.guidance, tuple(self.prompts), self.batch)
        for made in denoising.generate_images(pipeline_of(network), wanted, self.seed):
            if not made.images_NCHW.isfinite().all():
                raise AerogelError(f"this {network.family.name} model generates images with NaN pixels; its weights are damaged")
            yield made

    @property
    def conditions(self) -> dict[str, Any]:
        """Return the settings by which the images were made."""
        return {"count": self.count, "steps": self.steps, "guidance": self.guidance, "seed": self.seed}


def source_options(data: Any, column: str | None) -> dict[str, Any] | None:
    """Return the options source and column of what reads text or chats; None for needle prompts, which are neither."""
    if needles.is_named(data):
        return None
    found = {"source": data, "column": column}
    return {name: value for name, value in found.items() if value is not None}


def slide(stream_T: Tensor, length: int, stride: int, opening: list[int]) -> Iterator[tuple[Tensor, int]]:
    """Yield (ids_L, how many of its last tokens are scored); the pieces score tokens 1 to T - 1 once each, in order.

    Every piece begins with the tokens that the tokenizer puts before a text; `stride` is less than `length`.
    """
    prefix = torch.tensor(opening, dtype=torch.int64)
    body, done = length - len(prefix), 1
    for start in range(0, len(stream_T), stride):
        end = min(start + body, len(stream_T))
        yield torch.cat([prefix, stream_T[start:end]]), end - done
        done = end
        if end == len(stream_T):
            return


def predictions(network: Network, window: Window) -> Tensor:
    """Return logits_RV that predict the window's labels, in the network's dtype."""
    inputs: dict[str, Any] = {"input_ids": window.input_ids, "use_cache": False}
    if "logits_to_keep" in inspect.signature(network.module.forward).parameters:
        inputs["logits_to_keep"] = window.scored + 1  # the head's output is the largest tensor of the run
    logits_BLV = network.run(Call((), inputs)).logits
    return logits_BLV[:, -window.scored - 1 : -1].flatten(0, 1)


def require_finite(logits: Tensor, network: Network, measure: str) -> None:
    """Raise AerogelError that names the model where logits hold NaN or positive infinity, or rank no token at all.

    Negative infinity alone is how models rule tokens out.
    """
    if not logits.numel() or bool((logits.amax(-1).isfinite()).all()):  # the largest of a row with NaN is NaN
        return
    raise broken_model(network, measure, "logits that are NaN or infinite")


def broken_model(network: Network, measure: str, found: str) -> AerogelError:
    """Return the error for a model whose results are no numbers."""
    return AerogelError(
        f"{measure}: {known_as(network)} gives {found}; its weights are damaged or its numbers overflow: try another dtype (--dtype "
        "float32), or compress it anew"
    )


def known_as(network: Network) -> str:
    """Return the name that messages call a model by: of its source or folder, else of its class."""
    if network.source is not None:
        return network.source.known_as
    return network.origin.name if network.origin is not None else type(network.module).__name__


def positions(network: Network) -> int | None:
    """Return how many tokens the network can tell apart by place, or None when it does not say, or says that there is no bound."""
    config = network.config
    found = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None  # XLNet has -1


def vocabulary_size(network: Network) -> int | None:
    """Return how many token ids a language model has embeddings for, or None where it does not say."""
    config = network.config
    found = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "vocab_size", None)
    return found if isinstance(found, int) and found > 0 else None


def require_embedded(network: Network, tokens: Tensor) -> None:
    """Raise AerogelError where a tokenizer made ids that the model has no embeddings for."""
    size, largest = vocabulary_size(network), int(tokens.max()) if tokens.numel() else -1
    if size is not None and largest >= size:
        token = tokenizer_of(network).convert_ids_to_tokens(largest)
        raise AerogelError(
            f"the tokenizer makes the id {largest} ({token!r}) of this text, and the model has embeddings for {size} tokens; give the "
            "model's own tokenizer, or resize its embeddings"
        )


def require_room(network: Network, prompt_NL: Tensor, new_tokens: int, what: str) -> None:
    """Raise AerogelError that begins with `what` where prompts and so many tokens behind them do not fit a model, or ids its embeddings."""
    room, length = positions(network), prompt_NL.shape[1]
    if room is not None and length + new_tokens > room:
        raise AerogelError(f"{what}: a prompt of {length} tokens and its answer do not fit the {room} positions of this model")
    require_embedded(network, prompt_NL)


def tokenizer_of(network: Network) -> PreTrainedTokenizerBase:
    """Return the network's tokenizer; raises AerogelError when it has none."""
    tokenizer = getattr(network.processor, "tokenizer", network.processor)
    if tokenizer is None:
        raise AerogelError(f"this {network.family.name} model has no tokenizer, which reading text needs; load it from a folder with one")
    return tokenizer


def pipeline_of(network: Network) -> Any:
    """Return the pipeline that makes images with the network; raises AerogelError when it has none."""
    parts = getattr(network.processor, "components", None)
    if parts is None or not any(part is network.module for part in parts.values()):
        raise AerogelError(
            f"this {network.family.name} model came without its pipeline and generates no images; open the pipeline's folder"
        )
    return network.processor


def original_of(measure: Measure, against: Network | None) -> Network:
    """Return the network to compare with; raises AerogelError when none was given."""
    if against is None:
        raise AerogelError(f"{type(measure).__module__.rpartition('.')[2]} compares with the original; give it (--against MODEL)")
    return against
