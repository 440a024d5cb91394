"""What a forked child of a test does: work with its own streams, and an end that runs nothing of pytest."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def end_with(work: Callable[[], None]) -> NoReturn:
    """Do the work and end this process with its exit code; what went wrong is printed."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # `os._exit` would swallow it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def log_to_stderr() -> None:
    """Let loggers write where this process does: they keep the stream of their import, and pytest adds its own."""
    for logger in (logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))):
        logger.handlers = [one for one in logger.handlers if not type(one).__module__.startswith("_pytest")]
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler):
                vars(handler)["stream"] = sys.stderr  # `setStream` would flush the old one, which may be closed
