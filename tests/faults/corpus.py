"""The corpus: every damage of every kind of input, given to every command that takes it, and what may come of it.

A command refuses what is damaged, in one line that names it, or does what it does without the damage: then the damage does not matter to
it. Anything else is a fault.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

from tests.faults.damages import Damage, copied
from tests.faults.judged import Command, Ended, run
from tests.faults.kinds import Kind


class Case(NamedTuple):
    """A damage and a command."""

    kind: Kind
    damage: Damage
    command: Command

    def __str__(self) -> str:
        return f"{self.kind} / {self.command.name} / {self.damage}"


class Shelf:
    """Sound inputs in a folder, each made when it is first needed, and what commands find in them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = count()
        self.sound = cache(self._make)
        self.expected = cache(self._run_sound)

    def cases(self, kind: Kind, seeded: int) -> Iterator[Case]:
        """Yield all cases of a kind, with so many seeded damages of each JSON file."""
        for damage in kind.damages(self.sound(kind), seeded):
            yield from (Case(kind, damage, command) for command in kind.commands)

    def fault_of(self, case: Case) -> str | None:
        """Run a case; returns what is wrong with how it ended."""
        ended = self._run(case.kind, case.command, case.damage)
        if ended.fault is not None or case.damage.legal:
            return ended.fault
        if ended.code == 2:
            named = case.damage.is_named_in(ended.told) or ended.told == self.expected(case.kind, case.command).told
            return None if named else f"not named: {ended.told.strip()[-200:]}"
        if ended.meaning != self.expected(case.kind, case.command).meaning:
            return "silent: ended well, with something else than without the damage"
        return None

    def _make(self, kind: Kind) -> Path:
        folder = self._folder / kind.name
        folder.mkdir()
        kind.make(folder)
        return folder

    def _run_sound(self, kind: Kind, command: Command) -> Ended:
        """The command on the sound input, which it may refuse: such as to quantize what is quantized."""
        ended = self._run(kind, command, None)
        assert ended.fault is None, f"{kind} / {command.name}: {ended.told} {ended.fault}"
        return ended

    def _run(self, kind: Kind, command: Command, damage: Damage | None) -> Ended:
        place = self._folder / f"case-{next(self._number)}"
        place.mkdir()
        given = copied(self.sound(kind), place / "given")
        if damage is not None:
            damage.apply(given / damage.file)
        try:
            return run(command, given, place / "output", self.sound(kind))
        finally:
            shutil.rmtree(place)
