"""The paths of a configuration: kept absolute, and found again from any folder.

A relative path in a configuration file is relative to the folder that the command is started in.
What a run keeps is absolute (`absolute`). Hub names stay as they are.
"""

import logging
import os
from pathlib import Path

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import absolute_text, exists, is_path

LOGGER = logging.getLogger("fedforward.config.paths")
#: Keys whose value is a path or a hub name. What lies there is compared by digests, not by path.
PATH_KEYS = (
    "model.path",
    "model.adapter",
    "lora.init_file",
    "data.source",
    "data.public",
    "method.mask_file",
    "data.chat_template",
    "evaluation.source",
)


def absolute(config: Config) -> Config:
    """The configuration with all its paths absolute, from the folder of this process."""
    texts = {key: [absolute_text(text) for text in found] for key, found in _paths(config).items()}
    return _with_paths(config, texts)


def as_started(config: Config, started: Config) -> Config:
    """The configuration of a run that is resumed, perhaps from another folder.

    A relative path that leads nowhere from here means what it meant when the run was started.

    Args:
        config: as it is given now.
        started: the run's own.

    Raises:
        FedForwardError: what the run was started with is gone.
    """
    kept = _paths(started)
    changed: dict[str, list[str]] = {}
    for key, texts in _paths(config).items():
        changed[key] = list(texts)
        for n, (text, place) in enumerate(zip(texts, kept.get(key, []), strict=False)):
            if exists(text) or not is_path(place) or not _means(text, place):
                continue
            if not exists(place):
                option = "--model FOLDER" if key == "model.path" else f"{key}=PATH"
                raise FedForwardError(
                    f"{key} = {text!r}: the run was started with {place}, which is not there any "
                    f"more. Say where it is now with {option}."
                )
            LOGGER.warning("%s = %r is %s, as when the run was started", key, text, place)
            changed[key][n] = place
    # The default may have been another one then.
    return _with_paths(config.with_objective(started.objective), changed)


def _means(text: str, place: str) -> bool:
    """Whether a path, as it was typed, can be an absolute one seen from another folder."""
    if absolute_text(text) == place:
        return True
    if Path(text).is_absolute() or text.startswith("~"):
        return False
    parts = [part for part in Path(os.path.normpath(text)).parts if part != os.pardir]
    return bool(parts) and Path(place).parts[-len(parts) :] == tuple(parts)


def _paths(config: Config) -> dict[str, list[str]]:
    """The texts of `PATH_KEYS` by key, one or more; keys without one are left out."""
    found = {}
    for key in PATH_KEYS:
        value = _value(config, key)
        if value is not None:
            found[key] = [value] if isinstance(value, str) else list(value)
    return found


def _value(config: Config, key: str) -> str | list[str] | None:
    section, _, name = key.partition(".")
    value: str | list[str] | None = getattr(getattr(config, section), name, None)
    return value


def _with_paths(config: Config, texts: dict[str, list[str]]) -> Config:
    for key, found in texts.items():
        section, _, name = key.partition(".")
        value = found if isinstance(_value(config, key), list) else found[0]
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config
