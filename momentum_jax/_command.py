"""Prints one line if a command is stopped by Ctrl-C, or if a package is missing.

This also holds while the command is being imported.
"""

import os
import signal
import sys
from types import FrameType, TracebackType

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


def _fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0]
    if missing in (False, "momentum_jax"):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {error}; pip install 'momentum_jax[study]'", file=sys.stderr)


def start() -> None:
    """Ends this process with one line on Ctrl-C and where a package is missing, from now on."""
    signal.signal(signal.SIGINT, _stop)
    sys.excepthook = _fail
