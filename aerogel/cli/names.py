"""Commands that look names up: list and show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aerogel import catalog
from aerogel.cli import completion
from aerogel.cli.app import command, print_json, start
from aerogel.cli.arguments import Kind
from aerogel.cli.group import LOOK_UP


@command(LOOK_UP, "List recipes, methods, families, exporters, measures or models.", "list")
def list_(
    kind: Annotated[Kind, typer.Argument(help="Kind to list.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON.")] = False,
) -> None:
    """List recipes, methods, families, exporters, measures or models, one per line."""
    from aerogel.cli import cards

    lines = cards.summaries(kind)
    if as_json:
        print_json(lines)
        return
    width = max(map(len, lines), default=0)
    for name, summary in lines.items():
        typer.echo(f"{name:<{width}}  {summary}".rstrip())


@command(LOOK_UP, "Show a method, recipe, family, exporter or measure, the structure of a model, or the recipe of a folder.")
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            autocompletion=completion.names(*catalog.KINDS),
            help="Name from `aerogel list`, a model (folder, hub id), or with --recipe a folder written by `aerogel compress`.",
            show_default=False,
        ),
    ],
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print the run that a folder records as a recipe file, with model, data and seed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON.")] = False,
) -> None:
    """Show a method, recipe, family, exporter or measure: description, paper, options with defaults, requirements.

    Of a model show its structure: blocks, edges, sets that engines load as one, experts, residual stream. No weight of a block is read.
    """
    if recipe:
        from aerogel.engine import requests
        from aerogel.io.record import files

        typer.echo(requests.recipe_file_of(files.read(name)), nl=False)
        return
    from aerogel.cli import cards

    if "/" in name or Path(name).is_dir() or name in cards.summaries(cards.MODELS):
        start()
        from aerogel.cli import structure
        from aerogel.engine import structure_file
        from aerogel.engine.opening import open_model
        from aerogel.engine.structure import structure_of

        network = open_model(name)
        before = network.origin is not None and structure_file.recall(network, network.origin, compressed=True)
        found = structure_of(network) | ({"found": "before it was compressed"} if before else {})
        print_json(found) if as_json else typer.echo(structure.as_text(found))
        return
    shown = cards.show(name)
    print_json(shown) if as_json else typer.echo("\n\n\n".join(map(cards.as_text, shown)))
