"""The one exception that a user is meant to read. Every module may raise it.

A message is one or two sentences: the key or file as the user typed it, what was found, what is
allowed, and what to do. The command line prints it and exits with code 2, without a traceback.
"""


class FedForwardError(Exception):
    """Bad input, or a run that cannot go on. The message is written for the user."""


class UpdateNotFiniteError(FedForwardError):
    """The reports of a round add up to more than can be written; nothing was."""


class MessageError(FedForwardError):
    """A message that is damaged, of another version, or not what was asked for."""


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on any device; PyTorch's allocators say so in words only."""
    words = str(error).lower()
    told = "out of memory" in words or "can't allocate memory" in words
    return isinstance(error, MemoryError) or told
