"""The libraries under the models, kept from talking over the program that uses them.

The command line and a site's model server call this before they load a model. Importing this
module imports none of them.
"""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Import transformers and keep its bars and advice, and those of its companions, unseen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Not ours to mend: PEFT asks transformers for an attribute that was renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
