"""The package's logger, and what the command line needs to speak on a terminal."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

logger = logging.getLogger("demucs_infer")


def bold(text: object) -> str:
    """`text` in bold where standard error is a terminal that shows it, else unchanged."""
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        return f"\033[1m{text}\033[0m"
    return str(text)


def fatal(*messages: object, status: int = 1) -> NoReturn:
    """Print `messages` as one error on standard error and exit with `status`."""
    print("demucs-infer: error:", *messages, file=sys.stderr)
    raise SystemExit(status)
