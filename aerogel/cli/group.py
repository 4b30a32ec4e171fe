"""The group of commands and the help text: options in sections, errors of the user as one line and exit code 2."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from aerogel.cli.interrupts import interruptible
from aerogel.cli.launched import report
from aerogel.errors import AerogelError

FAILED = 2
"""Exit code of a command that could not be done."""
COMPRESS, MEASURE, SHARE, LOOK_UP = "Compress", "Measure", "Convert and share", "Look up"
"""Sections of the commands, in the order of the help."""
ARGUMENTS, RECIPE, MODEL, DATA, OUTPUT, OTHER = "Arguments", "Recipe", "Model", "Calibration data", "Output", "Options"
"""Sections of the options of a command, in the order of the help."""
_COMMANDS = (COMPRESS, MEASURE, SHARE, LOOK_UP)
_OPTIONS = (ARGUMENTS, RECIPE, MODEL, DATA, OUTPUT, OTHER)
_RANGE = re.compile(r"(; |\[)x>=\d+\]$")
"""The smallest number of an option, which the help leaves out: one out of range is refused with it."""


class Command(TyperCommand):
    """A command whose help has its options in sections."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line, required arguments without braces."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the options, section by section."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in _OPTIONS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and parameter.param_type_name == "argument":
                sections[ARGUMENTS].append((parameter.metavar or record[0], record[1]))
            elif record is not None:
                shown = _RANGE.sub(lambda found: "]" if found[1] == "; " else "", record[1])
                sections[getattr(parameter, "rich_help_panel", None) or OTHER].append((record[0], shown.rstrip()))
        _write(formatter, sections)


def _write(formatter: Any, sections: Mapping[str, list[tuple[str, str]]]) -> None:
    for title, rows in sections.items():
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)


class Group(TyperGroup):
    """The group of all commands."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error of the user becomes one line on standard error and exit code 2."""
        # Threads that spin long while they wait slow each other down on a busy machine, those that never spin are slow to wake on a
        # quiet one (4-bit decoding: 7 ms a token, 15 without spinning; measured). OpenMP reads this when torch is imported.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("default", module=r"aerogel(\.|$)")
                warnings.showwarning = _show_warning
                with interruptible(lambda: "nothing was changed"):
                    return super().invoke(ctx)
        except AerogelError as error:
            _fail(str(error))
        except OSError as error:
            reason = error.strerror or str(error)
            _fail(f"{error.filename}: {reason}" if error.filename else reason)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, section by section, then the options."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in _COMMANDS}
        for name, command in self.commands.items():
            sections[str(getattr(command, "rich_help_panel", None))].append((name, command.get_short_help_str(limit=100)))
        records = [record for parameter in self.get_params(ctx) if (record := parameter.get_help_record(ctx)) is not None]
        _write(formatter, {**sections, OTHER: records})


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def _fail(reason: str) -> None:
    report(f"error: {' '.join(reason.split())}")
    raise typer.Exit(FAILED)
