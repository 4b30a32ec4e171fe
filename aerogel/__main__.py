"""`python -m aerogel` is the command line, and so is the script `aerogel`; Ctrl-C while it starts is one line too."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)  # until a command runs, which says what is left of its work
    from aerogel.cli.commands import main as run

    try:
        run()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends


def _stop(number: int, frame: FrameType | None) -> None:
    """End at once: modules that are half imported cannot be gone on with."""
    os.write(2, b"error: interrupted; nothing was changed\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
