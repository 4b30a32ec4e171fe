"""What is written is what the oldest and the newest release of compressed-tensors read, and what these write is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.environments import ROOT, run

TESTS = ["numerics/test_packing.py", "layers/test_linear.py", "io/test_quantized.py", "io/test_packed_words.py", "io/test_save.py"]


@pytest.mark.engine
@pytest.mark.parametrize("release", ["==0.17.1", ""], ids=["oldest", "newest"])
def test_its_tests_pass_with_a_release(release: str, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site"]
    subprocess.run([*install, f"compressed-tensors{release}"], check=True)
    tests = [ROOT / "tests" / name for name in TESTS]
    path = f"{tmp_path / 'site'}:{ROOT}"
    printed = run(Path(sys.executable), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ROOT, *tests, PYTHONPATH=path)
    assert " passed" in printed
    assert "failed" not in printed
