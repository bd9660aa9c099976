"""Log records as ``key=value`` lines on standard error."""

from __future__ import annotations

import logging
import sys

__all__ = ["configure"]


class _Stderr(logging.Handler):
    """Writes to the standard error of the moment: a live table puts its own in place while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):
            self.handleError(record)


class _KeyValue(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        line = f"time={record.created:.3f} level={level} logger={record.name} {record.getMessage()}"
        if record.exc_info:
            # One record stays one line, so that tools can split the log.
            line += f" trace={self.formatException(record.exc_info)!r}"
        return line


def configure(verbose: int) -> None:
    """Send the records of vq to standard error.

    Parameters
    ----------
    verbose
        0: warnings; 1: connections as well; 2 and more: each message.
    """
    handler = _Stderr()
    handler.setFormatter(_KeyValue())
    logger = logging.getLogger("vq")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))
