"""Modules that were compiled in place, by `block.compile()` or diffusers' `compile_repeated_blocks()`, and how others answer for them.

What torch.compile made of a module answers when it is called, and holds all that its forward did when it was traced. Who runs a module or
does not, as a whole, answers in front of that, where nothing is traced. Who decides inside of a module, such as on the modules of a block,
has the decisions traced too: a boolean each, set before the module is called, so that one graph is made for each pattern of booleans that
comes up (at most 2^decisions for all modules of a kind, times their shapes), and a graph holds nothing of what does not run. Whatever else
changes from step to step stays outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from aerogel.errors import AerogelError
from aerogel.model.hooks import COMPILED, compiled, patch_forward


def called(module: nn.Module) -> Callable[..., Any]:
    """Return the function that runs when the module is called."""
    return compiled(module) or module.forward


def compiled_around(denoiser: nn.Module, names: Iterable[str]) -> dict[nn.Module, list[str]]:
    """The outermost compiled modules that hold these parts or are one of them, with the full names of those.

    Raises AerogelError where the denoiser is compiled as a whole.
    """
    found: dict[nn.Module, list[str]] = {}
    for name in names:
        around = next((module for module in _way(denoiser, name) if compiled(module)), None)
        if around is denoiser:
            raise AerogelError(
                f"{type(denoiser).__name__} is compiled as a whole, so that its steps cannot be told apart from outside; compile its "
                "blocks one by one (compile_repeated_blocks() of diffusers, or block.compile() of each), then put the cache on"
            )
        if around is not None:
            found.setdefault(around, []).append(name)
    return found


@contextmanager
def patch_compiled(denoiser: nn.Module, answers: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let others answer for some modules of a denoiser for a while, in front of what was compiled of them; then all is as it was.

    Forwards raise AerogelError when one of them or what holds it was compiled meanwhile.
    """
    before = {module: call for module in answers if (call := compiled(module))}
    with ExitStack() as stack:
        written = {module: answer for module, answer in answers.items() if module not in before}
        stack.enter_context(patch_forward(written, traced=bool(before)))
        for module, call in before.items():
            stack.callback(module.__dict__.__setitem__, COMPILED, call)
            module.__dict__[COMPILED] = _Front(answers[module])
        stack.callback(denoiser.register_forward_pre_hook(_unless_compiled_since(denoiser, answers)).remove)
        yield


class _Front:
    """Answers in front of what was compiled."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer."""
        return self.answer(*args, **kwargs)


@contextmanager
def by_pattern(module: nn.Module, pattern: Sequence[bool]) -> Iterator[None]:
    """Let the module run the copy of its forward that is a pattern's own; a forward that somebody else put there stays."""
    own = module.forward
    if not isinstance(own, MethodType) or own.__self__ is not module:
        yield
        return
    # Torch keeps at most 8 graphs of one code (recompile_limit), which the patterns of three modules a block use up: each runs a copy.
    with patch_forward({module: MethodType(_copied(own.__func__, tuple(pattern)), module)}, traced=True):
        yield


@cache
def _copied(function: FunctionType, pattern: tuple[bool, ...]) -> FunctionType:
    """The same function with code of its own, once a pattern; torch's logs tell them apart by name."""
    name = function.__name__ + "_" + "".join("1" if on else "0" for on in pattern)
    copy = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _way(denoiser: nn.Module, name: str) -> list[nn.Module]:
    """The modules that a call goes through on its way to a part: the denoiser first, the part last."""
    parts = name.split(".")
    return [denoiser.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]


def _unless_compiled_since(denoiser: nn.Module, answers: Iterable[nn.Module]) -> Callable[..., None]:
    answering_now = set(answers)
    names = [name for name, module in denoiser.named_modules() if module in answering_now]
    before = {module: compiled(module) for name in names for module in _way(denoiser, name)}

    def check(*_: Any) -> None:
        if any(now is not before[module] and not isinstance(now, _Front) for module in before if (now := compiled(module))):
            raise AerogelError("blocks were compiled while a cache was on the denoiser: compile them first, then put the cache on")

    return check
