"""Ctrl-C in a command of the package: one line at any moment, also while it is being imported."""

import os
import signal
import sys
from types import FrameType

_said = "stopped"


def on_interrupt_say(text: str) -> None:
    """What Ctrl-C prints from now on, on one line."""
    global _said
    _said = text


def _stop(number: int, frame: FrameType | None) -> None:
    # No exception: extension modules that are being imported, and garbage collection, would turn
    # a KeyboardInterrupt into something else. What the commands write is whole at any moment.
    sys.stdout.flush()
    print(f"\n{_said}", file=sys.stderr, flush=True)
    os._exit(128 + number)


def start() -> None:
    """Ends this process with one line on Ctrl-C, from now on."""
    signal.signal(signal.SIGINT, _stop)
