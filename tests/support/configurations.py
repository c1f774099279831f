"""What the tests of configurations share: content with changes, and the sentence of a refusal."""

from typing import Any

import pytest

from fedforward.config.fields import Section
from fedforward.config.loading import validate_as
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError


def content(**changes: Any) -> dict[str, Any]:
    """The least content of a configuration, with `section__key=value` changes."""
    whole: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "d.jsonl"}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        whole.setdefault(section, {})[name] = value
    return whole


def refusal(whole: dict[str, Any], kind: type[Section] = Config) -> str:
    """What the user reads when this content is refused."""
    with pytest.raises(FedForwardError) as caught:
        validate_as(kind, whole, "c.toml")
    return str(caught.value)
