"""What reaches the two streams: results on stdout, everything else on stderr; neither a closed pipe
nor a full disk is a traceback."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rqtool.errors import StorageError, escaped

HELP_WIDTH = 100


def open_streams() -> None:
    """Both streams can be written: a closed one leads nowhere, and names that its encoding cannot
    hold are written out."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def on_terminal(stream: TextIO) -> bool:
    """Whether a person watches, on a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def terminal_width() -> int | None:
    """Columns of the terminal on stdout (or what COLUMNS says); None for a file or pipe."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size().columns
    return None


def help_width() -> int:
    return min(HELP_WIDTH, terminal_width() or HELP_WIDTH)


def write_result(text: str) -> None:
    """Print on stdout. A reader that went away is no error; raises StorageError where the output
    cannot be written."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
    except OSError as e:
        silence_stdout()
        raise StorageError(
            f"the output cannot be written ({escaped(e.strerror)}); free the place it goes to"
        ) from e


@contextmanager
def results_only() -> Iterator[None]:
    """Keep stdout for results: what other code prints meanwhile, in Python or below it, goes to
    stderr."""
    out = sys.stdout
    out.flush()
    kept = _redirected(out)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = out
        if kept is not None:
            _flush_c()
            os.dup2(kept, out.fileno())
            os.close(kept)


def _redirected(out: TextIO) -> int | None:
    """Let the file descriptor of stdout lead to stderr; a copy of what it was. None where a stream
    has none (in tests)."""
    try:
        kept = os.dup(out.fileno())
    except (OSError, ValueError, AttributeError):
        return None
    try:
        os.dup2(sys.stderr.fileno(), out.fileno())
    except (OSError, ValueError, AttributeError):
        os.close(kept)
        return None
    return kept


def _flush_c() -> None:
    """Write out what C code has printed into its own buffer."""
    try:
        ctypes.CDLL(None).fflush(None)
    except (OSError, AttributeError, TypeError):  # no such library to be asked
        pass


def silence_stdout() -> None:
    """Send what is still in the buffer nowhere, so that the interpreter does not complain when it
    ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """One line on stderr; the work goes on where nobody can read it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass
