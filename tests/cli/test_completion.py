"""Shell completion: names from the folders of the package, without importing what takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import aerogel
from aerogel.cli import commands as cli
from aerogel.cli import completion
from aerogel.numerics.scheme import Scheme

SCRIPT = """
import sys
from aerogel.cli.commands import app
try:
    app(prog_name="aerogel")
finally:
    print("heavy:", *sorted({"torch", "transformers", "diffusers", "numpy", "safetensors"} & sys.modules.keys()))
"""


def completed(line: str) -> list[str]:
    """What a shell is told when the tab key is pressed behind this line."""
    shell = {"_AEROGEL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=os.environ | shell).stdout
    *words, heavy = said.splitlines()
    assert heavy == "heavy:", "what is completed must be there at once"
    return words


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("aerogel comp", ["compress"]),
        ("aerogel compress model --recipe rtn", ["rtn-w4a16", "rtn-w8a8"]),
        ("aerogel export out --format gg", ["gguf"]),
        ("aerogel evaluate out --measure perp", ["perplexity"]),
        ("aerogel show smoothq", ["smoothquant", "smoothquant-w8a8"]),
        ("aerogel plan model --scheme NV", ["NVFP4A16"]),
        ("aerogel plan model --set gpt", ["gptq."]),
    ],
)
def test_names_are_completed_without_importing_them(line: str, expected: list[str]) -> None:
    assert completed(line) == expected


def test_completed_schemes_exist() -> None:
    assert [str(Scheme.parse(name)) for name in completion.SCHEMES] == list(completion.SCHEMES)


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"aerogel {aerogel.__version__}\n")


def test_options_are_in_sections() -> None:
    help_text = CliRunner().invoke(cli.app, ["compress", "--help"]).stdout
    titles = [line for line in help_text.splitlines() if line and not line.startswith(" ") and line.endswith(":")]
    assert titles == ["Arguments:", "Recipe:", "Model:", "Calibration data:", "Output:", "Options:"]
    groups = CliRunner().invoke(cli.app, ["--help"]).stdout
    titles = [line for line in groups.splitlines() if line and not line.startswith(" ") and line.endswith(":")]
    assert titles == ["Compress:", "Measure:", "Convert and share:", "Look up:", "Options:"]
