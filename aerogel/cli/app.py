"""The application that commands register with, and what all of them do: start the libraries, print JSON."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

import aerogel
from aerogel.cli.group import Command, Group
from aerogel.cli.launched import in_processes
from aerogel.errors import AerogelError

# Without rich markup: it would take a default in brackets, such as [sotu], for a style and drop it from the help text.
app = typer.Typer(
    cls=Group,
    help=aerogel.__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)


def command(section: str, summary: str, name: str | None = None) -> Any:
    """Return a decorator that registers a function as a command, in a section of the help with a one-line summary."""
    return app.command(name, cls=Command, rich_help_panel=section, short_help=summary)


def start(threads: int | None = None, in_several: bool = False) -> None:
    """Prepare the libraries for a command: number of threads, no log output of transformers, diffusers and the hub.

    Raises AerogelError where torchrun started several processes for a command that does not run `in_several`.
    """
    if in_processes() and not in_several:
        raise AerogelError("torchrun started several processes, but only `aerogel compress` and `plan` run in several; leave it out")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")  # read when it is imported, which is where a pipeline is opened
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)


def print_json(content: Any) -> None:
    """Print plain data as JSON on standard output."""
    typer.echo(json.dumps(content, indent=2, default=str))


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"aerogel {aerogel.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Take the options that stand before a command."""
