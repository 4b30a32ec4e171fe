"""Clocks for tests: no test reads a real one."""

from __future__ import annotations

from typing import Any

import torch

from aerogel.model.network import Network
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of


class Counter:
    """A clock that moves by `step` seconds each time it is read."""

    def __init__(self, step: float = 1.0) -> None:
        self.step, self.seconds = step, 0.0

    def __call__(self) -> float:
        self.seconds += self.step
        return self.seconds


class Manual:
    """A clock that moves only when a test moves it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Ticks(Manual):
    """A clock that a denoiser moves: by one second at each forward, and by one for each cached module that runs in it."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        network.module.register_forward_pre_hook(self.tick)
        for name in cached_modules_of(network):
            self.count(network.module.get_submodule(name))

    def tick(self, *_: Any) -> None:
        """Move on by a second."""
        self.seconds += 1

    def count(self, module: torch.nn.Module) -> None:
        """Move on by a second whenever `module` computes."""
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return own(*args, **kwargs)

        module.forward = forward  # type: ignore[method-assign]
