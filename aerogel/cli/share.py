"""Commands that hand a compressed folder on: export to another format, push to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aerogel.cli import arguments as given
from aerogel.cli import completion
from aerogel.cli.app import command, start
from aerogel.cli.group import SHARE


@command(SHARE, "Convert a compressed folder to another format.")
def export(
    folder: given.Folder,
    format: Annotated[  # noqa: A002
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            autocompletion=completion.names("exporters"),
            help="Output format; see `aerogel list exporters`.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Output folder; must be new or empty.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FORMAT.OPTION=VALUE", help="Set an option of the format; may be repeated."),
    ] = None,
) -> None:
    """Convert a compressed folder to another format, without calibrating again."""
    start()
    from aerogel.engine import exporting

    exporting.export(folder, format, output, overrides or ())
    typer.echo(output)


@command(SHARE, "Push a compressed folder to the Hugging Face hub.")
def push(
    folder: given.Folder,
    name: given.HubName,
    public: Annotated[bool, typer.Option("--public", help="Make the model public; otherwise it is private.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Push a new commit to a repository that holds a model already.")] = False,
    quiet: given.Quiet = False,
) -> None:
    """Push a compressed folder to the Hugging Face hub, with a model card where it has none.

    The token is that of HF_TOKEN or of `hf auth login`.
    """
    push_folder(folder, name, public, overwrite, quiet=quiet)


def push_folder(folder: Path, name: str, public: bool, overwrite: bool = False, *, quiet: bool, said: bool = True) -> str:
    """Push a folder and print its address; returns the address."""
    from aerogel.cli import terminal
    from aerogel.engine import pushing

    with terminal.downloads(quiet):
        address = pushing.push(folder, name, public=public, overwrite=overwrite)
    if said:
        typer.echo(f"hub     {address}")
    return address
