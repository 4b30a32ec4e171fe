"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from aerogel import catalog
from aerogel.kernels import selection, synchronized_clock
from tests import discovery, simulated_device
from tests.clocks import Counter
from tests.registration import registrations_undone

simulated_device.device()  # autograd counts devices at the first backward of a process, whichever test that is in
_MEASURED = selection.fastest


def _reference(key: object, implementations: Callable[[], selection.Implementations], device: object) -> str:
    return list(implementations())[-1]


@pytest.fixture(scope="session", autouse=True)
def no_measured_time() -> Iterator[None]:
    """Every kernel is the reference, and each reading of the clock is a second after the one before: no test depends on real time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "fastest", _reference)
        patch.setattr(synchronized_clock, "host_clock", Counter())
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Files are not forced to the disk: tests kill processes, but do not cut the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def discovery_once() -> Iterator[None]:
    """The structure of an architecture is discovered once; tests of discovery itself do without this."""
    with pytest.MonkeyPatch.context() as patch:
        discovery.remember(patch)
        yield


@pytest.fixture(autouse=True)
def libraries_as_they_are() -> Iterator[None]:
    """What a test registers with transformers and diffusers is taken out after it: no test depends on those before it."""
    with registrations_undone():
        yield


@pytest.fixture
def kernels_by_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are chosen by the clock as outside of tests; nothing is remembered from another test."""
    monkeypatch.setattr(selection, "fastest", _MEASURED)
    selection.forget()
    yield
    selection.forget()


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package of a third party, announced by an entry point; put files into its folders."""
    root = tmp_path / "site" / "thirdparty"
    for folder in (root, root / "methods", root / "recipes"):
        folder.mkdir(parents=True)
    for package in (root, root / "methods"):
        (package / "__init__.py").write_text("")
    entry = EntryPoint("mine", "thirdparty", catalog.PLUGINS)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] if group == catalog.PLUGINS else [])
    monkeypatch.syspath_prepend(root.parent)
    _forget()
    yield root
    _forget()


def _forget() -> None:
    catalog.clear_cache()
    for module in [name for name in sys.modules if name.partition(".")[0] == "thirdparty"]:
        del sys.modules[module]
