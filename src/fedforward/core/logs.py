"""The package's loggers, where their lines go, and libraries kept quiet.

Whatever a run has to say is logged at INFO below the logger `fedforward`. Nothing is shown unless
a handler is attached (`shown`): the command line and a model server do so.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = logging.getLogger("fedforward")
PACKAGE.addHandler(logging.NullHandler())
#: What a run is doing just now. A terminal shows it in one line, in place of the phase before.
PHASES = logging.getLogger("fedforward.phase")


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


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice out of our output; imports transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Not ours to mend: PEFT asks transformers for an attribute that was renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
