"""Guard of what keeps state during a forward: one thread runs a model at a time, and another that comes meanwhile gets an error."""

from __future__ import annotations

import sys
import threading
from types import FrameType

import torch
from torch import nn

from aerogel.errors import AerogelError


class ForwardGuard:
    """Held by the thread whose forward is under way; a copy is a guard that nobody holds.

    Hooks before a forward enter it, hooks after it (with `always_call`) leave it. What torch.compile traces keeps its state inside of one
    call and is not guarded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: threading.Thread | None = None

    def __reduce__(self) -> tuple[type[ForwardGuard], tuple[()]]:
        return ForwardGuard, ()

    def enter(self, module: nn.Module) -> None:
        """Begin a forward of this module; raises AerogelError while another thread is inside of one."""
        if torch.compiler.is_compiling():
            return
        me = threading.current_thread()
        with self._lock:
            if self._holder is not None and self._holder is not me and _is_inside(self._holder, module):
                raise AerogelError(
                    f"thread {me.name} calls {type(module).__name__} while thread {self._holder.name} runs it, and a runtime policy is on, "
                    "which serves one forward at a time: run them one after the other, or open the model once for each thread"
                )
            self._holder = me

    def leave(self) -> bool:
        """End the forward; returns False where this thread began none, such as when `enter` refused it."""
        if torch.compiler.is_compiling():
            return True
        with self._lock:
            if self._holder is not threading.current_thread():
                return False
            self._holder = None
            return True


def _is_inside(thread: threading.Thread, module: nn.Module) -> bool:
    """Return whether a thread runs this module; one whose forward was stopped half-way (Stop, Ctrl-C), with no hook after it, does not."""
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False
