"""An output is written by one run at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import aerogel
from aerogel.errors import AerogelError
from aerogel.io.locks import locked
from tests.folders import model_folder

HOLDER = """
import sys, time
from pathlib import Path
from aerogel.io.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_run_is_refused_before_any_work(tmp_path: Path) -> None:
    model_folder(tmp_path / "model", num_hidden_layers=1)
    with locked(tmp_path / "out"), pytest.raises(AerogelError, match=r"another run is writing .*out; wait until it ends"):
        aerogel.compress(tmp_path / "model", "fp8-dynamic", output=tmp_path / "out", measures=(), resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    aerogel.compress(tmp_path / "model", "fp8-dynamic", output=tmp_path / "out", measures=())


def test_names_of_one_folder_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with locked(tmp_path / "out"):
        for name in (Path("out"), Path("link/out"), Path("./link/out")):
            with pytest.raises(AerogelError, match="another run"), locked(name):
                pass
        with locked(tmp_path / "other"):
            pass


def test_a_run_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(AerogelError, match="another run"), locked(tmp_path / "out"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with locked(tmp_path / "out"):
        pass
