"""The terms of the field are used in the docs, the command line and the error texts; private words do not come back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from aerogel.cli.commands import app

ROOT = Path(__file__).resolve().parents[1]

PRIVATE = {
    r"houses?": "project, package",
    r"floors?": "layer, baseline",
    r"rooms?": "module, folder",
    r"faces?": "public API",
    r"lives": "is in",
    r"bears?": "has, defines",
    r"mend(s|ed|ing)?": "fix",
    r"doomed|bad days": "crashing",
    r"giv(e|es|ing|en) again|gave again": "return the cached output",
    r"rest(s|ed|ing)?": "skipped; other, remaining",
    r"slots?": "cache entry",
    r"units?": "cached module",
    r"stretch(es)?": "block range",
    r"mixtures?": "MoE model",
    r"(dropped|skipped|all|of the) pairs|pairs? (of token|skipped|dropped|left)": "token-expert assignment",
    r"lost": "dropped",
    r"spared?": "skipped",
    r"(do|does|doing|did) without": "skip",
    r"marks? of (a|the) chat|chat marks?": "special tokens",
    r"pictures?": "image",
    r"paint(s|ed|ing)?": "generate",
    r"networks?": "model, denoiser",
    r"knobs?": "option",
    r"in codes": "quantized",
    r"codes": "quantized values, integer codes",
    r"(kept|left|leaves?|keeps?) in float": "not quantized",
    r"linears": "linear layers",
    r"second moments?": "Hessian",
    r"has no factor|no factor then": "is not positive definite",
    r"mean of its diagonal": "percdamp",
    r"replies": "answers, exact_match",
    r"realism": "image_quality",
    r"sense of time": "temporal features",
    r"lean": "fast decoder",
    r"lockstep": "synchronized",
    r"go(es)? on with|went on with": "resume, continue",
    r"(was|were) begun": "was started",
    r"the operating system": "the file and the reason",
    r"rivals?": "baseline",
    r"twins?": "fast implementation",
    r"`(evenly|lower_k|refined|time_table|operands)`": "the new name of the method",
}

ALLOWED = {
    r"\b(the|for the) rest\b(?= of)": "ordinary English",
    r"integer codes": "the term of the field",
    r"(source|error|exit) codes": "other codes",
    r"in units of": "a unit of measure",
    r"shapes, units": "a unit of measure",
    r"nats lost": "a loss",
    r"perceptual\[NETWORK, unlearned\]": "the name of a metric",
    r"`linears`": "a key of a saved file",
    r"(feature|neural) networks?": "the network of a Fréchet distance",
    r"\bnetwork\b(?= (access|connection))": "a computer network",
    r"`(BlockMethod|Method|RuntimePolicy)`.*|\w+\(network, \w+\)|`network\.\w+.*?`": "an interface in code",
    r"mixture-of-experts|mixtures?[ -]of[ -]experts": "the long form of MoE",
    r"mixtral": "a model",
    r"(?i)hugging ?face": "a company",
}


def offences(text: str) -> list[str]:
    """Return each private word of a text with what to say instead."""
    for pattern in ALLOWED:
        text = re.sub(pattern, " ", text, flags=re.IGNORECASE)
    found = []
    for pattern, better in PRIVATE.items():
        for match in re.finditer(rf"(?<![\w.-])(?:{pattern})(?![\w-])", text, re.IGNORECASE):
            line = text[max(0, match.start() - 40) : match.end() + 40].replace("\n", " ")
            found.append(f"{match[0]!r} (say: {better}) in ...{line}...")
    return found


def prose(page: Path) -> str:
    """Return the text of a page without its code, formulas and references."""
    text = page.read_text("utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "", text, flags=re.DOTALL)
    return re.sub(r"^- [^\n]*\*[A-ZΔ][^\n]*", "", text, flags=re.MULTILINE)


PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_use_the_terms_of_the_field(page: Path) -> None:
    assert offences(prose(page)) == []


def commands() -> Iterator[tuple[str, str]]:
    group: Any = typer.main.get_command(app)
    yield "aerogel", group.get_help(group.make_context("aerogel", [], resilient_parsing=True))
    for name, command in group.commands.items():
        yield name, command.get_help(command.make_context(name, [], resilient_parsing=True))


@pytest.mark.parametrize(("name", "text"), [pytest.param(*each, id=each[0]) for each in commands()])
def test_help_uses_the_terms_of_the_field(name: str, text: str) -> None:
    assert offences(" ".join(text.split())) == []


def messages(path: Path) -> Iterator[str]:
    """Yield every literal of a file that has words, docstrings aside: errors, also those that are put together, and what is printed."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings and " " in node.value:
            yield node.value


def test_messages_use_the_terms_of_the_field() -> None:
    files = sorted({*(ROOT / "aerogel").rglob("*.py")} - {ROOT / "aerogel/io/older.py"})  # which has the names of then
    found = [f"{path.relative_to(ROOT)}: {offence}" for path in files for text in messages(path) for offence in offences(text)]
    assert found == []


def test_recipes_use_the_terms_of_the_field() -> None:
    found = [
        f"{path.name}: {offence}"
        for path in sorted((ROOT / "aerogel" / "recipes").glob("*.yaml"))
        for offence in offences(path.read_text("utf-8"))
    ]
    assert found == []


def test_the_check_sees_private_words() -> None:
    assert len(offences("The network lives in a house whose slots are painted in codes.")) == 6 + 1  # "codes" counts twice
    assert offences("Hugging Face models, integer codes, the rest of the layers, mixture-of-experts") == []
