"""Hooks that come off: watch what goes into modules while a forward runs, and stop it when enough was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

COMPILED = "_compiled_call_impl"
"""Attribute in which nn.Module keeps what `module.compile()` made of it."""


class Stop(BaseException):
    """Ends a forward early; not an Exception, so that no model code can swallow it by accident."""


@contextmanager
def until(stop: Stop) -> Iterator[None]:
    """End quietly when `stop` is raised inside; every other Stop is somebody else's and goes on."""
    try:
        yield
    except Stop as reached:
        if reached is not stop:
            raise
    finally:
        # A stop that somebody still holds would keep the frames it came through, with all their tensors, until the collector runs.
        stop.__traceback__ = None


@contextmanager
def temporary_hooks(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks afterwards, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_inputs(modules: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see(name, input)` with the first argument of every forward of these modules, before it runs."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    with temporary_hooks([module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in modules.items()]):
        yield


class OwnedHook:
    """A hook that says whose it is."""

    def __init__(self, owner: object, act: Callable[..., Any]) -> None:
        self.owner, self._act = owner, act

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Act."""
        return self._act(*args, **kwargs)


class CacheOnlyHook(OwnedHook):
    """A hook by which a forward of one position differs through the cache that it reads alone.

    A decoder that takes the cache over (inference/decoder.py) may leave it out.
    """


def changes_more_than_the_cache(module: nn.Module) -> bool:
    """Return True where something hangs on a module's forward that a decoder with a cache of its own may not leave out."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    forward = module.__dict__.get("forward")
    patched = forward is not None and not (isinstance(forward, _Patch) and forward.cache_only)
    return patched or any(not isinstance(hook, CacheOnlyHook) for hook in hooks)


class _Patch:
    """Stands for a module's forward while it is patched; whoever has wrapped it meanwhile gets the module's own afterwards."""

    def __init__(self, own: Callable[..., Any], answer: Callable[..., Any], cache_only: bool) -> None:
        self._own, self.answer, self.cache_only = own, answer, cache_only
        self.on = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer."""
        return self.answer(*args, **kwargs) if self.on else self._own(*args, **kwargs)


@contextmanager
def patch_forward(answers: Mapping[nn.Module, Callable[..., Any]], traced: bool = False, cache_only: bool = False) -> Iterator[None]:
    """Replace the forward of some modules for a while; the old one is back afterwards, whatever happens.

    Others may wrap a forward meanwhile, as accelerate does to offload weights: their wrapper stays, around the old forward. Not where the
    answers are `traced` by torch.compile, which makes more graphs of anything that stands in front of them. `cache_only` answers say of
    themselves what CacheOnlyHook says of hooks.
    """
    before = {module: module.__dict__.get("forward") for module in answers}
    patches: dict[nn.Module, Callable[..., Any]] = {
        module: answer if traced else _Patch(module.forward, answer, cache_only) for module, answer in answers.items()
    }
    try:
        for module, patch in patches.items():
            module.__dict__["forward"] = patch
        yield
    finally:
        for module, old in before.items():
            patch = patches[module]
            if isinstance(patch, _Patch):
                patch.on = False
                if module.__dict__.get("forward") is not patch:
                    continue  # somebody has wrapped it, or put the old one back
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


def patched(module: nn.Module) -> Callable[..., Any] | None:
    """Return what `patch_forward` has put in place of a module's forward; None where its own runs."""
    found: Callable[..., Any] | None = module.__dict__.get("forward")
    return found.answer if isinstance(found, _Patch) else found


def compiled(module: nn.Module) -> Callable[..., Any] | None:
    """Return what torch.compile made of the module, if it was compiled in place."""
    return module.__dict__.get(COMPILED)


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Run everything in a network as it is written for a while, such as to watch what happens inside of its blocks."""
    before = {module: call for module in network.modules() if (call := compiled(module))}
    for module in before:
        del module.__dict__[COMPILED]
    try:
        yield
    finally:
        for module, call in before.items():
            module.__dict__[COMPILED] = call
