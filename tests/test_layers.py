"""What import-linter cannot see: nothing inside the package imports the package itself, whose names lead up to the engine."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aerogel

ROOT = Path(aerogel.__file__).parent


def public_api_imports(path: Path) -> Iterator[str]:
    """The lines of a file that import `aerogel`, or a name of it that is no module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import) and any(name.name == "aerogel" for name in node.names):
            yield f"{path.relative_to(ROOT)}:{node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.module == "aerogel":
            modules = {found.stem for found in ROOT.iterdir()}
            if any(name.name not in modules for name in node.names):
                yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_a_method_loads_no_technique_but_its_own() -> None:
    program = "import sys, aerogel.methods.quantization.rtn; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert [name for name in loaded.split() if name.startswith("aerogel.runtime.")] == ["aerogel.runtime.policy_state"]


def test_only_the_commands_import_the_public_api() -> None:
    found = {line.partition("/")[0] for path in sorted(ROOT.rglob("*.py")) for line in public_api_imports(path)}
    assert found == {"cli"}
