"""Environments of other releases and engines, each built once: what cannot be installed beside this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"


def python_of(name: str, *packages: str, bare: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Path:
    """Return the interpreter of an environment under .envs with these packages, and without those that they brought.

    `bare` are installed without the dependencies that they name.
    """
    folder = ROOT / ".envs" / name
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", TORCH, *packages], check=True)
        if bare:
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *bare], check=True)
        if without:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *without], check=True)
        ready.touch()
    return python


def run(python: Path, *arguments: object, timeout: int = 600, **variables: str) -> str:
    """Run a command of an environment and return what it printed; raises AssertionError with its last lines where it fails."""
    environment = {**os.environ, **variables}
    done = subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout
