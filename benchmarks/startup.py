"""How long `aerogel --help` and `import aerogel` take, as whole processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from results import write

RUNS = 9
COMMANDS = {
    "aerogel --help": [str(Path(sys.executable).with_name("aerogel")), "--help"],
    "aerogel list methods": [str(Path(sys.executable).with_name("aerogel")), "list", "methods"],
    "python -c 'import aerogel'": [sys.executable, "-c", "import aerogel"],
    "python -c 'pass'": [sys.executable, "-c", "pass"],
}


def seconds(command: list[str]) -> float:
    """Wall-clock of one run."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Time the commands in turn, so that all of them see the same machine."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS + 1):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    rows = [[f"`{name}`", *(f(values[1:]) for f in (min, statistics.median, max))] for name, values in taken.items()]
    write("startup", "Start-up time", {"runs": RUNS}, ["command", "min s", "median s", "max s"], rows, ["Target: under 0.5 s."])


if __name__ == "__main__":
    main()
