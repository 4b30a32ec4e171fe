"""Speed of prefill and decoding of language models, side by side in one process."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from aerogel.errors import AerogelError
from aerogel.evaluate.measure import positions
from aerogel.evaluate.timing import Facts, Timed, peak_memory, take_turns
from aerogel.inference.generate import Generation, Generator
from aerogel.model.network import Network
from aerogel.options import Batch, Count, Threads


@dataclass(frozen=True)
class Speed(Timed):
    """Prefill and decoding speed and the time to the first token, wall-clock, and peak memory.

    Networks take turns round after round (A B A B), so that a busy machine slows all of them alike; figures are medians, and speed-ups are
    medians of the ratios within a round. Both sides run through the same generation path (model/generate.py).
    """

    modalities: ClassVar[frozenset[str]] = frozenset({"text"})

    batch: Batch = 1
    """Prompts at once."""
    prompt: Count = 512
    """Tokens of a prompt."""
    new_tokens: Count = 32
    """Tokens written after each prompt."""
    rounds: Count = 3
    """Timed rounds of each model, after two that warm up."""
    threads: Threads | None = None
    """Threads that torch may use; all it has when None."""

    def compare(self, networks: dict[str, Network]) -> Facts:
        """Return for each name tokens per second, median latencies (in the unit of their name), peak memory and the settings.

        `prefill_speedup`, `first_token_speedup` and `decode_speedup` are over the first network. Peak memory is the network's weights
        and the most that other tensors took while it ran. Raises AerogelError for a network that writes no text, or when prompt and new
        tokens do not fit it.
        """
        if min(self.batch, self.prompt, self.rounds) < 1 or self.new_tokens < 2:
            raise AerogelError(
                f"batch {self.batch}, prompt {self.prompt}, rounds {self.rounds}, new_tokens {self.new_tokens}: "
                "at least 1, 1, 1 and 2 are expected"
            )
        return take_turns(lambda name, network: _Runner(name, network, self), networks, self.rounds, self.threads)


class _Runner:
    """One network's turns."""

    def __init__(self, name: str, network: Network, options: Speed) -> None:
        limit = positions(network)
        if limit is not None and options.prompt + options.new_tokens > limit:
            raise AerogelError(
                f"{name} has {limit} positions; a prompt of {options.prompt} and {options.new_tokens} new tokens do not fit, ask for fewer"
            )
        self.network, self.options = network, options
        self.turns: list[Generation] = []
        self.peak_bytes = 0
        self.generator = self._fresh()
        vocabulary = network.config.get_text_config().vocab_size
        make = torch.Generator().manual_seed(0)
        self.tokens_BT = network.placement.bring(torch.randint(vocabulary, (options.batch, options.prompt), generator=make))

    def warm(self) -> None:
        """The turn in which kernels are chosen and weights packed; memory grows to its peak here."""
        self.peak_bytes = peak_memory(self.network, lambda: self._generate(self._fresh()), lambda: self._generate(self.generator))

    def turn(self) -> None:
        """One turn that counts."""
        self.turns.append(self._generate(self.generator))

    def facts(self, first: _Runner) -> dict[str, Any]:
        """Summarize the rounds."""
        options, last = self.options, self.turns[-1]
        prefill, decode = statistics.median(self._prefills()), statistics.median(self._steps())
        return {
            "prefill_tokens_per_second": options.batch * options.prompt / prefill,
            "decode_tokens_per_second": options.batch / decode,
            "prefill_seconds": prefill,
            "first_token_seconds": statistics.median(self._first_tokens()),
            "decode_milliseconds": 1000 * decode,
            "prefill_speedup": statistics.median(a / b for a, b in zip(first._prefills(), self._prefills(), strict=True)),
            "first_token_speedup": statistics.median(a / b for a, b in zip(first._first_tokens(), self._first_tokens(), strict=True)),
            "decode_speedup": statistics.median(a / b for a, b in zip(first._steps(), self._steps(), strict=True)),
            "peak_memory_bytes": self.peak_bytes,
            "batch": options.batch,
            "prompt": options.prompt,
            "new_tokens": options.new_tokens,
            "rounds": options.rounds,
            "threads": torch.get_num_threads(),
            "device": str(self.network.device),
            "path": last.path,
            "reason": last.reason,
        }

    def _fresh(self) -> Generator:
        """A generator that has packed nothing yet."""
        return Generator(self.network, self.options.batch, self.options.prompt + self.options.new_tokens)

    def _generate(self, generator: Generator) -> Generation:
        return generator.generate(self.tokens_BT, self.options.new_tokens)

    def _prefills(self) -> list[float]:
        return [turn.prefill_seconds for turn in self.turns]

    def _first_tokens(self) -> list[float]:
        return [turn.first_token_seconds for turn in self.turns]

    def _steps(self) -> list[float]:
        """The median step of each turn, in seconds."""
        return [statistics.median(turn.step_seconds) for turn in self.turns]
