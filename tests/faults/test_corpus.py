"""Damaged input ends every command with one line and exit code 2, or does not matter to it: the corpus over all kinds and commands.

The usual tests run a seeded part of it; `make fuzz` and `make test-all` run all.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from aerogel import catalog
from aerogel.engine.search.searching import TASKS
from tests.faults import inputs, kinds
from tests.faults.corpus import Case, Shelf
from tests.faults.inputs import Option
from tests.faults.judged import COMMANDS, run_words
from tests.faults.kinds import Kind

KINDS = (*kinds.KINDS, *inputs.KINDS)
SEEDED = 12
"""Seeded damages of each JSON file in the whole corpus."""
FEW, FEW_OPTIONS = 2, 250
"""Cases of each kind, and words of options, in the usual tests."""
_TRACED = ("graph",)
"""Kinds of which every run traces a network, which takes 10 seconds."""
_FILES = ("recipe", "data text.jsonl", "data text.txt.gz", "data chat.json")
USUAL = tuple(kind for kind in KINDS if kind.name in _FILES or (kind in kinds.KINDS and kind.name not in _TRACED))
ANY_WORD = {(command, "--output") for command in ("compress", "export", "report", "search")}
"""Options that take any word."""
NUMBERS = {"--seed": "0", "--guidance": "0"}
"""Options for which one of the numbers is sound."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("faults"))


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """Commands set torch's threads; tests leave them as they were."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def faults(shelf: Shelf, cases: Iterable[Case]) -> list[str]:
    return [f"{case}: {fault}" for case in cases if (fault := shelf.fault_of(case))]


@pytest.mark.parametrize("kind", USUAL, ids=str)
def test_some_damages_of_every_kind_of_input(kind: Kind, shelf: Shelf) -> None:
    cases = list(shelf.cases(kind, 2))
    assert not faults(shelf, random.Random(kind.name).sample(cases, FEW))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_damages_of_every_kind_of_input(kind: Kind, shelf: Shelf) -> None:
    assert not faults(shelf, shelf.cases(kind, SEEDED))


def test_every_command_is_in_the_corpus() -> None:
    taken = {command.name.split()[0] for kind in KINDS for command in kind.commands}
    assert taken | {"list"} == set(COMMANDS.commands), "list takes no input but its word"
    formats = {command.name.split()[1] for kind in KINDS for command in kind.commands if command.name.startswith("export ")}
    assert formats == set(catalog.names("exporters"))
    words = {word for kind in KINDS for command in kind.commands for word in command.words(Path("in"), Path("out"))}
    assert set(TASKS) - {"cache"} <= words, "cache is the task where none is named"


def wrong(option: Option, given: Path) -> str | None:
    """What is wrong with how a command with this word ended."""
    ended = run_words(inputs.words_with(option, given))
    if ended.fault is not None:
        return f"{option}: {ended.fault}"
    sound = (option.command, option.name) in ANY_WORD or NUMBERS.get(option.name) == option.value
    return None if sound or ended.code == 2 else f"{option}: silent: taken"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    inputs.make_for_options(folder)
    return folder


def test_some_words_for_every_option(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = [option for option in inputs.options() if (option.command, option.name) not in ANY_WORD]
    assert not list(filter(None, (wrong(option, given) for option in random.Random(0).sample(refused, FEW_OPTIONS))))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.commands)
def test_all_words_for_every_option(command: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for number, option in enumerate(option for option in inputs.options() if option.command == command):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        found.append(wrong(option, given))
    assert not list(filter(None, found))
