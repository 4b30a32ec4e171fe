"""Stores of keys or values in few bits: appended token by token, read as a whole or multiplied piece by piece.

B rows, H heads of keys and values, T tokens, D channels, Q queries of a head, G groups, N numbers kept for a token or a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from aerogel.numerics import kv_cache as numerics
from aerogel.numerics.kv_cache import Range

PIECE = 2048
"""Tokens that are dequantized at a time."""
_GROWTH = 256
"""Tokens, at least, by which a buffer grows: each time all of it is copied."""


class Buffer:
    """A tensor (B, H, T, N) that grows along T."""

    def __init__(self) -> None:
        self._data: Tensor | None = None
        self.length = 0

    def append(self, x_BHTN: Tensor) -> None:
        """Add at the end."""
        end = self.length + x_BHTN.shape[2]
        if self._data is None or end > self._data.shape[2]:
            room = max(end, self.length + max(_GROWTH, self.length // 4))
            data = x_BHTN.new_empty(*x_BHTN.shape[:2], room, x_BHTN.shape[3])
            if self._data is not None:
                data[:, :, : self.length] = self._data[:, :, : self.length]
            self._data = data
        self._data[:, :, self.length : end] = x_BHTN
        self.length = end

    def read(self, start: int = 0, end: int | None = None) -> Tensor:
        """Return a part, without a copy; something must have been appended."""
        assert self._data is not None, "nothing was appended"
        return self._data[:, :, start : self.length if end is None else min(end, self.length)]

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put what `change` makes of it in its place, with another number of rows or tokens."""
        if self._data is not None:
            data = change(self.read())
            self._data, self.length = data.contiguous(), data.shape[2]

    @property
    def bytes(self) -> int:
        """Bytes of what was appended."""
        return 0 if self._data is None else self.read().numel() * self._data.element_size()


