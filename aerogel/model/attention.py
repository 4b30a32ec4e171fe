"""The attentions of a network: the modules whose own code calls scaled_dot_product_attention, and how to answer in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from aerogel.model.calls import Call
from aerogel.model.hooks import answering
from aerogel.model.network import Network

Attend = Callable[..., Tensor]
"""A function with the arguments of scaled_dot_product_attention."""


class _Answer(TorchFunctionMode):
    """Lets every scaled_dot_product_attention be answered by somebody else."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (self._attend if func is scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def attentions(network: Network, call: Call) -> tuple[str, ...]:
    """Return the full names of the modules that call scaled_dot_product_attention themselves, in the order of a forward of `call`."""
    running: list[str] = []
    found: dict[str, None] = {}

    def seen(*args: Any, **kwargs: Any) -> Tensor:
        found[running[-1]] = None
        return scaled_dot_product_attention(*args, **kwargs)

    with ExitStack() as stack:
        for name, module in network.module.named_modules():
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)).remove)
            stack.callback(module.register_forward_hook(lambda *_: _left(running), always_call=True).remove)
        with _Answer(seen):
            network.run(call)
    return tuple(found)


@contextmanager
def attending(network: Network, names: Iterable[str], attend: Callable[[str], Attend]) -> Iterator[None]:
    """Let `attend(name)` answer the attention of each named module for a while, also where a block is run by itself."""
    modules = {name: network.module.get_submodule(name) for name in names}
    with answering({module: partial(_forward, module.forward, attend(name)) for name, module in modules.items()}):
        yield


def _forward(own: Callable[..., Any], attend: Attend, *args: Any, **kwargs: Any) -> Any:
    with _Answer(attend):
        return own(*args, **kwargs)


def _left(running: list[str]) -> None:
    running.pop()  # nothing is returned: a hook's answer would take the output's place
