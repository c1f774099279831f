"""Errors of the operating system that may pass, as when no more files can be opened.

Who looks around again and again notes such an error and tries again the next time. Imports nothing
of the package.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class TransientErrors:
    """Notes each error once, until what it was about has worked again."""

    def __init__(self, note: Callable[[str], object]) -> None:
        """`note` is told a sentence."""
        self._note = note
        self._noted: dict[str, str] = {}

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Do something that may fail; it is tried again by whoever calls.

        Args:
            what: is looked at or written, for people.
        """
        try:
            yield
        except OSError as error:
            words = f"{what}: {error.strerror or error}; it is tried again"
            if self._noted.get(what) != words:
                self._noted[what] = words
                self._note(words)
        else:
            self._noted.pop(what, None)