class Store(ABC):
    """Keys or values of one layer; subclasses say what they keep."""

    dtype: torch.dtype = torch.float32
    """The dtype of what was appended last."""
    run: int = 1
    """Tokens that are quantized together."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens that are stored."""

    @abstractmethod
    def append(self, x_BHTD: Tensor) -> None:
        """Add tokens at the end."""

    @abstractmethod
    def pieces(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the stored numbers from a token on, (B, H, some tokens, D) each, in the dtype in which they came."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Forget all but the first tokens."""

    @property
    @abstractmethod
    def buffers(self) -> tuple[Buffer, ...]:
        """All that is kept."""

    @property
    def bytes(self) -> int:
        """Bytes of what is stored."""
        return sum(buffer.bytes for buffer in self.buffers)

    def read(self, start: int = 0) -> Tensor:
        """Return the stored numbers from a token on (B, H, T, D)."""
        pieces = list(self.pieces(start))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def scores(self, query_BHQD: Tensor) -> Tensor:
        """Return the products of queries with all stored keys (B, H, Q, T)."""
        return torch.cat([query_BHQD @ piece_BHTD.mT for piece_BHTD in self.pieces()], dim=-1)

    def mixed(self, probability_BHQT: Tensor) -> Tensor:
        """Return the stored values in the mixture that probabilities say (B, H, Q, D)."""
        start, total = 0, torch.zeros((), dtype=probability_BHQT.dtype, device=probability_BHQT.device)
        for piece_BHTD in self.pieces():
            end = start + piece_BHTD.shape[2]
            total = total + probability_BHQT[..., start:end] @ piece_BHTD
            start = end
        return total

    def select(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Put other rows of the batch in place."""
        for buffer in self.buffers:
            buffer.change(rows)


class _RangeStore(Store):
    """Codes with a least number and a scale for each range."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._codes, self._scale, self._low = Buffer(), Buffer(), Buffer()

    @property
    def length(self) -> int:
        """Tokens that are stored."""
        return self._codes.length

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Packed codes and ranges."""
        return self._codes, self._scale, self._low


class TokenStore(_RangeStore):
    """Every token by itself: codes with a range for each token and run of `group` channels, by default all channels of the head."""

    def __init__(self, bits: int, group: int | None = None) -> None:
        super().__init__(bits)
        self._group = group

    def append(self, x_BHTD: Tensor) -> None:
        """Quantize tokens and add them."""
        self.dtype = x_BHTD.dtype
        channels = x_BHTD.shape[-1]
        codes, found = numerics.encode(x_BHTD.unflatten(-1, (-1, min(self._group or channels, channels))), self._bits, dim=-1)
        self._codes.append(numerics.pack_channels(codes.flatten(-2), self._bits))
        self._scale.append(found.scale.squeeze(-1))
        self._low.append(found.low.squeeze(-1))

    def pieces(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the stored numbers from a token on."""
        for begin in range(start, self.length, PIECE):
            codes_BHTD = numerics.unpack_channels(self._codes.read(begin, begin + PIECE), self._bits)
            scale_BHTG, low_BHTG = (buffer.read(begin, begin + PIECE) for buffer in (self._scale, self._low))
            grouped = codes_BHTD.unflatten(-1, (scale_BHTG.shape[-1], -1))
            yield numerics.decode(grouped, Range(scale_BHTG.unsqueeze(-1), low_BHTG.unsqueeze(-1)), self.dtype).flatten(-2)

    def scores(self, query_BHQD: Tensor) -> Tensor:
        """Return the products of queries with all stored keys: ranges of tokens are taken out of the products.

        In float32: what is added for the least number of a range is large beside the sum.
        """
        if self._group is not None:
            return super().scores(query_BHQD)
        query = query_BHQD.float()
        parts, sum_BHQ1, found = query.chunk(8 // self._bits, dim=-1), query.sum(-1, keepdim=True), list[Tensor]()
        for start in range(0, self.length, PIECE):
            products_BHQT = self._products(parts, start)
            scale_BH1T, low_BH1T = (buffer.read(start, start + PIECE).mT.float() for buffer in (self._scale, self._low))
            found.append(torch.addcmul(sum_BHQ1 * low_BH1T, products_BHQT, scale_BH1T))
        return torch.cat(found, dim=-1).to(query_BHQD.dtype)

    def _products(self, parts: Sequence[Tensor], start: int) -> Tensor:
        """Products of runs of channels of queries with the codes of a piece."""
        runs = numerics.channel_runs(self._codes.read(start, start + PIECE), self._bits)
        return reduce(torch.add, (part @ run.to(part.dtype).mT for part, run in zip(parts, runs, strict=True)))

    def mixed(self, probability_BHQT: Tensor) -> Tensor:
        """Return the mixture of the stored values; each token's range is taken into its probability."""
        if self._group is not None:
            return super().mixed(probability_BHQT)
        total = torch.zeros((), device=probability_BHQT.device)
        for start in range(0, self.length, PIECE):
            here_BHQT = probability_BHQT[..., start : start + PIECE].float()
            scale_BH1T, low_BH1T = (buffer.read(start, start + PIECE).mT.float() for buffer in (self._scale, self._low))
            runs, weighted_BHQT = numerics.channel_runs(self._codes.read(start, start + PIECE), self._bits), here_BHQT * scale_BH1T
            values_BHQD = torch.cat([weighted_BHQT @ run.float() for run in runs], dim=-1)
            total = total + values_BHQD + (here_BHQT * low_BH1T).sum(-1, keepdim=True)
        return total.to(probability_BHQT.dtype)

    def crop(self, length: int) -> None:
        """Forget all but the first tokens."""
        for buffer in self.buffers:
            buffer.change(lambda x: x[:, :, :length])


class Fp8Store(Store):
    """float8_e4m3fn with a scale that is known before: one, or one for each head."""

    def __init__(self, scale: Tensor) -> None:
        self._scale = scale.reshape(-1, 1, 1)
        self._codes = Buffer()

    @property
    def length(self) -> int:
        """Tokens that are stored."""
        return self._codes.length

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The codes."""
        return (self._codes,)

    def append(self, x_BHTD: Tensor) -> None:
        """Round tokens and add them."""
        self.dtype = x_BHTD.dtype
        self._scale = self._scale.to(x_BHTD.device)
        self._codes.append(numerics.encode_fp8(x_BHTD, self._scale))

    def pieces(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the stored numbers from a token on."""
        for begin in range(start, self.length, PIECE):
            yield numerics.decode_fp8(self._codes.read(begin, begin + PIECE), self._scale, self.dtype)

    def scores(self, query_BHQD: Tensor) -> Tensor:
        """Return the products of queries with all stored keys; the scale goes into the queries."""
        found = []
        for start in range(0, self.length, PIECE):
            values_BHTD, factor = numerics.fp8_values(self._codes.read(start, start + PIECE))
            found.append((query_BHQD.float() * (self._scale * factor)) @ values_BHTD.float().mT)
        return torch.cat(found, dim=-1).to(query_BHQD.dtype)

    def mixed(self, probability_BHQT: Tensor) -> Tensor:
        """Return the mixture of the stored values, scaled at the end."""
        total = torch.zeros((), device=probability_BHQT.device)
        for start in range(0, self.length, PIECE):
            values_BHTD, factor = numerics.fp8_values(self._codes.read(start, start + PIECE))
            total = total + probability_BHQT[..., start : start + PIECE].float() @ values_BHTD.float() * factor
        return (total * self._scale).to(probability_BHQT.dtype)

    def crop(self, length: int) -> None:
        """Forget all but the first tokens."""
        self._codes.change(lambda x: x[:, :, :length])


class RecentStore(Store):
    """Another store with the latest tokens unquantized; `quantizes` says how many of so many leave for the store at a time."""

    def __init__(self, older: Store, quantizes: Callable[[int], int]) -> None:
        self._older, self._quantizes = older, quantizes
        self._recent = Buffer()

    @property
    def length(self) -> int:
        """Tokens that are stored."""
        return self._older.length + self._recent.length

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Both."""
        return *self._older.buffers, self._recent

    def append(self, x_BHTD: Tensor) -> None:
        """Add tokens, and quantize the oldest of those that are not."""
        self._recent.append(x_BHTD)
        if leaving := self._quantizes(self._recent.length):
            self._older.append(self._recent.read(end=leaving))
            self._recent.change(lambda x: x[:, :, leaving:].clone())

    def pieces(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the stored numbers from a token on."""
        if start < self._older.length:
            yield from self._older.pieces(start)
        if self._recent.length:
            yield self._recent.read(max(0, start - self._older.length))

    def crop(self, length: int) -> None:
        """Forget all but the first tokens; what is left of a run that ends in between stays as it was read."""
        if length >= self._older.length:
            self._recent.change(lambda x: x[:, :, : length - self._older.length])
            return
        whole = length // self._older.run * self._older.run
        left_BHTD = self._older.read(whole)[:, :, : length - whole]
        self._older.crop(whole)
        self._recent = Buffer()
        self._recent.append(left_BHTD)


class ChannelStore(_RangeStore):
    """Runs of `group` tokens: codes with a range for each run and channel. It takes whole runs only, so it is the older part of a store."""

    def __init__(self, bits: int, group: int) -> None:
        super().__init__(bits)
        self.run = group

    def append(self, x_BHTD: Tensor) -> None:
        """Quantize whole runs of tokens and add them."""
        self.dtype = x_BHTD.dtype
        codes, found = numerics.encode(x_BHTD.unflatten(2, (-1, self.run)), self._bits, dim=3)
        self._codes.append(numerics.pack_channels(codes.flatten(2, 3), self._bits))
        self._scale.append(found.scale.squeeze(3))
        self._low.append(found.low.squeeze(3))

    def pieces(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the stored numbers from a token on."""
        for first in range(start // self.run, self._scale.length, PIECE // self.run):
            last = min(first + PIECE // self.run, self._scale.length)
            begin, end = first * self.run, last * self.run
            codes_BHTD = numerics.unpack_channels(self._codes.read(begin, end), self._bits)
            found = Range(self._scale.read(first, last).unsqueeze(3), self._low.read(first, last).unsqueeze(3))
            values_BHTD = numerics.decode(codes_BHTD.unflatten(2, (-1, self.run)), found, self.dtype).flatten(2, 3)
            yield values_BHTD[:, :, max(0, start - begin) :]

    def crop(self, length: int) -> None:
        """Forget all but the first tokens, which are whole runs."""
        self._codes.change(lambda x: x[:, :, :length])
        for buffer in (self._scale, self._low):
            buffer.change(lambda x: x[:, :, : length // self.run])
