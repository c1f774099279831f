"""The package's loggers, and where their lines go.

Whatever a run has to say is logged at INFO below the logger `fedforward`. Nothing is shown unless
a handler is attached (`shown`): the command line and a model server do so.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = logging.getLogger("fedforward")
PACKAGE.addHandler(logging.NullHandler())
#: What a run is doing just now. A terminal shows it in one line, in place of the phase before.
PHASES = logging.getLogger("fedforward.phase")
#: Level of records that only say how far a phase is, as `done` of `total`, for a bar.
PROGRESS = 15


def tolerate_narrow_encodings() -> None:
    """Let this process print any text: what its output cannot encode becomes an escape.

    A terminal may be ASCII, and a file name may hold bytes that are no text.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def shown(handler: logging.Handler) -> Iterator[None]:
    """Hand every line of the package to a handler, from INFO on, while the block runs."""
    level = PACKAGE.level
    PACKAGE.addHandler(handler)
    PACKAGE.setLevel(logging.INFO)
    try:
        yield
    finally:
        PACKAGE.removeHandler(handler)
        PACKAGE.setLevel(level)
